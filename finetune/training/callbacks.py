"""A TrainerCallback that records steps, shows progress and stops, as our own loop does."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune import distributed
from finetune.signals import StopSignals
from finetune.tracking.events import EventLog
from finetune.training.steps import (
    CheckpointTimer,
    advance,
    open_bar,
    record_size,
    record_step,
    record_validation,
)
from finetune.training.system_metrics import SystemMetrics
from finetune.training.validation import Validations


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
        checkpoint_minutes: float | None = None,
    ) -> None:
        self.num_tokens = num_tokens  # of one epoch
        self._num_rows = num_rows
        self._validations = validations
        self._signals = signals
        self._events = events
        self._bar: tqdm[Any] | None = None
        self._system: SystemMetrics | None = None
        self._has_timer = checkpoint_minutes is not None
        self._timer = CheckpointTimer(checkpoint_minutes)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        done, total = state.global_step, state.max_steps
        for entry in state.log_history:  # of a training that is resumed
            if "eval_loss" in entry:
                self._validations.losses[int(entry["step"])] = entry["eval_loss"]
        record_size(self._events, args, total, num_rows=self._num_rows, num_tokens=self.num_tokens)
        self._bar = open_bar(1, done, total)
        self._timer.restart()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if is_stop_agreed(self._signals):
            control.should_save = control.should_training_stop = True
        if self._has_timer and distributed.from_main(lambda: self._timer.is_due):
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._timer.restart()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **settings: Any
    ) -> None:
        logs: dict[str, float] = settings["logs"]
        if "loss" not in logs:
            return
        if _lowers_loss_scale(settings["optimizer"]):
            logs = {name: value for name, value in logs.items() if name != "grad_norm"}
        record_step(self._events, logs, state.global_step, state.max_steps)
        if self._system is None:
            self._system = SystemMetrics(args.device)
        self._system.record(self._events, state.global_step)
        assert self._bar is not None
        advance(self._bar, state.global_step - self._bar.n, [logs["loss"]])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **settings: Any
    ) -> None:
        validations, step = self._validations, state.global_step
        record_validation(self._events, validations, settings["metrics"]["eval_loss"], step)
        state.best_global_step = validations.best_step
        if validations.stops:  # a checkpoint saved now would be resumed from
            control.should_training_stop, control.should_save = True, False
        elif validations.best_step == step:
            control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._bar is not None
        self._bar.close()


def _lowers_loss_scale(optimizer: Any) -> bool:
    """Return whether fp16 gradients overflowed: the step is skipped, the loss scale lowered."""
    scaler = getattr(optimizer, "scaler", None)  # accelerate's; None outside fp16
    return scaler is not None and optimizer.step_was_skipped and scaler.get_scale() >= 1


def is_stop_agreed(signals: StopSignals) -> bool:
    """Return whether any rank was asked to stop, so that all stop after the same step."""
    if any(distributed.from_all(signals.stop_requested)):
        signals.request = signals.request or KeyboardInterrupt()
        return True
    return False
