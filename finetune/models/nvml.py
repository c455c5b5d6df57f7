"""NVIDIA's driver, asked about one GPU: its energy, and its load at a moment (NVML)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

MIB = 2**20


class Gpu:
    """A GPU as the driver knows it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def energy_joules(self) -> float | None:
        """Return the energy used since the driver was loaded; None before Volta."""
        import pynvml

        with suppress(pynvml.NVMLError):
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        return None

    def load(self) -> dict[str, float]:
        """Return memory, utilisation and power now, by the names of MLflow's system metrics."""
        import pynvml

        values: dict[str, float] = {}
        with suppress(pynvml.NVMLError):
            memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
            values["gpu_0_memory_usage_megabytes"] = memory.used / MIB
            values["gpu_0_memory_usage_percentage"] = 100 * memory.used / memory.total
            busy = pynvml.nvmlDeviceGetUtilizationRates(self._handle)
            values["gpu_0_utilization_percentage"] = float(busy.gpu)
            watts = pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
            values["gpu_0_power_usage_watts"] = watts
        return values


def find_gpu(device: torch.device) -> Gpu | None:
    """Return the driver's view of a device; None for a CPU, and where the driver has no NVML."""
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return Gpu(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except (pynvml.NVMLError, AttributeError):  # AMD's cards; a part of a GPU
        return None
