"""The mean power of a GPU, by a driver that is played; without one it is unknown."""

from __future__ import annotations

import ctypes
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.models import gpu_power
from finetune.models.gpu_power import PowerMeter, read_energy_joules

CUDA = torch.device("cuda", 0)


def play_driver(monkeypatch: pytest.MonkeyPatch, joules: list[float], error: int = 0) -> None:
    """Replace NVML by one whose counter has these values, one after the other."""

    def find(uuid: bytes, handle: Any) -> int:
        assert uuid == b"GPU-0123"
        return 0

    def read(handle: Any, found: Any) -> int:
        found._obj.value = int(joules.pop(0) * 1000)
        return error

    nvml = SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByUUID=find,
        nvmlDeviceGetTotalEnergyConsumption=read,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    properties = SimpleNamespace(uuid="0123")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_the_mean_power_is_energy_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter is in millijoules."""
    play_driver(monkeypatch, [5000.0, 6500.0])
    clock = iter((10.0, 15.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert PowerMeter(CUDA).mean_watts() == 300.0


def test_a_card_without_a_counter_has_no_known_power(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML answers 3, not supported, on those before Volta."""
    play_driver(monkeypatch, [1.0, 2.0], error=3)
    assert PowerMeter(CUDA).mean_watts() is None


def test_without_a_driver_or_a_gpu_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is missing; a CPU has none; of several processes each sees one GPU only."""
    monkeypatch.setattr(gpu_power, "LIBRARY", "no-such-library.so")
    assert read_energy_joules(CUDA) is None
    assert PowerMeter(torch.device("cpu")).mean_watts() is None
    play_driver(monkeypatch, [1.0])
    monkeypatch.setattr("finetune.distributed.num_processes", lambda: 2)
    assert read_energy_joules(CUDA) is None
