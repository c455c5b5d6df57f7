"""The speed of a training forecasts the next one on the same model and device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.inputs import Inputs
from finetune.config.schema import Config, DataConfig, LoraConfig, ModelConfig, TrainingConfig
from finetune.pipeline.identity import find_inputs
from finetune.pipeline.session import Session
from finetune.pipeline.training_speed import find_row_seconds, record_speed
from finetune.training.steps import TrainResult
from tests.conftest import write_rows

TRAINING = TrainingConfig(batch_size=4, gradient_accumulation_steps=2, max_length=400)


def build(path: Path, **changes: Any) -> tuple[Config, Inputs]:
    config = Config(
        model=ModelConfig(path="random://tiny"), data=DataConfig(path=str(path)), training=TRAINING
    )
    config.evaluation.tasks = []
    config = replace(config, **changes)
    return config, find_inputs(config, Session())


def result(steps: int, seconds: float) -> TrainResult:
    return TrainResult(steps, 1.0, None, seconds, 1.0, 1.0, 1, "padding-free")


def test_a_row_takes_as_long_as_in_the_last_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rank and the batch; on other rows about; with another method it is not known."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    rows: list[object] = [{"instruction": "a", "response": str(number)} for number in range(4)]
    one, other = (write_rows(tmp_path / f"{name}.jsonl", [*rows, name]) for name in ("a", "b"))
    trained = build(write_rows(one, rows))
    assert find_row_seconds(*trained) is None
    record_speed(*trained, result(steps=10, seconds=160.0))
    assert find_row_seconds(*trained) == 2.0
    assert find_row_seconds(*build(one, lora=LoraConfig(r=2))) == 2.0
    smaller = replace(TRAINING, batch_size=1, max_steps=3)
    assert find_row_seconds(*build(one, training=smaller)) == 2.0
    slower = replace(TRAINING, gradient_checkpointing=True)
    assert find_row_seconds(*build(one, training=slower)) is None
    second = build(write_rows(other, [*rows, *rows]))
    assert find_row_seconds(*second) == 2.0
    record_speed(*second, result(steps=10, seconds=40.0))
    assert [find_row_seconds(*found) for found in (trained, second)] == [2.0, 0.5]
