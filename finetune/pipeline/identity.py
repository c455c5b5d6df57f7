"""A run's identity: a digest of all that changes its numbers, before a weight is loaded."""

from __future__ import annotations

import math
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch

from finetune import distributed
from finetune.config.inputs import DataSource, Inputs, Source
from finetune.config.methods import METHODS
from finetune.config.optimizers import OPTIMIZERS
from finetune.config.schema import Config, DataConfig, ModelConfig, changed_settings
from finetune.data import dataset, templates
from finetune.data.sources import find_source
from finetune.data.token_cache import TOKENS as TOKENS
from finetune.files import digest, slug
from finetune.home import WORKER
from finetune.models import adapters, base_model, quantization
from finetune.models.chat_templates import find_chat_template, read_chat_template
from finetune.models.kernels import FLASH
from finetune.models.precision import Precision, compute_dtype, find_precision, name_dtype
from finetune.models.quantization import BITSANDBYTES, GPTQ_PACKAGES
from finetune.pipeline import identity_0_1
from finetune.pipeline.session import Session

# The versions that can change a number; bitsandbytes only where it is used.
TRAINING_VERSIONS = ("torch", "transformers", "peft", "trl", "accelerate")
EVALUATION_VERSIONS = ("torch", "transformers", "lm_eval")
# Raised when a default, or what a setting does, changes its meaning: earlier runs keep their names.
IDENTITY = 2


def find_inputs(config: Config, session: Session | None = None) -> Inputs:
    """Find model and data, and name the run by what changes its numbers.

    Args:
        config: the run's.
        session: what is loaded already; None begins with nothing.
    """
    source = base_model.find_model(config.model)
    model = quantization.as_loaded(config.model, base_model.load_config(config.model, source))
    found, files = dataset.find_sources(config.data), find_files(config)
    precision = find_precision(config)
    template = _find_chat_template(config, source, session or Session())
    named = _name_parts(config, Parts(source, model, found, files, precision, template))
    identity = digest(named)
    folder = run_path(config, identity)
    if not folder.exists():
        folder = _find_earlier(config, named) or folder
    device = str(precision.device)
    return Inputs(
        device, source, found, model, identity, folder, files,
        job=digest(_without_device(named)),
        dtype=name_dtype(config.model, device),
    )  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The inputs that the settings name, read as far as the identity needs."""

    source: Source
    model: ModelConfig  # as loaded
    data: list[DataSource]
    files: dict[str, str]
    precision: Precision
    chat_template: str | None  # in force, where rows are conversations


def find_files(config: Config) -> dict[str, str]:
    """Return the digests of the files that settings name beside model and rows."""
    template = templates.load_template(config.data.prompt_template)
    found = {}
    if template.file_text is not None:
        found["data.prompt_template"] = digest(template.file_text)
    if config.model.chat_template is not None:
        found["model.chat_template"] = digest(read_chat_template(config.model.chat_template))
    if config.model.adapter is not None:
        found["model.adapter"] = adapters.saved_digest(Path(config.model.adapter))
    return found


def _without_device(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of an identity that do not depend on the machine."""
    model = {key: value for key, value in named["model"].items() if key != "dtype"}
    local = ("precision", "processes", "fsdp")
    training = {key: value for key, value in named["training"].items() if key not in local}
    kept = {key: value for key, value in named.items() if key != "versions"}
    return {**kept, "model": model, "training": training}


def check_inputs(config: Config, inputs: Inputs) -> None:
    """Check that a run is computed from what it was planned with, on the same kind of device.

    Raises:
        ValueError: it is not; the message has the remedy.
    """
    dtype = name_dtype(config.model, inputs.device)
    if inputs.dtype and dtype != inputs.dtype:
        raise ValueError(
            f"the run was planned in {inputs.dtype}, but the GPU of this worker computes in "
            f"{dtype}; start the command on GPUs of one kind (CUDA_VISIBLE_DEVICES), or set "
            f"model.dtype={dtype}"
        )
    if changed := find_changes(config, inputs):
        raise ValueError("; ".join(changed))


def find_changes(config: Config, inputs: Inputs) -> list[str]:
    """Return the inputs that have changed since a run was planned, one line each.

    What the hub has is taken at its planned commit, and cannot change.
    """
    sources = config.data.sources()
    local = [one for one in inputs.data if one.revision is None]
    changed = [str(o) for o in local if find_source(o.key, sources[o.key]).digest != o.digest]
    files = find_files(config)
    changed += [key for key in sorted(inputs.files) if files.get(key) != inputs.files[key]]
    if not inputs.source.is_pinned:
        changed += ["model.path"] * (
            base_model.find_model(config.model).digest != inputs.source.digest
        )
    return [
        f"{name} has changed since the sweep was planned; start the command again to use "
        "its new content"
        for name in changed
    ]


def _name_parts(config: Config, parts: Parts) -> dict[str, Any]:
    """Return all that changes a number of the training, as the identity digests it."""
    processes = distributed.num_processes()  # each takes its own batches
    return {
        "identity": IDENTITY,
        "model": model_identity(config, parts.source, str(parts.precision.device)),
        "adapter": parts.files.get("model.adapter"),
        "peft": changed_settings(config.peft),
        "lora": changed_settings(config.lora),
        "optimizer": changed_settings(config.optimizer),
        "data": data_identity(config.data, parts.data),
        **({} if config.training.is_skipped else {"tokens": TOKENS}),
        **({"chat_template": digest(parts.chat_template)} if parts.chat_template else {}),
        "training": {
            **changed_settings(config.training),
            "precision": str(parts.precision.autocast), "order_seed": config.training.order_seed,
            **({"processes": processes} if processes > 1 else {}),
            **({"fsdp": True} if distributed.is_sharded() else {}),
        },
        "versions": training_versions(config, parts.model),
    }  # fmt: skip


