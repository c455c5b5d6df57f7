"""Refuse unsupported options of `accelerate launch` and `torchrun`, with a remedy."""

from __future__ import annotations

import os

from finetune import distributed
from finetune.config.methods import METHODS
from finetune.config.optimizers import OPTIMIZERS
from finetune.config.schema import Config, WorkersConfig, changed_settings

# Variable of a launcher's option -> its neutral value, and the remedy for any other. Accelerate
# would apply the option, and a run's identity would not show it.
ASKED = {
    "ACCELERATE_USE_DEEPSPEED": ("false", "remove --use_deepspeed"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "remove --use_megatron_lm"),
    "ACCELERATE_MIXED_PRECISION": ("no", "use --mixed_precision no and set training.precision"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "use --dynamo_backend no"),
    "FSDP_OFFLOAD_PARAMS": ("false", "remove --fsdp_offload_params"),
    "FSDP_IGNORED_MODULES": ("", "remove --fsdp_ignored_modules"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "set training.gradient_checkpointing=true instead"),
}


def find_problems(config: Config) -> list[str]:
    """Return why a job cannot run under this launcher, with the remedy."""
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
            "cannot be stopped by a timeout; leave it unset under a launcher"
        )
    if distributed.is_launched():
        problems += _find_worker_problems(config.workers)
    return problems


def _find_worker_problems(workers: WorkersConfig) -> list[str]:
    """Return the settings of workers that a launcher's own processes make void."""
    asked = changed_settings(workers)
    return [
        f"workers.{name} is {value}, but under accelerate or torchrun its processes train the "
        f"runs one after another; leave it out, or start the command without a launcher"
        for name, value in asked.items()
        if (name, value) != ("num", 1)
    ]


def _find_fsdp_problems(config: Config) -> list[str]:
    if not distributed.is_launched():
        return [
            "--use_fsdp needs several processes, and the launcher started one; remove --use_fsdp"
        ]
    problems = []
    if (found := os.environ.get("FSDP_VERSION", "1")) != "2":
        problems.append(f"the launcher sets FSDP_VERSION={found}; use --fsdp_version 2")
    method, optimizer = METHODS.get(config.peft.method), OPTIMIZERS.get(config.optimizer.name)
    if method is not None and not method.trains_base:
        problems.append(
            f"peft.method is {method.name}, but FSDP is for peft=full only; "
            "remove --use_fsdp: each GPU then holds the full model"
        )
    if optimizer is not None and not optimizer.can_shard:
        names = " or ".join(name for name, row in OPTIMIZERS.items() if row.can_shard)
        problems.append(f"optimizer.name is {optimizer.name}; under FSDP use {names}")
    return problems
