"""A run's name says what changes its numbers, survives new settings, and stays what was planned."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from finetune.config.schema import (
    NEUTRAL,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainingConfig,
    changed_settings,
    setting,
)
from finetune.pipeline import identity, identity_0_1, preflight, run_jobs
from finetune.pipeline.identity import find_changes, find_inputs
from finetune.pipeline.jobs import Job
from finetune.tracking.run_folder import RunFolder
from tests.conftest import write_rows

ROWS: list[object] = [{"instruction": f"ask {n}", "output": f"answer {n}"} for n in range(8)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Return the settings of a run of the tiny model on a file of eight rows."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    config = Config(model=ModelConfig(path="random://tiny"), data=DataConfig(path=str(path)))
    config.output_dir = str(tmp_path / "outputs")
    config.evaluation.tasks = []
    return config


@dataclass
class GrownModel(ModelConfig):
    """A section of a later release."""

    rope_scale: float = 1.0


@dataclass
class GrownTraining(TrainingConfig):
    """A section of a later release, with a list and a field that changes no number."""

    neftune_alpha: float | None = None
    bucket_sizes: list[int] | None = None
    log_every: int = setting(1, NEUTRAL)


@dataclass
class GrownLora(LoraConfig):
    """A section of a later release."""

    bias: str = "none"


@dataclass
class GrownData(DataConfig):
    """A section of a later release."""

    encoding: str = "utf-8"


GROWN: dict[str, Callable[[Config], Config]] = {
    "model": lambda c: replace(c, model=GrownModel(**vars(c.model))),
    "training": lambda c: replace(c, training=GrownTraining(**vars(c.training))),
    "lora": lambda c: replace(c, lora=GrownLora(**vars(c.lora))),
    "data": lambda c: replace(c, data=GrownData(**vars(c.data))),
}


@pytest.mark.parametrize("section", GROWN)
def test_a_new_field_at_its_default_renames_no_run(config: Config, section: str) -> None:
    """A run that finished before a release added a setting is found again, of either age."""
    now, then = find_inputs(config), find_inputs(GROWN[section](config))
    assert now.folder == then.folder
    assert now.identity == then.identity


def test_a_new_field_that_is_set_names_another_run(config: Config) -> None:
    """What differs from the default changes a number, unless it is marked as neutral."""
    grown = GROWN["training"](config)
    before = find_inputs(grown).identity
    assert isinstance(grown.training, GrownTraining)
    grown.training.log_every = 10
    assert find_inputs(grown).identity == before
    grown.training.neftune_alpha = 5.0
    assert find_inputs(grown).identity != before


NEUTRAL_CHANGES: list[Callable[[Config], Any]] = [
    lambda c: setattr(c.training, "checkpoint_every", 7),
    lambda c: setattr(c.training, "keep_checkpoints", 3),
    lambda c: setattr(c.training, "checkpoint_minutes", 7.0),
    lambda c: setattr(c.training, "gradient_checkpointing", True),
    lambda c: setattr(c.training, "device", "cpu"),
    lambda c: setattr(c.training, "precision", "fp32"),
    lambda c: setattr(c.training, "data_seed", c.training.seed),
    lambda c: setattr(c.model, "dtype", "fp32"),
    lambda c: setattr(c.model, "dimensions", {"hidden_size": 8}),
    lambda c: setattr(c.tracking, "enabled", False),
    lambda c: setattr(c.sweep, "name", "other"),
    lambda c: setattr(c.evaluation, "limit", 3),
]
NUMBERS: list[Callable[[Config], Any]] = [
    lambda c: setattr(c.training, "seed", 7),
    lambda c: setattr(c.training, "data_seed", 7),
    lambda c: setattr(c.training, "precision", "bf16"),
    lambda c: setattr(c.training, "max_length", 64),
    lambda c: setattr(c.optimizer, "lr", 2e-3),
    lambda c: setattr(c.lora, "r", 4),
    lambda c: setattr(c.lora, "target_modules", ["q_proj"]),
    lambda c: setattr(c.data, "num_examples", 4),
    lambda c: setattr(c.data, "prompt_template", "text"),
    lambda c: setattr(c.data, "columns", {"instruction": "output", "output": "instruction"}),
    lambda c: setattr(c.model, "attn_implementation", "eager"),
    lambda c: setattr(c.model, "dtype", "bf16"),
    lambda c: setattr(c.peft, "method", "ia3"),
]


@pytest.mark.parametrize("number", range(len(NEUTRAL_CHANGES)))
def test_what_changes_no_number_keeps_the_name(config: Config, number: int) -> None:
    """How often to checkpoint, where to run and what to track leave a run what it is."""
    before = find_inputs(config).identity
    NEUTRAL_CHANGES[number](config)
    assert find_inputs(config).identity == before


@pytest.mark.parametrize("number", range(len(NUMBERS)))
def test_what_changes_a_number_changes_the_name(config: Config, number: int) -> None:
    """Two runs of other numbers never share a folder."""
    before = find_inputs(config).identity
    NUMBERS[number](config)
    assert find_inputs(config).identity != before


def test_the_same_content_elsewhere_has_the_same_name(config: Config, tmp_path: Path) -> None:
    """Rows are named by what they hold, and a mix by its shares."""
    before = find_inputs(config).identity
    copy = write_rows(tmp_path / "copy.jsonl", ROWS)
    config.data.path = str(copy)
    assert find_inputs(config).identity == before
    config.data.path, mixes = None, []
    for weights in ((1.0, 3.0), (2.0, 6.0), (1.0, 1.0)):
        config.data.mix = [SourceConfig(str(copy), weight) for weight in weights]
        mixes.append(find_inputs(config).identity)
    assert mixes[0] == mixes[1] != mixes[2]


def test_what_names_a_run_is_what_differs(config: Config) -> None:
    """A section at its defaults says nothing."""
    assert changed_settings(OptimizerConfig()) == {}
    assert changed_settings(OptimizerConfig(lr=0.001, weight_decay=0.1)) == {"weight_decay": 0.1}
    assert changed_settings(LoraConfig(target_modules=LoraConfig().target_modules)) == {}


# Recorded with release 0.1's own code, every package at version 1.
OLD: dict[str, tuple[str, Callable[[Config], Any]]] = {
    "default": ("e0488cb5befbba02", lambda c: None),
    "lora": (
        "3799efcd81ec24bd",
        lambda c: [_set(c.lora, r=4, dropout=0.1), _set(c.optimizer, lr=1e-4)],
    ),
    "training": (
        "92d012ee4c603e3a",
        lambda c: _set(c.training, precision="bf16", data_seed=3, checkpoint_every=7, max_steps=5),
    ),
    "template": ("1c046a4a565642e4", lambda c: _set(c.data, prompt_template=_template(c))),
    "method": ("12a34966d65f89ec", lambda c: _set(c.peft, method="ia3")),
    "mix": ("93cd241c7bc34aa8", lambda c: _set(c.data, mix=_mix(c), path=None)),
    "subset": ("06f4c058b7932692", lambda c: _set(c.data, subset="a")),
}


def _set(section: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(section, name, value)


def _template(config: Config) -> str:
    path = Path(config.output_dir).parent / "prompt.jinja"
    path.write_text("{{ instruction }}\n", encoding="utf-8")
    return str(path)


def _mix(config: Config) -> list[SourceConfig]:
    path = config.data.path or ""
    return [SourceConfig(path), SourceConfig(path, 3.0, split="x", columns={"input": "q"})]


def _identity_0_1(config: Config, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what release 0.1 called a run whose packages are all at version 1."""
    names: list[Any] = []
    monkeypatch.setattr(identity, "_installed_version", lambda package: "1")
    with monkeypatch.context() as patch:
        patch.setattr(identity, "_find_earlier", lambda config, named: names.append(named))
        find_inputs(config)
    return identity_0_1.find_identity(config, names[0]) or ""


