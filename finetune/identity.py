"""What names a run: all that changes its numbers, found before any weight is loaded."""

from __future__ import annotations

import math
import platform
import subprocess
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch

from finetune import adapters, data, distributed, models, prompts, quantization, training
from finetune.config import Config, DataConfig, ModelConfig, SourceConfig
from finetune.fused_kernels import FLASH
from finetune.models import Source
from finetune.quantization import BITSANDBYTES, GPTQ_PACKAGES
from finetune.ranges import METHODS
from finetune.rows import DataSource
from finetune.run_folder import RunFolder, digest, slug

# The versions that can change a number; bitsandbytes only where it is used.
TRAINING_VERSIONS = ("torch", "transformers", "peft", "trl", "accelerate")
EVALUATION_VERSIONS = ("torch", "transformers", "lm_eval")
# Settings of the model that say nothing of the base, or are in its digest.
ELSEWHERE = ("dimensions", "adapter")
# Settings that leave a trained adapter's numbers as they are.
NEUTRAL = ("checkpoint_every", "keep_checkpoints", "gradient_checkpointing", "device")


@dataclass(frozen=True)
class Inputs:
    """The parts of a run that are found before any weight is loaded."""

    device: torch.device
    source: Source
    data: list[DataSource]
    identity: str  # of the training
    model: ModelConfig  # with the quantisation that the checkpoint brings, where it does


def find_inputs(config: Config) -> Inputs:
    """Find model and data, and compute the training's identity from what changes its numbers."""
    source = models.find_model(config.model)
    model = quantization.as_loaded(config.model, models.load_config(config.model, source))
    found = data.find_sources(config.data)
    precision = find_precision(config)
    neutral, adapter = dict.fromkeys(NEUTRAL), config.model.adapter
    seed, liger = config.training.seed, config.training.use_liger_kernel
    processes = distributed.num_processes()  # each takes a batch of its own
    data_seed = seed if config.training.data_seed is None else config.training.data_seed
    identity = digest(
        {
            "model": model_identity(config, source, precision.device),
            "adapter": adapter and adapters.saved_digest(Path(adapter)),
            "peft": asdict(config.peft),
            "lora": asdict(config.lora),
            "optimizer": asdict(config.optimizer),
            "data": data_identity(config.data, found),
            "training": {
                **asdict(config.training), **neutral,
                "precision": str(precision.autocast), "data_seed": data_seed,
                **({"processes": processes} if processes > 1 else {}),
                **({"fsdp": True} if distributed.is_sharded() else {}),
            },
            "versions": find_versions(replace(config, model=model), TRAINING_VERSIONS)
            | ({"liger_kernel": version("liger_kernel")} if liger else {}),
        }
    )  # fmt: skip
    return Inputs(precision.device, source, found, identity, model)


def find_precision(config: Config) -> training.Precision:
    device = models.pick_device(config.training.device)
    base = models.compute_dtype(config.model, device)
    return training.resolve_precision(config.training.precision, base, device)


def model_identity(config: Config, source: Source, device: torch.device) -> dict[str, Any]:
    return {
        **{name: value for name, value in asdict(config.model).items() if name not in ELSEWHERE},
        "path": None,
        "revision": None,
        "digest": source.digest,
        "dtype": str(models.compute_dtype(config.model, device)),
    }


def data_identity(settings: DataConfig, sources: list[DataSource]) -> dict[str, Any]:
    """Name the rows and the template by their content; a mix also by its shares."""
    named = _without_place(settings)
    template = prompts.load_template(settings.prompt_template)
    if template.file_text is not None:
        named["prompt_template"] = {"digest": digest(template.file_text)}
    mix = named.pop("mix")
    if not mix:
        return {**named, "digest": sources[0].digest}
    total = math.fsum(source.settings.weight for source in sources)
    named["mix"] = [
        {
            **_without_place(source.settings),
            "weight": source.settings.weight / total, "digest": source.digest,
        }
        for source in sources
    ]  # fmt: skip
    return named


def _without_place(settings: DataConfig | SourceConfig) -> dict[str, Any]:
    named = {**asdict(settings), "path": None, "revision": None}
    if settings.subset is None:
        del named["subset"]  # younger than the runs that were named without it
    return named


def find_versions(config: Config, packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of packages, and of what the base, as loaded, and the optimizer use."""
    names = list(packages)
    if config.model.quantization in BITSANDBYTES or "8bit" in config.optimizer.name:
        names.append("bitsandbytes")
    if config.model.quantization == "gptq":
        names += GPTQ_PACKAGES
    if config.model.attn_implementation in FLASH:
        names.append(FLASH[config.model.attn_implementation][1])
    return {name: version(name) for name in names}


def run_folder(config: Config, inputs: Inputs) -> RunFolder:
    return RunFolder(
        Path(config.output_dir).absolute() / f"{slug(_describe(config))}-{inputs.identity[:12]}"
    )


def _describe(config: Config) -> str:
    """Say in a word or three what a run is about; its identity says the rest."""
    name, method = Path(config.model.path).name.partition(".")[0], config.peft.method
    if config.training.is_skipped:
        return f"{name}-{Path(config.model.adapter).name if config.model.adapter else 'as-it-is'}"
    rank = f"-r{config.lora.r}" if "r" in METHODS[method] else ""
    return f"{name}-{method}{rank}-lr{config.optimizer.lr}"


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return versions, hardware and code commit: what a rerun compares."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    packages = (*TRAINING_VERSIONS, "lm_eval", "bitsandbytes", "datasets", "mlflow", "finetune")
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "processes": distributed.num_processes(),
        "gpu": gpu,
        "git_commit": commit.stdout.strip() or None,
        "lock_digest": _lock_digest(),
    }


@lru_cache(maxsize=1)
def _lock_digest() -> str:
    """Stand for all that is installed, also what `versions` does not name."""
    return digest(sorted({f"{one.metadata['Name']}=={one.version}" for one in distributions()}))
