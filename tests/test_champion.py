"""A sweep's best run as a model of MLflow's registry, which `mlflow.pyfunc` loads."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config.schema import Config, DataConfig, ModelConfig
from finetune.inference.pyfunc_model import _load_pyfunc, _rows_of
from finetune.problems import Refused
from finetune.tracking import champion as champions
from finetune.tracking.artifact_links import send_folder
from finetune.tracking.champion import (
    FIELDS_TAG,
    Champion,
    build_signature,
    find_requirements,
    register_champion,
)
from finetune.tracking.events import read_events
from finetune.tracking.mlflow_store import open_store
from finetune.tracking.sweep_summary import SweepSummary
from tests.conftest import train_tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own

SUMMARY = SweepSummary(
    note="It wins.\n\nmore", values={"best_score": 0.75}, tags={"finetune.best_run": "lora.r=4"}
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, module_cache: None) -> Path:
    """A trained run of the tiny model."""
    return train_tiny(tmp_path_factory.mktemp("runs"))


def registered(uri: str, run: Path, artifact: str = "adapter") -> str:
    """Send a run's weights, register it, and return the id of its MLflow run."""
    client = open_store(uri)
    place = Path(uri.removeprefix("sqlite:///")).parent / "artifacts"
    experiment = client.create_experiment("test", artifact_location=place.as_uri())
    run_id = str(client.create_run(experiment).info.run_id)
    send_folder(client, run_id, run / artifact, artifact)
    (tag,) = (
        event["value"] for event in read_events(run / "events.jsonl")
        if event["event"] == "tag" and event["key"] == FIELDS_TAG
    )  # fmt: skip
    champion = Champion("sweep", run_id, run, artifact, {FIELDS_TAG: tag})
    for _ in range(2):
        register_champion(client, champion, SUMMARY)
    return run_id


def test_the_champion_generates(uri: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the registry, prompted as in training; with the likeliest tokens it says the same."""
    import mlflow

    registered(uri, run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = mlflow.pyfunc.load_model("models:/sweep@champion")
    asked = {"instruction": ["Why is the sky blue?", "What is ice?"]}
    said = model.predict(asked, params={"max_new_tokens": 4})
    assert len(said) == 2
    assert all(isinstance(one, str) for one in said)
    assert said == model.predict(asked, params={"max_new_tokens": 4})


def test_its_version_says_what_it_is(uri: str, run: Path) -> None:
    """Once, with the alias, tags, description, signature and the packages that it needs."""
    run_id = registered(uri, run)
    client = open_store(uri)
    version = client.get_model_version_by_alias("sweep", "champion")
    assert str(version.version) == "1"
    assert version.tags["finetune.best_run"] == "lora.r=4"
    assert version.tags["finetune.run"] == run.name
    assert version.tags["finetune.score"] == "0.7500"
    description = str(version.description)
    assert description.startswith("It wins.\n\n    model = mlflow.pyfunc.load_model(")
    assert 'model.predict({"instruction": ["..."]})' in description
    folder = Path(client.download_artifacts(run_id, "adapter"))
    model = yaml.safe_load((folder / "MLmodel").read_text())
    assert model["metadata"]["base_model"] == "random://tiny"
    names = [one["name"] for one in json.loads(model["signature"]["inputs"])]
    assert names == ["instruction", "input", "system", "history"]
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("peft==") for line in lines)


def test_weights_are_linked_where_the_store_is_on_their_file_system(uri: str, run: Path) -> None:
    """They are stored once, and outlive either name; sending again changes nothing."""
    run_id = registered(uri, run)
    client = open_store(uri)
    place = Path(uri.removeprefix("sqlite:///")).parent / "artifacts" / run_id / "artifacts"
    stored = place / "adapter" / "adapter_model.safetensors"
    own = run / "adapter" / "adapter_model.safetensors"
    assert stored.samefile(own)
    send_folder(client, run_id, run / "adapter", "adapter")
    assert stored.samefile(own)
    assert own.stat().st_size > 0
    assert not list(stored.parent.glob("*.tmp*"))
    settings = stored.with_name("adapter_config.json")
    assert not settings.samefile(run / "adapter" / "adapter_config.json")


def test_weights_are_copied_where_they_cannot_be_linked(
    uri: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between two file systems."""

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    run_id = registered(uri, run)
    stored = Path(open_store(uri).download_artifacts(run_id, "adapter"))
    copied, own = (folder / "adapter_model.safetensors" for folder in (stored, run / "adapter"))
    assert copied.read_bytes() == own.read_bytes()
    assert not copied.samefile(own)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ('{"required": ["instruction"], "optional": ["input"]}', ["instruction", "input"]),
        ('{"required": ["messages"], "optional": []}', []),
        (None, []),
        ("no JSON", []),
        ('{"required": 3}', []),
    ],
)
def test_the_signature_has_the_fields_of_the_prompt(fields: str | None, names: list[str]) -> None:
    """A single one has no name, so that a list of texts is taken; a run of old has one."""
    inputs = build_signature(fields).inputs
    assert (inputs.input_names() if inputs.has_input_names() else []) == names
    assert len(inputs.inputs) == max(1, len(names))


