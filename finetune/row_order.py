"""The rows of a training that several processes share: those of one process, in its order.

accelerate deals the batches out in turn. Left alone it would fill up an epoch's last batches with
rows that were had already, and forget the epoch where a resume skips batches (1.15).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.token_rows import IGNORED, Example


def with_filler(rows: Sequence[Example]) -> list[Example]:
    """Return the rows and, behind them, one without labels: it fills a batch and weighs nothing."""
    return [*rows, _filler(rows)]


def filled_up(rows: Sequence[Example], together: int) -> list[Example]:
    """Return the rows with as many without labels behind them as make full batches for all."""
    return [*rows, *[_filler(rows)] * (-len(rows) % together)]


def _filler(rows: Sequence[Example]) -> Example:
    shortest = min((row["input_ids"] for row in rows), key=len)
    filler = Example(input_ids=shortest, labels=[IGNORED] * len(shortest))
    if "seq_lengths" in rows[0]:
        filler["seq_lengths"] = [len(shortest)]
    return filler


class EvenOrder(Sampler[int], TrainerCallback):
    """The places of an epoch's rows, in the Trainer's own order, filled up for all processes."""

    def __init__(self, num_rows: int, arguments: TrainingArguments) -> None:
        self._num_rows = num_rows  # the filler's place is behind them
        together: int = arguments.per_device_train_batch_size * arguments.world_size
        self._length = math.ceil(num_rows / together) * together
        self._seed = arguments.data_seed or 0
        self._epoch = 0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._epoch = int(state.epoch or 0)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self._seed + self._epoch)
        yield from torch.randperm(self._num_rows, generator=draw).tolist()
        yield from [self._num_rows] * (self._length - self._num_rows)