@pytest.mark.parametrize("name", OLD)
def test_the_names_of_release_0_1_are_known(
    config: Config, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the settings of today."""
    config.training.device = "cpu"
    old, change = OLD[name]
    change(config)
    assert _identity_0_1(config, monkeypatch)[: len(old)] == old


def test_what_release_0_1_evaluated_is_found(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until there is a folder by its name of today; what it trained saw other tokens."""
    config.training.device = "cpu"
    for max_steps in (0, 5):
        config.training.max_steps = max_steps
        old = _identity_0_1(config, monkeypatch)
        today = find_inputs(config).folder
        earlier = today.with_name(f"tiny-earlier-{old[:12]}")
        earlier.mkdir(parents=True)
        assert find_inputs(config).folder == (today if max_steps else earlier)
        today.mkdir()
        assert find_inputs(config).folder == today


def test_a_run_on_other_tokens_is_another_run(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless nothing is trained on them."""
    trained, config.training.max_steps = find_inputs(config).identity, 0
    evaluated = find_inputs(config).identity
    monkeypatch.setattr(identity, "TOKENS", identity.TOKENS + 1)
    assert find_inputs(config).identity == evaluated
    config.training.max_steps = None
    assert find_inputs(config).identity != trained


def test_a_younger_setting_has_no_run_of_release_0_1(config: Config) -> None:
    """What that release could not be told is in none of its folders."""
    grown = GROWN["lora"](config)
    named: dict[str, Any] = {"training": {}, "data": {}, "model": {}}
    assert isinstance(grown.lora, GrownLora)
    grown.lora.bias = "all"
    assert identity_0_1.find_identity(grown, named) is None


CHANGES: dict[str, Callable[[Config], Any]] = {
    "data.path": lambda c: _append(c.data.path, '{"instruction": "new", "output": "row"}\n'),
    "data.prompt_template": lambda c: _append(c.data.prompt_template, "again\n"),
    "model.path": lambda c: _append(f"{c.model.path}/model.safetensors", "x"),
}


def _append(path: str | None, text: str) -> None:
    assert path is not None
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(text)


@pytest.mark.parametrize("key", CHANGES)
def test_an_input_that_changed_after_planning_fails_the_run_in_its_folder(
    config: Config, key: str, tmp_path: Path
) -> None:
    """A run is made from what was planned or not at all; the reason names the setting."""
    config.data.prompt_template = _template(config)
    shutil.copytree(find_inputs(config).source.location, tmp_path / "model")
    config.model.path = str(tmp_path / "model")
    plan = preflight.prepare(config)
    assert plan.inputs is not None, plan.problems
    assert find_changes(config, plan.inputs) == []
    CHANGES[key](config)
    (change,) = find_changes(config, plan.inputs)
    assert change.startswith(key)
    assert "start the command again" in change
    job = Job(config, "", [], {}, plan.inputs)
    assert run_jobs.run([replace(job, yaml=_yaml(config))]) == ["failed"]
    status = RunFolder(plan.inputs.folder).status()
    assert status is not None
    assert (status.state, status.reason) == ("failed", f"ValueError: {change}")
    assert [path.name for path in Path(config.output_dir).iterdir()] == [plan.inputs.folder.name]


def _yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def test_a_hub_branch_that_moves_is_taken_at_its_planned_commit(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the hub has at a commit cannot change, and the hub is not asked again."""
    inputs = find_inputs(config)
    data = [replace(inputs.data[0], location="owner/rows", digest="hub:x@1", revision="1")]
    source = replace(inputs.source, location="owner/base", digest="hub:y@1", revision="1")
    planned = replace(inputs, data=data, source=source)
    monkeypatch.setattr(
        "finetune.models.base_model.hub_commit", lambda *_, **__: pytest.fail("asked")
    )
    assert find_changes(config, planned) == []


def test_a_run_does_not_name_itself_anew(config: Config, tmp_path: Path) -> None:
    """The folder that planning named is used, whatever the settings would name today."""
    plan = preflight.prepare(config)
    assert plan.inputs is not None
    elsewhere = replace(plan.inputs, folder=tmp_path / "outputs" / "planned")
    config.training.max_length, config.training.max_steps = 400, 1
    job = Job(config, _yaml(config), [], {}, elsewhere)
    assert run_jobs.run([job]) == ["finished"]
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["planned"]


def test_the_rows_to_validate_on_are_named_by_content(config: Config, tmp_path: Path) -> None:
    """Another copy of them keeps the name, other rows change it."""
    names = []
    for name, rows in (("", []), ("a", ROWS[:2]), ("b", ROWS[:2]), ("c", ROWS[:3])):
        path = write_rows(tmp_path / f"{name}.jsonl", list(rows))
        config.data.validation_path = str(path) if name else None
        names.append(find_inputs(config).identity)
    assert names[1] == names[2]
    assert len(set(names)) == 3
    config.data.validation_path, config.data.encoding = None, "cp1252"
    assert find_inputs(config).identity not in names
