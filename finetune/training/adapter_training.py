"""One LoRA adapter's training state: optimizer, schedule, position in its rows, checkpoints.

`multi_adapter` runs the forward and backward passes, for one adapter or several.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Trainer, get_scheduler

from finetune.config.schema import LoraConfig
from finetune.data.dataset import Examples
from finetune.data.token_rows import IGNORED, Example, example_lengths
from finetune.files import write_atomic
from finetune.models import adapters
from finetune.models.adapters import LoraWeights
from finetune.tracking.events import EventLog
from finetune.training.row_order import (
    num_steps,
    order_of_epoch,
    rows_of_step,
    steps_an_epoch,
    steps_between_validations,
)
from finetune.training.steps import (
    CheckpointTimer,
    Totals,
    TrainResult,
    build_result,
    find_kept,
    find_resume,
    record_size,
    record_step,
    record_validation,
    save_step,
)
from finetune.training.system_metrics import SystemMetrics
from finetune.training.trainer import Arguments
from finetune.training.validation import Validations

log = logging.getLogger("finetune")

STATE = "state.json"
LOWEST_SCALE = 1.0  # of fp16's losses; gradients that overflow with it have diverged


@dataclass(frozen=True)
class AdapterSpec:
    """One run's LoRA settings, training arguments, rows and event log."""

    lora: LoraConfig
    arguments: Arguments
    examples: Examples
    events: EventLog


