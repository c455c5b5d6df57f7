"""What tests of training share: rows, settings, and a group trained on the tiny model."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from finetune.config.schema import LoraConfig, ModelConfig, OptimizerConfig, TrainingConfig
from finetune.data.dataset import Examples
from finetune.data.row_counts import RowCounts
from finetune.data.token_rows import Example
from finetune.models.adapters import LoraWeights
from finetune.models.base_model import find_model, load_base
from finetune.models.precision import Precision
from finetune.tracking.events import EventLog, read_events
from finetune.tracking.run_folder import RunFolder
from finetune.training import trainer
from finetune.training.adapter_training import AdapterSpec
from finetune.training.multi_adapter import Outcome, train_together

TINY = ModelConfig(path="random://tiny")
CPU = Precision(torch.device("cpu"), torch.float32)


def random_examples(count: int, shortest: int = 7, seed: int = 3) -> list[Example]:
    """Rows of different lengths, the first half of each masked."""
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        ids = torch.randint(3, 250, (shortest + 5 * (i % 7),), generator=draw).tolist()
        masked = len(ids) // 2
        examples.append(Example(input_ids=ids, labels=[-100] * masked + ids[masked:]))
    return examples


@dataclass(frozen=True)
class Setting:
    """What a run of these tests sets."""

    lora: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    validation: int = 0


def load(model: ModelConfig = TINY, device: str = "cpu") -> PreTrainedModel:
    return load_base(model, find_model(model), torch.device(device))


def spec(run: RunFolder, setting: Setting, precision: Precision = CPU) -> AdapterSpec:
    shared = {"batch_size": 4, "gradient_accumulation_steps": 2, "data_seed": 42}
    arguments = trainer.build_arguments(
        run,
        OptimizerConfig(**{"weight_decay": 0.01, **setting.optimizer}),
        TrainingConfig(**{**shared, **setting.training}),
        precision,
        validate=bool(setting.validation),
    )
    lora = LoraConfig(**{"r": 4, **setting.lora})
    examples = Examples(random_examples(38), random_examples(setting.validation), RowCounts())
    return AdapterSpec(lora, arguments, examples, EventLog(run.events))


def train(
    folder: Path,
    group: Sequence[Setting],
    base: PreTrainedModel | None = None,
    precision: Precision = CPU,
) -> dict[int, tuple[dict[str, torch.Tensor], Outcome]]:
    """Train a group, and return each run's adapter and outcome."""
    runs = [RunFolder(folder / str(number)) for number in range(len(group))]
    specs = [spec(run, setting, precision) for run, setting in zip(runs, group, strict=True)]
    ended = train_together(base or load(), specs, precision)
    found = {number: (copied(weights), outcome) for number, weights, outcome in ended}
    for one in specs:
        one.events.close()
    return found


class Killed(BaseException):
    """Stands for kill -9: nothing that a training does catches it."""


def broken_off(one: AdapterSpec, key: str, last: int, how: str) -> AdapterSpec:
    """Let a run end when it is about to record a metric of a step."""
    record = one.events.metrics

    def metrics(values: Mapping[str, float], step: int) -> None:
        if key in values and step == last:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        record(values, step)

    one.events.metrics = metrics  # type: ignore[method-assign]
    return one


def copied(weights: LoraWeights | None) -> dict[str, torch.Tensor]:
    assert weights is not None
    return {name: tensor.detach().clone() for name, tensor in weights.tensors.items()}


def losses(folder: Path, key: str = "train/loss") -> list[float]:
    return [e["value"] for e in read_events(folder / "events.jsonl") if e.get("key") == key]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
