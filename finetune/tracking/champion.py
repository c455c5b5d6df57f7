"""Register a sweep's best run in MLflow's model registry, so that `mlflow.pyfunc` loads it.

The run's adapter, which MLflow has already, becomes the model's folder: beside the weights come an
MLmodel, the run's settings and the packages that it needs. Nothing is stored twice.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finetune.problems import Refused
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.sweep_summary import SweepSummary

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

ALIAS = "champion"
LOADER = "finetune.inference.pyfunc_model"
FIELDS_TAG = "finetune.prompt_fields"  # of a run: the fields of its prompt, as JSON
SETTINGS = ("config.yaml", "prompt.jinja", "chat_template.jinja")  # of a run, to load it
PACKAGES = ("mlflow", "torch", "transformers", "peft", "safetensors")
QUANTISED = ("bitsandbytes", "accelerate")


@dataclass(frozen=True)
class Champion:
    """A sweep's best run, as MLflow has it."""

    sweep: str
    run_id: str
    folder: Path  # of the run
    artifact: str  # `adapter`, or `model` of a full run
    tags: Mapping[str, str]  # of its MLflow run


def register_champion(client: MlflowClient, champion: Champion, summary: SweepSummary) -> None:
    """Register a run under its sweep's name, once, with the alias `champion`.

    A version that is there already gets the tags and the description of now.
    """
    from mlflow.exceptions import MlflowException

    name, run_id = champion.sweep, champion.run_id
    _write_model(client, champion)
    try:
        client.create_registered_model(name, description=f"The best run of the sweep {name}.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    known = next((v.version for v in versions if v.run_id == run_id), None)
    source = f"runs:/{run_id}/{champion.artifact}"
    version = str(known or client.create_model_version(name, source, run_id).version)
    client.update_model_version(name, version, description=_describe(champion, summary))
    for key, value in _version_tags(champion, summary).items():
        client.set_model_version_tag(name, version, key, value)
    client.set_registered_model_alias(name, ALIAS, version)


def _write_model(client: MlflowClient, champion: Champion) -> None:
    """Add what makes a run's weights a model of MLflow's."""
    from mlflow.models import Model

    settings = _read_settings(champion.folder)
    if settings is None:
        return
    requirements = list(find_requirements(settings))
    model = Model(
        artifact_path=champion.artifact,
        run_id=champion.run_id,
        signature=build_signature(champion.tags.get(FIELDS_TAG)),
        metadata={"base_model": _value(settings, "path"), "sweep": champion.sweep},
    )
    model.add_flavor(
        "python_function",
        loader_module=LOADER,
        python_version=platform.python_version(),
        env={"virtualenv": "python_env.yaml"},
        model_config={"trust_remote_code": False},
    )
    python_env = {
        "python": platform.python_version(),
        "build_dependencies": ["pip"],
        "dependencies": ["-r requirements.txt"],
    }
    texts = {
        "requirements.txt": "".join(f"{line}\n" for line in requirements),
        "python_env.yaml": yaml.safe_dump(python_env, sort_keys=False),
        "run/config.yaml": yaml.safe_dump(settings, sort_keys=False),
        **{f"run/{name}": text for name, text in _templates(champion.folder)},
        "MLmodel": model.to_yaml(),  # last: with it the model is whole
    }
    for name, text in texts.items():
        client.log_text(champion.run_id, text, f"{champion.artifact}/{name}")


def build_signature(fields: str | None) -> ModelSignature:
    """Return what a model takes, the fields of its prompt, and its parameters of generation.

    Args:
        fields: the run's tag; None for a run of an earlier version: one column.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    try:
        known = json.loads(fields or "")
        required, optional = list(known["required"]), list(known["optional"])
    except (ValueError, TypeError, KeyError):
        required, optional = ["prompt"], []
    columns = [(name, True) for name in required] + [(name, False) for name in optional]
    if len(columns) == 1:  # a column without a name takes a list of texts too
        inputs = Schema([ColSpec("string")])
    else:
        inputs = Schema([ColSpec("string", name, required=needed) for name, needed in columns])
    return ModelSignature(
        inputs=inputs,
        outputs=Schema([ColSpec("string", required=True)]),
        params=ParamSchema(
            [ParamSpec("max_new_tokens", "long", 256), ParamSpec("temperature", "double", 0.0)]
        ),
    )


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """Return a run's settings as composed; the path of a local base is made absolute.

    None where they cannot be read, which the sweep's report says: the weights are registered alone.
    """
    try:
        settings = RunFolder(folder).read_settings()
    except Refused:
        return None
    path = _value(settings, "path")
    if isinstance(path, str) and not Path(path).is_absolute() and Path(path).is_dir():
        settings["model"]["path"] = str(Path(path).resolve())
    return settings


def _value(settings: Any, key: str) -> Any:
    model = settings.get("model") if isinstance(settings, dict) else None
    return model.get(key) if isinstance(model, dict) else None


def _templates(folder: Path) -> Iterator[tuple[str, str]]:
    for name in SETTINGS[1:]:
        if (folder / name).is_file():
            yield name, (folder / name).read_text(encoding="utf-8")


def find_requirements(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the packages that loading needs, as installed here; MLflow would take minutes to infer.

    This project is named by where it was installed from: the index has another one of its name.
    """
    quantised = _value(settings, "quantization") not in (None, "none")
    for name in (*PACKAGES, *(QUANTISED if quantised else ())):
        try:
            # Without the build, such as +cpu, which the index does not have.
            yield f"{name}=={distribution(name).version.partition('+')[0]}"
        except PackageNotFoundError:
            continue
    try:
        place = _installed_from(distribution("finetune"))
    except PackageNotFoundError:
        return
    if place is not None:
        yield f"finetune @ {place}"


def _installed_from(package: Distribution) -> str | None:
    """Return the address that a package was installed from, by PEP 610; None for an index."""
    try:
        origin = json.loads(package.read_text("direct_url.json") or "")
    except ValueError:
        return None
    if not isinstance(origin, dict) or not isinstance(origin.get("url"), str):
        return None
    vcs = origin.get("vcs_info")
    if isinstance(vcs, dict):
        return f"{vcs.get('vcs')}+{origin['url']}@{vcs.get('commit_id')}"
    return str(origin["url"])


def _describe(champion: Champion, summary: SweepSummary) -> str:
    """Return a version's description, in Markdown: verdict, and how to load it."""
    uri = f"models:/{champion.sweep}@{ALIAS}"
    inputs = build_signature(champion.tags.get(FIELDS_TAG)).inputs
    names = inputs.required_input_names() if inputs.has_input_names() else []
    asked = {name: ["..."] for name in names} or ["..."]
    code = f'model = mlflow.pyfunc.load_model("{uri}")\n    model.predict({json.dumps(asked)})'
    verdict = summary.note.partition("\n")[0]
    needs = "It needs this project in the environment; `requirements.txt` names the packages."
    return f"{verdict}\n\n    {code}\n\n{needs}".strip()


def _version_tags(champion: Champion, summary: SweepSummary) -> dict[str, str]:
    """Return the tags of a version: sweep, run, place in the grid, metric and score."""
    tags = {"finetune.sweep": champion.sweep, "finetune.run": champion.folder.name, **summary.tags}
    if "best_score" in summary.values:
        tags["finetune.score"] = f"{summary.values['best_score']:.4f}"
    return tags
