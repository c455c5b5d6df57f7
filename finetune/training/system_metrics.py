"""Record the machine's load while a run is trained: CPU, memory, and the GPU where there is one.

The metrics have the names of MLflow's own system metrics, so that its page of them shows these.
A GPU's load is known where nvidia-ml-py is installed.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import psutil
import torch

from finetune.tracking.events import EventLog

SAMPLE_SECONDS = 15.0  # between two samples
MIB = 2**20


class SystemMetrics:
    """Samples a machine's load at steps of a training; `gpu` is NVML's handle, if there is one."""

    def __init__(self, device: torch.device) -> None:
        self._due = 0.0  # by the monotonic clock
        self._cpu = _cpu_seconds()
        self._gpu = _find_gpu(device)
        self._process = psutil.Process()

    def record(self, events: EventLog, step: int) -> None:
        """Record a sample at a step, where the last one is old enough."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + SAMPLE_SECONDS
        values = {**self._sample_machine(), **self._sample_gpu()}
        events.metrics({f"system/{name}": value for name, value in values.items()}, step)

    def _sample_machine(self) -> dict[str, float]:
        """Return the load of CPU and memory; a CPU's is the mean since the last sample."""
        before, self._cpu = self._cpu, _cpu_seconds()
        busy, total = (new - old for new, old in zip(self._cpu, before, strict=True))
        memory = psutil.virtual_memory()
        values = {
            "system_memory_usage_megabytes": memory.used / MIB,
            "system_memory_usage_percentage": memory.percent,
        }
        with suppress(psutil.Error):
            values["process_memory_usage_megabytes"] = self._process.memory_info().rss / MIB
        if total > 0:
            values["cpu_utilization_percentage"] = 100 * busy / total
        return values

    def _sample_gpu(self) -> dict[str, float]:
        if self._gpu is None:
            return {}
        import pynvml

        values: dict[str, float] = {}
        with suppress(pynvml.NVMLError):
            memory = pynvml.nvmlDeviceGetMemoryInfo(self._gpu)
            values["gpu_0_memory_usage_megabytes"] = memory.used / MIB
            values["gpu_0_memory_usage_percentage"] = 100 * memory.used / memory.total
            load = pynvml.nvmlDeviceGetUtilizationRates(self._gpu)
            values["gpu_0_utilization_percentage"] = float(load.gpu)
            values["gpu_0_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(self._gpu) / 1000
        return values


def _cpu_seconds() -> tuple[float, float]:
    """Return the seconds that all cores were busy, and those they had in all."""
    times = psutil.cpu_times()
    # A guest's time is in user's already.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total


def _find_gpu(device: torch.device) -> Any:
    """Return NVML's handle of a GPU; None on a CPU, and where NVML cannot be asked."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (pynvml.NVMLError, AttributeError):  # a driver without NVML; a part of a GPU
        return None