class AdapterTraining:
    """One run's adapter, optimizer, schedule and position in its rows."""

    def __init__(self, base: PreTrainedModel, spec: AdapterSpec) -> None:
        self.spec = spec
        self.arguments = spec.arguments
        self.weights: LoraWeights = adapters.draw(base, spec.lora, self.arguments.seed)
        self.parameters = list(self.weights.tensors.values())
        # The matrices as they are multiplied, A and B by the layer's name.
        self.cast: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.num_steps = num_steps(len(spec.examples.train), self.arguments)
        self.optimizer = self._build_optimizer()
        # In fp16 each run has its own loss scale; without it nothing is scaled.
        self._scaler = torch.amp.GradScaler(base.device.type, enabled=self.arguments.fp16)
        self.scheduler = get_scheduler(
            self.arguments.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=self.arguments.get_warmup_steps(self.num_steps),
            num_training_steps=self.num_steps,
        )
        self.step = 0
        self.total_loss = 0.0  # over all steps
        self.last_loss: float | None = None  # of the last step taken here
        self.seconds = 0.0  # its share of the shared passes, and its optimizer steps
        self.num_tokens = 0
        self.validations = Validations(self.arguments.early_stopping)
        self._timer = CheckpointTimer(self.arguments.checkpoint_minutes)
        self._system = SystemMetrics(base.device)
        self._waiting: list[list[Example]] = []  # micro-batches of this step
        self._labels = 0  # in this step
        self._loss = 0.0  # of this step so far
        self._is_on_gpu = base.device.type == "cuda"
        # Tokens of the longest micro-batch, up to which a GPU gets several at once.
        self.longest = self._longest_batch() if self._is_on_gpu else 0
        self._resume()
        rows = spec.examples.train
        tokens = int(example_lengths(rows).sum())
        size = {"num_rows": len(rows), "num_tokens": tokens}
        record_size(spec.events, self.arguments, self.num_steps, **size)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer that the Trainer would."""
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(self.arguments)
        groups = [{"params": self.parameters, "weight_decay": self.arguments.weight_decay}]
        built: torch.optim.Optimizer = kind(groups, **settings)
        return built

    def _longest_batch(self) -> int:
        """Return the tokens of the longest micro-batch of all epochs."""
        lengths = example_lengths(self.spec.examples.train)
        starts = range(0, len(lengths), self.arguments.per_device_train_batch_size)
        num_epochs = math.ceil(self.num_steps / steps_an_epoch(len(lengths), self.arguments))
        orders = (order_of_epoch(e, len(lengths), self.arguments) for e in range(num_epochs))
        return max(int(np.add.reduceat(lengths[o.numpy()], starts).max()) for o in orders)

    @property
    def num_passes(self) -> int:
        """Return the number of micro-batches of the whole training, before any are joined."""
        return self.num_steps * self.arguments.gradient_accumulation_steps

    @property
    def is_done(self) -> bool:
        return self.step == self.num_steps or self.validations.stops

    @property
    def is_to_be_validated(self) -> bool:
        """Return whether the step just taken is one to validate at."""
        examples = self.spec.examples
        every = steps_between_validations(len(examples.train), self.arguments)
        is_due = self.step % every == 0 or self.step == self.num_steps
        return is_due and bool(examples.validation)

    @property
    def is_between_steps(self) -> bool:
        return not self._waiting

    def next_batch(self) -> tuple[list[Example], float, int]:
        """Return the next micro-batch, the weight of its labels, and a seed for its dropout."""
        if not self._waiting:
            rows = self.spec.examples.train
            batches = rows_of_step(self.step, len(rows), self.arguments)
            self._waiting = self._joined([[rows[row] for row in batch] for batch in batches])
            self._labels = sum(num_labels(e) for batch in self._waiting for e in batch)
        batch = self._waiting.pop(0)
        self.num_tokens += _tokens(batch)
        place = self.step * self.arguments.gradient_accumulation_steps + len(self._waiting)
        return batch, 1 / max(self._labels, 1), self.arguments.seed * 1_000_003 + place

    def _joined(self, batches: list[list[Example]]) -> list[list[Example]]:
        """Join micro-batches up to the tokens of the longest one, so that a GPU launches less."""
        if not self._is_on_gpu:
            return batches
        joined: list[list[Example]] = []
        for batch in batches:
            if joined and _tokens(joined[-1]) + _tokens(batch) <= self.longest:
                joined[-1] = joined[-1] + batch
            else:
                joined.append(batch)
        return joined

    def cast_matrices(self, dtype: torch.dtype) -> None:
        """Cast the matrices to the dtype of the products, in one fused copy."""
        layers = self.weights.layers
        originals = {name: (layer.a.detach(), layer.b.detach()) for name, layer in layers.items()}
        if dtype == torch.float32:
            self.cast = originals
            return
        if not self.cast:
            self.cast = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in originals.items()}
        cast, matrices = (
            [matrix for pair in pairs.values() for matrix in pair]
            for pairs in (self.cast, originals)
        )
        torch._foreach_copy_(cast, matrices)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to differentiate: in fp16 multiplied by the run's own loss scale."""
        scaled: torch.Tensor = self._scaler.scale(loss)
        return scaled

    def learn(self, loss: float) -> None:
        """Add the loss of a micro-batch; after the last one of a step, take the optimizer step.

        In fp16 a step whose gradients overflow is skipped and the loss scale halved, as the Trainer
        does.

        Raises:
            Diverged: the loss or the gradient's norm is not finite.
        """
        self._loss += loss
        if self._waiting:
            return
        self._scaler.unscale_(self.optimizer)
        bound = self.arguments.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, bound))
        rate = float(self.scheduler.get_last_lr()[0])
        self.step += 1
        logs = {"loss": self._loss, "grad_norm": norm, "learning_rate": rate}
        overflows = self._scaler.is_enabled() and not math.isfinite(norm)
        if overflows and self._scaler.get_scale() > LOWEST_SCALE:
            del logs["grad_norm"]
        record_step(self.spec.events, logs, self.step, self.num_steps)
        self._system.record(self.spec.events, self.step)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if not overflows:
            self.scheduler.step()
        # On a GPU recorded passes add to the gradients where they lie.
        self.optimizer.zero_grad(set_to_none=not self._is_on_gpu)
        self.total_loss += self._loss
        self.last_loss, self._loss = self._loss, 0.0

    def end_step(self, validation_loss: float | None) -> None:
        """Record the validation loss, if there is one; write the checkpoint that is due.

        The step of the lowest loss so far gets a checkpoint too, which is kept until a lower one.

        Raises:
            Diverged: the validation loss is not finite.
            OSError: the checkpoint cannot be written.
        """
        if validation_loss is not None:
            record_validation(self.spec.events, self.validations, validation_loss, self.step)
        is_due = self.step % self.arguments.save_steps == 0 or self._timer.is_due
        if not self.is_done and (is_due or self.step == self.validations.best_step):
            self.save_checkpoint()

    def keep_best(self) -> None:
        """With early stopping, load the weights of the lowest validation loss."""
        kept = find_kept(self.arguments, self.validations, self.step, self.num_steps)
        if kept is not None:
            adapters.load_weights(self.weights, kept)

    def result(self, device: torch.device, power_watts: float | None) -> TrainResult:
        totals = Totals(self.step, self.total_loss / self.step, self.num_tokens, self.seconds)
        num_trainable = sum(p.numel() for p in self.parameters)
        return build_result(
            totals, self.validations, device, num_trainable=num_trainable, power_watts=power_watts
        )

    def save_checkpoint(self) -> None:
        """Write all that a resume needs, atomically."""

        def fill(folder: Path) -> None:
            adapters.save_weights(self.weights, folder)
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            torch.save(self.scheduler.state_dict(), folder / "scheduler.pt")
            kept = {
                "total_loss": self.total_loss,
                "num_tokens": self.num_tokens,
                "validations": list(self.validations.losses.items()),
                "loss_scale": self._scaler.state_dict(),
            }
            write_atomic(folder / STATE, json.dumps(kept) + "\n")

        best = self.validations.best_step
        claim = self.spec.events.claim
        save_step(self.arguments, self.step, self.seconds, fill, best=best, claim=claim)
        self._timer.restart()

    def _resume(self) -> None:
        """Resume from the newest valid checkpoint, if there is one."""
        checkpoint = find_resume(self.arguments, self.spec.events)
        if checkpoint is None:
            return
        if not (checkpoint.path / STATE).is_file():
            log.warning("%s was written by the Trainer: training begins anew", checkpoint.path)
            return
        adapters.load_weights(self.weights, checkpoint.path)
        device = self.parameters[0].device
        for name, owner in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            path = checkpoint.path / f"{name}.pt"
            owner.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        kept = json.loads((checkpoint.path / STATE).read_text(encoding="utf-8"))
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        self.total_loss, self.num_tokens = kept["total_loss"], kept["num_tokens"]
        self.validations.losses = dict(kept["validations"])
        if kept.get("loss_scale"):
            self._scaler.load_state_dict(kept["loss_scale"])


def _tokens(batch: list[Example]) -> int:
    return sum(len(example["input_ids"]) for example in batch)


def num_labels(example: Example) -> int:
    return sum(label != IGNORED for label in example["labels"][1:])
