"""The device of a run, and the number formats that it computes in there."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from finetune import distributed
from finetune.config.schema import Config, ModelConfig
from finetune.models import devices

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The arithmetic of training on one device."""

    device: torch.device
    autocast: torch.dtype  # fp32 means none


def resolve_precision(name: str, base: torch.dtype, device: torch.device) -> Precision:
    """Return the autocast of `training.precision`; auto takes the base's compute type."""
    return Precision(device, base if name == "auto" else TORCH_DTYPES[name])


def find_precision_problems(precision: Precision) -> list[str]:
    """Return why the device cannot train like this, with the remedy."""
    if precision.autocast == torch.float16 and precision.device.type == "cpu":
        return [
            "training.precision or model.dtype is fp16, which cannot be trained on a CPU; set "
            "model.dtype and training.precision to fp32 or bf16, or use a GPU"
        ]
    if precision.autocast == torch.bfloat16 and not has_bf16(precision.device):
        name = torch.cuda.get_device_name(precision.device)
        return [
            f"training.precision or model.dtype is bf16, which {name} does not compute in; set "
            "them to fp16 or fp32"
        ]
    return []


def find_precision(config: Config) -> Precision:
    """Return the device and the autocast of a run's training."""
    device = pick_device(config.training.device)
    base = compute_dtype(config.model, device)
    return resolve_precision(config.training.precision, base, device)


def pick_device(name: str) -> torch.device:
    """Return the device of `training.device`: auto takes the process's own GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    own = distributed.local_rank()
    return torch.device(name, own) if name == "cuda" else torch.device(name)


def describe_unused_gpu() -> str | None:
    """Return why auto leaves a GPU unused that the machine has; None where there is none to use."""
    if torch.cuda.is_available() or devices.are_hidden(os.environ):
        return None
    if not (gpus := devices.list_gpus()):
        return None
    why = devices.describe_missing(os.environ, gpus, torch.version.cuda)
    return f"training.device=auto trains on the CPU: {why}"


def compute_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of `model.dtype`: auto is bf16 where the GPU has it, else fp16; CPU fp32."""
    if model.dtype != "auto":
        return TORCH_DTYPES[model.dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bf16(device) else torch.float16


def name_dtype(model: ModelConfig, device: str) -> str:
    """Return the compute dtype by its name in the settings: fp32, bf16 or fp16."""
    dtype = compute_dtype(model, torch.device(device))
    return next(name for name, one in TORCH_DTYPES.items() if one == dtype)


def has_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bf16 itself (a P100 or T4 only emulates it)."""
    return device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
