"""Which optimizers there are, and what each needs."""

from __future__ import annotations

from importlib.util import find_spec

from transformers.training_args import OptimizerNames

from finetune.config import OptimizerConfig, nearest

# Optimizers beyond torch's own, by the package that brings them.
OPTIMIZER_PACKAGES = {
    "8bit": "bitsandbytes",
    "paged_": "bitsandbytes",
    "_bnb": "bitsandbytes",
    "lion_": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_4bit": "torchao",
    "galore_": "galore_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "apollo_": "apollo_torch",
    "stable_adamw": "optimi",
    "anyprecision": "torchdistx",
    "torch_xla": "torch_xla",
    "npu": "torch_npu",
}


def find_optimizer_problems(optimizer: OptimizerConfig) -> list[str]:
    """Return why the optimizer cannot be had here, with the remedy."""
    known = [item.value for item in OptimizerNames]
    if optimizer.name not in known:
        return [f"optimizer.name is {optimizer.name!r}; {nearest(optimizer.name, known)}"]
    parts = [part for part in OPTIMIZER_PACKAGES if part in optimizer.name]
    package = OPTIMIZER_PACKAGES[max(parts, key=len)] if parts else None
    if package and find_spec(package) is None:
        return [
            f"optimizer.name={optimizer.name} needs the package {package}; pip install "
            f"{package.replace('_', '-')}, or use optimizer.name=adamw_torch"
        ]
    return []
