"""What every training does around its steps: record and show them, stop, tell what it took."""

from __future__ import annotations

import ctypes
import logging
import math
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    IntervalStrategy,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from finetune import distributed
from finetune.checkpoints import Checkpoint, find_step
from finetune.events import EventLog
from finetune.signals import STOP_SIGNALS, StopHandler
from finetune.validation import Validations

log = logging.getLogger("finetune")


class Diverged(ArithmeticError):
    """A loss or gradient that is not finite; training on would be worthless."""


class StepWatch(TrainerCallback):
    """Record every step, show the progress, and stop a training that has diverged."""

    def __init__(
        self,
        events: EventLog,
        signals: StopSignals,
        validations: Validations,
        *,
        num_rows: int,
        num_tokens: int,
    ) -> None:
        self.num_tokens = num_tokens  # of one epoch
        self._num_rows = num_rows
        self._validations = validations
        self._signals = signals
        self._events = events
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        done, total = state.global_step, state.max_steps
        for entry in state.log_history:  # of a training that is resumed
            if "eval_loss" in entry:
                self._validations.losses[int(entry["step"])] = entry["eval_loss"]
        record_size(self._events, args, total, num_rows=self._num_rows, num_tokens=self.num_tokens)
        self._bar = tqdm(desc="train", initial=done, total=total, unit="step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._signals.is_stop_agreed():
            control.should_save = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        logs: dict[str, float] = given["logs"]
        if "loss" not in logs:
            return
        if _lowers_loss_scale(given["optimizer"]):
            logs = {name: value for name, value in logs.items() if name != "grad_norm"}
        record_step(self._events, logs, state.global_step, state.max_steps)
        assert self._bar is not None
        self._bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
        self._bar.update(state.global_step - self._bar.n)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        found, step = self._validations, state.global_step
        record_validation(self._events, found, given["metrics"]["eval_loss"], step)
        state.best_global_step = found.best_step
        if found.stops:  # a checkpoint of now would be gone on from
            control.should_training_stop, control.should_save = True, False
        elif found.best_step == step:
            control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._bar is not None
        self._bar.close()


def _lowers_loss_scale(optimizer: Any) -> bool:
    """Return whether fp16 gradients overflowed: the step was skipped, a lower scale comes next."""
    scaler = getattr(optimizer, "scaler", None)  # accelerate's; None outside fp16
    return scaler is not None and optimizer.step_was_skipped and scaler.get_scale() >= 1


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
    told = {ours: logs[theirs] for theirs, ours in names.items() if theirs in logs}
    events.metrics(told, step)


def record_validation(events: EventLog, found: Validations, loss: float, step: int) -> None:
    """Record a validation loss.

    Raises:
        Diverged: it is not finite.
    """
    if not math.isfinite(loss):
        raise Diverged(f"validation loss became {loss} at step {step}")
    found.losses[step] = loss
    events.metrics({"validation/loss": loss}, step)


def find_kept(folder: Path, found: Validations, step: int, num_steps: int) -> Path | None:
    """Return the checkpoint of a better adapter than the last one's, if there is one; log it.

    Args:
        folder: the run's checkpoints.
        found: the training's validation losses.
        step: at which it has ended.
        num_steps: that it would have taken at most.

    Raises:
        OSError: the checkpoint is not whole.
    """
    if found.best_step is None or found.best_step == step:
        return None
    log.info("%s: %s", folder.parent.name, found.verdict(step, num_steps))
    return find_step(folder, found.best_step)


def rows_a_step(arguments: TrainingArguments) -> int:
    batches: int = arguments.gradient_accumulation_steps * arguments.world_size
    return arguments.per_device_train_batch_size * batches


def steps_an_epoch(num_rows: int, arguments: TrainingArguments) -> int:
    return math.ceil(num_rows / rows_a_step(arguments))


def steps_between_validations(num_rows: int, arguments: TrainingArguments) -> int:
    """Return them as `training.validate_every` says, or those of an epoch."""
    if arguments.eval_strategy == IntervalStrategy.STEPS and arguments.eval_steps is not None:
        return int(arguments.eval_steps)
    return steps_an_epoch(num_rows, arguments)


def log_resume(checkpoint: Checkpoint) -> None:
    log.info("resuming at step %d", checkpoint.step)


class StopSignals:
    """Let the first request to stop end a training after its step, the second one at once."""

    def __init__(self) -> None:
        self.request: KeyboardInterrupt | None = None
        self._handlers: dict[int, StopHandler] = {}

    @property
    def stop_requested(self) -> bool:
        return self.request is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take the process' stop signals until the end; those that it ignores stay ignored."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        taken = [number for number in STOP_SIGNALS if before[number] != signal.SIG_IGN]
        other = StopHandler()  # where another launcher's process has none of ours
        for number in taken:
            handler = before[number]
            self._handlers[number] = handler if isinstance(handler, StopHandler) else other
            signal.signal(number, self._stop)
        try:
            yield
        finally:
            for number in taken:
                signal.signal(number, before[number])

    def is_stop_agreed(self) -> bool:
        """Return whether to stop, in all processes after the same step."""
        if any(distributed.from_all(self.stop_requested)):
            self.request = self.request or KeyboardInterrupt()
            return True
        return False

    def _stop(self, number: int, frame: object) -> None:
        try:
            self._handlers[number](number, frame)
        except KeyboardInterrupt as request:
            if self.request is not None:
                raise
            self.request = request


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure the peak anew, where the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (counters := Path("/proc/self/clear_refs")).exists():
        with suppress(OSError):
            counters.write_text("5", encoding="ascii")  # sets VmHWM to what is held now


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak since the reset: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the process was before it was this program
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def return_freed_memory() -> None:
    """Let glibc hand back what is freed, for who trades time for memory: less by half, +15 % time.

    By itself it raises the size from which it does so as blocks are freed, and keeps the rest.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, bytes