def test_packages_are_named_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a quantised base too; this project by where it was installed from."""

    class Installed:
        version = "1.2+cpu"

        def __init__(self, name: str) -> None:
            self.name = name

        def read_text(self, name: str) -> str | None:
            return json.dumps(
                {"url": "https://host/repo", "vcs_info": {"vcs": "git", "commit_id": "ab"}}
            )

    monkeypatch.setattr(champions, "distribution", Installed)
    lines = list(find_requirements({"model": {"quantization": "nf4"}}))
    assert "torch==1.2" in lines
    assert "bitsandbytes==1.2" in lines
    assert lines[-1] == "finetune @ git+https://host/repo@ab"
    assert "bitsandbytes==1.2" not in list(find_requirements({"model": {"quantization": "none"}}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trust_remote_code": True}, "trust"),
        ({"path": "nowhere/model"}, "nowhere/model"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused(
    change: dict[str, Any], expected: str, uri: str, run: Path
) -> None:
    """In one line, before weights are loaded: a store may be somebody else's."""
    run_id = registered(uri, run)
    folder = Path(open_store(uri).download_artifacts(run_id, "adapter"))
    path = folder / "run" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["model"] |= change
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(Refused, match=expected):
        _load_pyfunc(str(folder))


def test_a_field_that_is_missing_is_named(uri: str, run: Path) -> None:
    """Where MLflow does not check the columns, as below its own interface."""
    import pandas

    run_id = registered(uri, run)
    folder = open_store(uri).download_artifacts(run_id, "adapter")
    generator = _load_pyfunc(folder)
    with pytest.raises(Refused, match="instruction is missing"):
        generator.predict(pandas.DataFrame([{"a": "x", "b": "y"}]))


def test_lists_of_unequal_lengths_are_refused() -> None:
    """A mapping of columns to lists comes as one record."""
    assert _rows_of({"a": "x"}) == [{"a": "x"}]
    assert _rows_of({"a": ["x", "y"], "b": 1}) == [{"a": "x", "b": 1}, {"a": "y", "b": 1}]
    with pytest.raises(Refused, match="a, b have unequal lengths"):
        _rows_of({"a": ["x", "y"], "b": ["z"]})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "ia3", "prefix_tuning"])
def test_a_fresh_process_loads_it(method: str, uri: str, tmp_path: Path) -> None:
    """Also a model whose every weight was tuned, which has no adapter."""
    config = Config(model=ModelConfig(path="random://tiny"))
    config.data = DataConfig(path="package://finetune/demo/rows.jsonl", num_examples=8)
    run = train_tiny(tmp_path / "runs", peft=replace(config.peft, method=method))
    registered(uri, run, "model" if method == "full" else "adapter")
    code = (
        f"import mlflow; mlflow.set_tracking_uri({uri!r})\n"
        "model = mlflow.pyfunc.load_model('models:/sweep@champion')\n"
        "print(model.predict({'instruction': ['Why?']}, params={'max_new_tokens': 3}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['")
