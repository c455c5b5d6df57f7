"""Steps of both training loops: record, show progress, checkpoint, resume, build the result."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainingArguments

from finetune import distributed
from finetune.files import remove_leftovers
from finetune.models.process_memory import peak_memory_gib
from finetune.tracking.claims import Claim
from finetune.tracking.events import EventLog
from finetune.training.checkpoints import (
    Checkpoint,
    find_newest,
    find_step,
    write_checkpoint,
)
from finetune.training.row_order import steps_an_epoch
from finetune.training.validation import Validations

log = logging.getLogger("finetune")
PADDING_FREE = "padding-free"  # the layout of batches of concatenated sequences


class Diverged(ArithmeticError):
    """A loss or gradient that is not finite; training on would be worthless."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a training; times are seconds."""

    steps: int
    mean_loss: float  # over all steps
    validation_loss: float | None  # of the adapter that is kept
    train_seconds: float
    tokens_per_second: float  # real tokens, each as often as it was trained on
    peak_memory_gib: float  # of the process on a CPU, of the allocator on a GPU
    num_trainable_parameters: int
    layout: str  # of a batch's sequences: padding-free, or padded and why
    best_step: int | None = None  # whose adapter is kept; None: the last one's
    power_watts: float | None = None  # mean of the GPU while training; None where unknown


@dataclass(frozen=True)
class Totals:
    """The totals of a training loop at its end, resumes included."""

    steps: int
    mean_loss: float  # over all steps
    num_tokens: int | float  # real ones, each as often as it was trained on
    seconds: float


def build_result(
    totals: Totals,
    validations: Validations,
    device: torch.device,
    *,
    num_trainable: int,
    layout: str = PADDING_FREE,
    power_watts: float | None = None,
) -> TrainResult:
    """Build the result of a training from its totals."""
    return TrainResult(
        steps=totals.steps,
        mean_loss=totals.mean_loss,
        validation_loss=validations.kept_loss,
        train_seconds=totals.seconds,
        tokens_per_second=totals.num_tokens / totals.seconds,
        peak_memory_gib=peak_memory_gib(device),
        num_trainable_parameters=num_trainable,
        layout=layout,
        best_step=validations.best_step,
        power_watts=power_watts,
    )


def open_bar(num_adapters: int, done: int, total: int) -> tqdm[Any]:
    """Return a progress bar of optimizer steps, summed over adapters that are trained together."""
    name = "train" if num_adapters == 1 else f"train {num_adapters} adapters"
    return tqdm(desc=name, initial=done, total=total, unit="step")


def advance(bar: tqdm[Any], num_steps: int, losses: Sequence[float]) -> None:
    """Show steps that were taken, and the newest loss of each adapter."""
    if losses:
        shown = " ".join(f"{loss:.3f}" for loss in losses)
        bar.set_postfix_str(f"loss {shown}", refresh=False)
    bar.update(num_steps)


def record_size(
    events: EventLog,
    arguments: TrainingArguments,
    num_steps: int,
    *,
    num_rows: int,
    num_tokens: int,
) -> None:
    """Record a training's steps and the tokens it will read; rows and tokens are an epoch's."""
    events.tag("train.max_steps", str(num_steps))
    epochs = num_steps / steps_an_epoch(num_rows, arguments)
    events.tag("train.num_tokens", str(round(num_tokens * epochs)))


def record_step(events: EventLog, logs: Mapping[str, float], step: int, max_steps: int) -> None:
    """Record a step's loss, gradient norm (before clipping; if it has one) and learning rate.

    Raises:
        Diverged: the loss or the norm is not finite.
    """
    for name in ("loss", "grad_norm"):
        if not math.isfinite(logs.get(name, 0.0)):
            raise Diverged(f"{name} became {logs[name]} at step {step} of {max_steps}")
    names = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/lr"}
    metrics = {ours: logs[theirs] for theirs, ours in names.items() if theirs in logs}
    events.metrics(metrics, step)


def record_validation(events: EventLog, validations: Validations, loss: float, step: int) -> None:
    """Record a validation loss.

    Raises:
        Diverged: it is not finite.
    """
    if not math.isfinite(loss):
        raise Diverged(f"validation loss became {loss} at step {step}")
    validations.losses[step] = loss
    events.metrics({"validation/loss": loss}, step)


def find_kept(
    arguments: TrainingArguments, validations: Validations, step: int, num_steps: int
) -> Path | None:
    """Return the checkpoint of a better adapter than the last one's, if there is one; log it.

    Args:
        arguments: of the training; they name the folder of its checkpoints.
        validations: the training's validation losses.
        step: at which it has ended.
        num_steps: that it would have taken at most.

    Raises:
        OSError: the checkpoint is damaged.
    """
    if validations.best_step is None or validations.best_step == step:
        return None
    folder = Path(str(arguments.output_dir))
    log.info("%s: %s", folder.parent.name, validations.verdict(step, num_steps))
    return find_step(folder, validations.best_step)


class CheckpointTimer:
    """The time since the last checkpoint, for `training.checkpoint_minutes`."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds = math.inf if minutes is None else minutes * 60
        self.restart()

    def restart(self) -> None:
        self._started = time.monotonic()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._started >= self._seconds


def find_resume(arguments: TrainingArguments, events: EventLog) -> Checkpoint | None:
    """Return the newest valid checkpoint to resume from, on every rank, and log it.

    What an earlier holder of the run has not put in place yet is removed first.
    """
    folder = Path(str(arguments.output_dir))

    def find() -> Checkpoint | None:
        events.check_claim()
        remove_leftovers(folder)
        return find_newest(folder, events.claims)

    checkpoint = distributed.from_main(find)
    if checkpoint is not None:
        log.info("resuming at step %d", checkpoint.step)
    return checkpoint


def save_step(
    arguments: TrainingArguments,
    step: int,
    seconds: float,
    fill: Callable[[Path], None],
    *,
    best: int | None,
    claim: Claim | None,
) -> None:
    """Write the checkpoint of a step as the settings say; see `checkpoints.write_checkpoint`."""
    folder, keep = Path(str(arguments.output_dir)), arguments.save_total_limit or 1
    write_checkpoint(folder, step, seconds, fill, keep=keep, best=best, claim=claim)
