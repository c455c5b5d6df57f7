"""What a launcher may ask for, accelerate's or torchrun's: the rest is refused with a remedy."""

from __future__ import annotations

import os

from finetune import distributed
from finetune.config.methods import METHODS
from finetune.config.optimizers import OPTIMIZERS
from finetune.config.schema import Config

# What a launcher may ask of accelerate beside several processes, the value that asks for nothing,
# and the remedy. Accelerate would follow it unseen by a run's identity.
ASKED = {
    "ACCELERATE_USE_DEEPSPEED": ("false", "leave --use_deepspeed away"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "leave --use_megatron_lm away"),
    "ACCELERATE_MIXED_PRECISION": ("no", "use --mixed_precision no and set training.precision"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "use --dynamo_backend no"),
    "FSDP_OFFLOAD_PARAMS": ("false", "leave --fsdp_offload_params away"),
    "FSDP_IGNORED_MODULES": ("", "leave --fsdp_ignored_modules away"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "set training.gradient_checkpointing=true instead"),
}


def find_problems(config: Config, *, has_launcher: bool = False) -> list[str]:
    """Return what cannot be kept with what the launcher asks for, with the remedy.

    Args:
        config: of any job of the sweep.
        has_launcher: whether another of Hydra's launchers is to run the jobs.
    """
    problems = [
        f"the launcher sets {name}={value}, which is not supported; {remedy}"
        for name, (nothing, remedy) in ASKED.items()
        if (value := os.environ.get(name, nothing)).lower() not in (nothing, "")
    ]
    if distributed.asks_for_fsdp():
        problems += _find_fsdp_problems(config)
    if distributed.is_launched() and config.sweep.job_timeout is not None:
        problems.append(
            f"sweep.job_timeout is {config.sweep.job_timeout}, but a run of several processes "
            "cannot be ended alone; leave it unset under a launcher"
        )
    if distributed.is_launched() and has_launcher:
        problems.append("hydra/launcher cannot run jobs from several processes; leave it away")
    return problems


def _find_fsdp_problems(config: Config) -> list[str]:
    if not distributed.is_launched():
        return ["the launcher asks one process alone for FSDP; leave --use_fsdp away"]
    problems = []
    if (found := os.environ.get("FSDP_VERSION", "1")) != "2":
        problems.append(f"the launcher sets FSDP_VERSION={found}; use --fsdp_version 2")
    method, optimizer = METHODS.get(config.peft.method), OPTIMIZERS.get(config.optimizer.name)
    if method is not None and not method.trains_base:
        problems.append(
            f"peft.method is {method.name}, but FSDP is for peft=full only; leave "
            "--use_fsdp away: each GPU then holds the whole model"
        )
    if optimizer is not None and not optimizer.can_shard:
        names = " or ".join(name for name, row in OPTIMIZERS.items() if row.can_shard)
        problems.append(f"optimizer.name is {optimizer.name}; under FSDP use {names}")
    return problems
