"""What every training does around its steps: record and show them, stop, tell what it took."""

from __future__ import annotations

import ctypes
import logging
import math
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune import distributed
from finetune.checkpoints import Checkpoint
from finetune.run_folder import EventLog

log = logging.getLogger("finetune")


class Diverged(ArithmeticError):
    """A loss or gradient that is not finite; training on would be worthless."""


class StepWatch(TrainerCallback):
    """Record every step, show the progress, and stop a training that has diverged."""

    def __init__(self, events: EventLog, signals: StopSignals, num_tokens: int) -> None:
        self.num_tokens = num_tokens  # of one epoch
        self.validation_loss: float | None = None
        self._signals = signals
        self._events = events
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        done, total = state.global_step, state.max_steps
        self._events.tag("train.max_steps", str(total))
        self._events.tag("train.num_tokens", str(round(self.num_tokens * args.num_train_epochs)))
        self._bar = tqdm(desc="train", initial=done, total=total, unit="step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._bar is not None
        self._bar.update(state.global_step - self._bar.n)
        if self._signals.is_stop_agreed():
            control.should_save = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        logs: dict[str, float] = given["logs"]
        step = state.global_step
        if "eval_loss" in logs:
            self.validation_loss = logs["eval_loss"]
            self._events.metrics({"validation/loss": logs["eval_loss"]}, step)
        if "loss" not in logs:
            return
        record_step(self._events, logs, step, state.max_steps)
        assert self._bar is not None
        self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._bar is not None
        self._bar.close()


def record_step(events: EventLog, logs: Mapping[str, float], step: int, max_steps: int) -> None:
    """Record a step's loss, gradient norm (before clipping) and learning rate.

    Raises:
        Diverged: the loss or the norm is not finite.
    """
    for name in ("loss", "grad_norm"):
        if not math.isfinite(logs[name]):
            raise Diverged(f"{name} became {logs[name]} at step {step} of {max_steps}")
    names = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/lr"}
    events.metrics({ours: logs[theirs] for theirs, ours in names.items()}, step)


def log_resume(checkpoint: Checkpoint) -> None:
    log.info("resuming at step %d", checkpoint.step)


class StopSignals:
    """Let the first SIGINT or SIGTERM end a training after its step, the second one at once."""

    def __init__(self) -> None:
        self.stop_requested = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._stop) for number in kinds}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def is_stop_agreed(self) -> bool:
        """Return whether to stop, in all processes after the same step."""
        if any(distributed.from_all(self.stop_requested)):
            self.stop_requested = True
            return True
        return False

    def _stop(self, number: int, frame: object) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far: of the GPU's allocator, or of this process on a CPU."""
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
