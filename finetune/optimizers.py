"""Which optimizers there are, and what each needs."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers.training_args import OptimizerNames

from finetune.config import OptimizerConfig, nearest

# Optimizers beyond torch's own, by a part of the name (the longest that fits): the module that
# brings them, and the package to install for it.
OPTIMIZER_PACKAGES = {
    "8bit": ("bitsandbytes", "bitsandbytes"),
    "paged_": ("bitsandbytes", "bitsandbytes"),
    "_bnb": ("bitsandbytes", "bitsandbytes"),
    "lion_": ("bitsandbytes", "bitsandbytes"),
    "ademamix": ("bitsandbytes", "bitsandbytes"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
}
# Names of transformers that cannot run here, by a part of the name, with the reason.
UNSUPPORTED = {
    "galore_": "projects layers that optim_target_modules names, for which there is no setting",
    "apollo_": "projects layers that optim_target_modules names, for which there is no setting",
    "anyprecision": "needs torchdistx, which is neither on PyPI nor maintained",
    "torch_xla": "is for TPUs, and training.device is cuda or cpu",
    "npu": "is for Ascend NPUs, and training.device is cuda or cpu",
}
CUDA_ONLY = ("adalomo",)  # its package allocates on the GPU
REMEDY = "use optimizer.name=adamw_torch"


def find_optimizer_problems(optimizer: OptimizerConfig) -> list[str]:
    """Return why the optimizer cannot be had here, with the remedy."""
    name, known = optimizer.name, supported_names()
    if name not in {item.value for item in OptimizerNames}:
        return [f"optimizer.name is {name!r}; {nearest(name, known)}"]
    if name not in known:
        (why,) = {reason for part, reason in UNSUPPORTED.items() if part in name}
        return [f"optimizer.name={name} {why}; {REMEDY}"]
    parts = [part for part in OPTIMIZER_PACKAGES if part in name]
    module, package = OPTIMIZER_PACKAGES[max(parts, key=len)] if parts else ("", "")
    if module and find_spec(module) is None:
        return [
            f"optimizer.name={name} needs the package {package}; pip install {package}, or {REMEDY}"
        ]
    if name in CUDA_ONLY and not torch.cuda.is_available():
        return [f"optimizer.name={name} needs a CUDA device; {REMEDY}"]
    return []


def supported_names() -> list[str]:
    """Return the names of transformers' optimizers that can run with the settings there are."""
    names = [str(item.value) for item in OptimizerNames]
    return [name for name in names if not any(part in name for part in UNSUPPORTED)]
