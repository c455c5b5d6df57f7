"""Row order: of an epoch, of an optimizer step, and across the ranks of a launcher.

Steps are counted and rows ordered as the Trainer does it. Accelerate distributes batches to ranks
in turn. By default (1.15) it would fill an epoch's last batches with rows that the epoch has had,
and order a resumed epoch as the first one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import (
    IntervalStrategy,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from finetune.data.token_rows import IGNORED, Example


def rows_a_step(arguments: TrainingArguments) -> int:
    batches: int = arguments.gradient_accumulation_steps * arguments.world_size
    return arguments.per_device_train_batch_size * batches


def steps_an_epoch(num_rows: int, arguments: TrainingArguments) -> int:
    return math.ceil(num_rows / rows_a_step(arguments))


def steps_between_validations(num_rows: int, arguments: TrainingArguments) -> int:
    """Return `training.validate_every`, or by default the steps of an epoch."""
    if arguments.eval_strategy == IntervalStrategy.STEPS and arguments.eval_steps is not None:
        return int(arguments.eval_steps)
    return steps_an_epoch(num_rows, arguments)


def num_steps(num_rows: int, arguments: TrainingArguments) -> int:
    """Return the optimizer steps of a training, counted as the Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    return math.ceil(arguments.num_train_epochs * steps_an_epoch(num_rows, arguments))


def order_of_epoch(epoch: int, num_rows: int, arguments: TrainingArguments) -> torch.Tensor:
    """Return the indices of all rows in an epoch's order, [row], as accelerate shuffles them."""
    draw = torch.Generator().manual_seed((arguments.data_seed or 0) + epoch)
    return torch.randperm(num_rows, generator=draw)


def rows_of_step(step: int, num_rows: int, arguments: TrainingArguments) -> list[list[int]]:
    """Return the rows of a step's micro-batches."""
    epoch, place = divmod(step, steps_an_epoch(num_rows, arguments))
    size = rows_a_step(arguments)
    rows = order_of_epoch(epoch, num_rows, arguments)[place * size : (place + 1) * size].tolist()
    batch = arguments.per_device_train_batch_size
    return [rows[start : start + batch] for start in range(0, len(rows), batch)]


def with_filler(rows: Sequence[Example]) -> list[Example]:
    """Return the rows and a last one without labels, which fills batches and adds no loss."""
    return [*rows, _filler(rows)]


def filled_up(rows: Sequence[Example], together: int) -> list[Example]:
    """Return the rows, filled up with rows without labels to full batches on all ranks."""
    return [*rows, *[_filler(rows)] * (-len(rows) % together)]


def _filler(rows: Sequence[Example]) -> Example:
    shortest = min((row["input_ids"] for row in rows), key=len)
    filler = Example(input_ids=shortest, labels=[IGNORED] * len(shortest))
    if "seq_lengths" in rows[0]:
        filler["seq_lengths"] = [len(shortest)]
    return filler


class EvenOrder(Sampler[int], TrainerCallback):
    """The Trainer's sampler of an epoch's rows, filled up to full batches on all ranks."""

    def __init__(self, num_rows: int, arguments: TrainingArguments) -> None:
        self._num_rows = num_rows  # also the filler's index
        together: int = arguments.per_device_train_batch_size * arguments.world_size
        is_shared = arguments.world_size > 1
        self._length = math.ceil(num_rows / together) * together if is_shared else num_rows
        self._arguments = arguments
        self._epoch = 0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._epoch = int(state.epoch or 0)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        yield from order_of_epoch(self._epoch, self._num_rows, self._arguments).tolist()
        yield from [self._num_rows] * (self._length - self._num_rows)
