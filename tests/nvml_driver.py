"""A driver of NVIDIA's that is played: what pynvml would answer."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

CUDA = torch.device("cuda", 0)


class NVMLError(Exception):
    """As pynvml's."""


def play_driver(monkeypatch: pytest.MonkeyPatch, joules: list[float] | None = None) -> list[str]:
    """Replace NVML by one whose energy counter has these values in turn; return what is asked for.

    None is a card without that counter.
    """
    asked: list[str] = []

    def find(uuid: str) -> str:
        asked.append(uuid)
        return "handle"

    def read_energy(_: Any) -> int:
        if joules is None:
            raise NVMLError("Not Supported")
        return int(joules.pop(0) * 1000)

    driver = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=find,
        nvmlDeviceGetTotalEnergyConsumption=read_energy,
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=2**30, total=2**32),
        nvmlDeviceGetUtilizationRates=lambda _: SimpleNamespace(gpu=97),
        nvmlDeviceGetPowerUsage=lambda _: 250_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    properties = SimpleNamespace(uuid="ab-cd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return asked
