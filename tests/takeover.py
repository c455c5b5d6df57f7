"""Halt a worker at a moment of its run: `python -m tests.takeover FOLDER METHOD MOMENT`.

It stops as SIGSTOP of somebody else, a suspended machine or a hanging disk would stop it, at the
same moment each time. Leases are short here.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from finetune.config.schema import Config, DataConfig, ModelConfig
from finetune.pipeline import run_jobs
from finetune.pipeline.jobs import Job
from finetune.tracking import claims
from finetune.tracking.claims import Claim
from finetune.tracking.events import EventLog

LEASE_SECONDS, RENEW_SECONDS = 2.0, 0.2
HALTED_STEP = 5  # of 12
# The renames to halt before, by the name of the target, and which one of that name.
RENAMES = {
    "checkpoint": (f"step-{HALTED_STEP:07d}", 1),
    "checkpoint's marker": ("complete", HALTED_STEP),
    "weights": ("adapter", 1),
    "model": ("model", 1),
    "result": ("training.json", 1),
    "scores": ("demo_science.json", 1),
    "end": ("status.json", 2),
}


def build_job(folder: Path, method: str) -> Job:
    """Return a job of twelve steps, with a checkpoint after each."""
    config = Config(model=ModelConfig(path="random://tiny"), output_dir=str(folder))
    config.data = DataConfig(path="package://finetune/demo/rows.jsonl", num_examples=16)
    config.training.max_length, config.training.batch_size, config.training.epochs = 400, 4, 3
    config.training.gradient_accumulation_steps, config.training.checkpoint_every = 1, 1
    config.optimizer.lr, config.lora.dropout = 0.02, 0.1
    config.evaluation.tasks, config.evaluation.limit = ["demo_science"], 4
    if method == "dora":
        config.lora.use_dora = True
    elif method == "full":
        config.peft.method, config.lora.dropout = "full", 0.0
    return Job(config, OmegaConf.to_yaml(OmegaConf.structured(config)), [], {})


def halt() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def halt_before_rename(name: str, number: int) -> None:
    """Halt between a check of the claim and the rename that it allows."""
    seen, replace = [], os.replace

    def replace_later(source: Any, target: Any) -> None:
        if Path(target).name == name:
            seen.append(target)
            if len(seen) == number:
                halt()
        replace(source, target)

    os.replace = replace_later  # type: ignore[assignment]


def halt_at_event(*, is_checked: bool) -> None:
    """Halt at a step's event, before its check of the claim or between the check and the line."""
    append = EventLog._append
    check: Callable[[Claim], None] = Claim.check

    def append_later(log: EventLog, event: dict[str, Any]) -> None:
        if event.get("key") != "train/loss" or event["step"] != HALTED_STEP:
            return append(log, event)
        if not is_checked:
            halt()
            return append(log, event)

        def check_and_halt(claim: Claim) -> None:
            check(claim)
            halt()

        Claim.check = check_and_halt  # type: ignore[method-assign, assignment]
        try:
            return append(log, event)
        finally:
            Claim.check = check  # type: ignore[method-assign, assignment]

    EventLog._append = append_later  # type: ignore[method-assign, assignment]


def main() -> None:
    folder, method, moment = sys.argv[1:]
    claims.LEASE_SECONDS, claims.RENEW_SECONDS = LEASE_SECONDS, RENEW_SECONDS
    if moment in RENAMES:
        halt_before_rename(*RENAMES[moment])
    else:
        halt_at_event(is_checked=moment == "checked event")
    print(*run_jobs.run([build_job(Path(folder), method)]))


if __name__ == "__main__":
    main()