def training_versions(config: Config, model: ModelConfig) -> dict[str, str]:
    """Return the versions that can change a number of the training; `model` is as loaded."""
    versions = find_versions(replace(config, model=model), TRAINING_VERSIONS)
    if config.training.use_liger_kernel:
        versions["liger_kernel"] = _installed_version("liger_kernel")
    return versions


def model_identity(config: Config, source: Source, device: str) -> dict[str, Any]:
    dtype = str(compute_dtype(config.model, torch.device(device)))
    named = {**changed_settings(config.model), "digest": source.digest, "dtype": dtype}
    if config.model.chat_template is not None and _uses_chat_template(config):
        named["chat_template"] = digest(read_chat_template(config.model.chat_template))
    return named


def _uses_chat_template(config: Config) -> bool:
    return config.evaluation.chat_template or config.data.prompt_template == "chat"


def _find_chat_template(config: Config, source: Source, session: Session) -> str | None:
    """Return the text that rows are written by: TRL's variant where it has one, its date fixed."""
    if config.training.is_skipped or config.data.prompt_template != "chat":
        return None
    tokenizer = session.tokenizer(config.model, source)
    return find_chat_template(tokenizer).text if tokenizer.chat_template else None


def data_identity(settings: DataConfig, sources: list[DataSource]) -> dict[str, Any]:
    """Name the rows and the template by their content; a mix also by its shares."""
    template = templates.load_template(settings.prompt_template)
    name = template.file_text and {"digest": digest(template.file_text)}
    named = {**changed_settings(settings), "prompt_template": name or settings.prompt_template}
    if settings.validation_path is not None:
        *sources, held_out = sources
        named["validation_path"] = held_out.digest
    if not settings.mix:
        return {**named, "digest": sources[0].digest}
    total = math.fsum(source.settings.weight for source in sources)
    named["mix"] = [
        {
            **changed_settings(source.settings),
            "weight": source.settings.weight / total, "digest": source.digest,
        }
        for source in sources
    ]  # fmt: skip
    return named


def find_versions(config: Config, packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of packages, and of what the base, as loaded, and the optimizer use."""
    names = list(packages)
    package = OPTIMIZERS[config.optimizer.name].package
    if config.model.quantization in BITSANDBYTES:
        names.append("bitsandbytes")
    if package is not None and package.name not in names:
        names.append(package.name)
    if config.model.quantization == "gptq":
        names += GPTQ_PACKAGES
    if config.model.attn_implementation in FLASH:
        names.append(FLASH[config.model.attn_implementation][1])
    return {name: _installed_version(name) for name in names}


@lru_cache(maxsize=64)
def _installed_version(package: str) -> str:
    """Read a package's metadata once; what is imported already does not change."""
    return version(package)


def run_path(config: Config, identity: str) -> Path:
    """Return the folder of a run: a short description, and its identity."""
    return Path(config.output_dir).absolute() / f"{slug(_describe(config))}-{identity[:12]}"


def _find_earlier(config: Config, named: Mapping[str, Any]) -> Path | None:
    """Return the folder that release 0.1 made for this run, where there is one.

    That release trained on other tokens; only what it scored without training is the same.
    """
    if not config.training.is_skipped:
        return None
    identity = identity_0_1.find_identity(config, named)
    if identity is None:
        return None
    found = Path(config.output_dir).absolute().glob(f"*-{identity[:12]}")
    return next(iter(sorted(found)), None)


def _describe(config: Config) -> str:
    """Return a run's model, method, rank and rate, with which the name of its folder begins."""
    name, method = Path(config.model.path).name.partition(".")[0], config.peft.method
    if config.training.is_skipped:
        return f"{name}-{Path(config.model.adapter).name if config.model.adapter else 'as-it-is'}"
    rank = f"-r{config.lora.r}" if "r" in METHODS[method].lora else ""
    return f"{name}-{method}{rank}-lr{config.optimizer.lr}"


def describe_environment(device: str) -> dict[str, Any]:
    """Return versions, hardware and code commit, which a rerun compares, and who runs it where."""
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    packages = (*TRAINING_VERSIONS, "lm_eval", "bitsandbytes", "datasets", "mlflow", "finetune")
    return {
        "versions": {name: _installed_version(name) for name in packages},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "processes": distributed.num_processes(),
        "gpu": gpu,
        "git_commit": _find_commit(),
        "lock_digest": _lock_digest(),
        "host": socket.gethostname(),
        "worker": os.environ.get(WORKER),  # its name in the sweep
    }


def _find_commit() -> str | None:
    """Return the commit of this code; None where there is no git, or it refuses the folder."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


@lru_cache(maxsize=1)
def _lock_digest() -> str:
    """Return a digest of all installed packages, also of those that `versions` does not name."""
    return digest(sorted({f"{one.metadata['Name']}=={one.version}" for one in distributions()}))
