"""The mean power of a GPU, by a driver that is played; without one it is unknown."""

from __future__ import annotations

import time

import pytest
import torch

from finetune.models.gpu_power import PowerMeter
from tests.nvml_driver import CUDA, play_driver


def test_the_mean_power_is_energy_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter is in millijoules; the GPU is asked for by its UUID."""
    asked = play_driver(monkeypatch, [5000.0, 6500.0])
    clock = iter((10.0, 15.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert PowerMeter(CUDA).mean_watts() == 300.0
    assert asked == ["GPU-ab-cd"]


def test_a_card_without_a_counter_has_no_known_power(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before Volta."""
    play_driver(monkeypatch)
    assert PowerMeter(CUDA).mean_watts() is None


def test_without_a_driver_or_a_gpu_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has none; of several processes each sees one GPU only."""
    assert PowerMeter(torch.device("cpu")).mean_watts() is None
    assert PowerMeter(CUDA).mean_watts() is None  # the real NVML, without a driver
    play_driver(monkeypatch, [1.0])
    monkeypatch.setattr("finetune.distributed.num_processes", lambda: 2)
    assert PowerMeter(CUDA).mean_watts() is None
