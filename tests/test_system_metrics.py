"""The machine's load, sampled at a training's steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from finetune.tracking.events import EventLog, read_events
from finetune.training import system_metrics
from finetune.training.system_metrics import SystemMetrics
from tests.nvml_driver import CUDA, play_driver

CPU = torch.device("cpu")


def recorded(path: Path) -> list[tuple[str, int]]:
    return [(event["key"], event["step"]) for event in read_events(path)]


def test_a_short_training_has_a_sample(tmp_path: Path) -> None:
    """At its first step; the next one comes when some seconds have passed."""
    events = EventLog(tmp_path / "events.jsonl")
    metrics = SystemMetrics(CPU)
    for step in (1, 2, 3):
        metrics.record(events, step)
    events.close()
    found = recorded(events_path := tmp_path / "events.jsonl")
    assert {step for _, step in found} == {1}
    names = {key for key, _ in found}
    assert {
        "system/system_memory_usage_megabytes", "system/system_memory_usage_percentage",
        "system/process_memory_usage_megabytes",
    } <= names  # fmt: skip
    assert all(math.isfinite(e["value"]) and e["value"] >= 0 for e in read_events(events_path))


def test_samples_are_taken_again_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the steps of the training, so that they stand beside its loss."""
    monkeypatch.setattr(system_metrics, "SAMPLE_SECONDS", 0.0)
    events = EventLog(tmp_path / "events.jsonl")
    metrics = SystemMetrics(CPU)
    for step in (1, 2):
        metrics.record(events, step)
    events.close()
    assert {step for _, step in recorded(tmp_path / "events.jsonl")} == {1, 2}


def test_two_runs_that_train_together_have_their_own_samples(tmp_path: Path) -> None:
    """The CPU's load is of the time since a sampler's last sample, not since anybody's."""
    one, other = SystemMetrics(CPU), SystemMetrics(CPU)
    monkey = one._sample_machine(), other._sample_machine()
    assert all(0 <= values.get("cpu_utilization_percentage", 0) <= 100 for values in monkey)


def test_the_runs_own_gpu_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its UUID: torch counts only the GPUs that are visible to it."""
    asked = play_driver(monkeypatch)
    events = EventLog(tmp_path / "events.jsonl")
    SystemMetrics(CUDA).record(events, 1)
    events.close()
    assert asked == ["GPU-ab-cd"]
    values = {event["key"]: event["value"] for event in read_events(tmp_path / "events.jsonl")}
    assert {name: value for name, value in values.items() if "gpu" in name} == {
        "system/gpu_0_memory_usage_megabytes": 1024.0,
        "system/gpu_0_memory_usage_percentage": 25.0,
        "system/gpu_0_utilization_percentage": 97.0,
        "system/gpu_0_power_usage_watts": 250.0,
    }
