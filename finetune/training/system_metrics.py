"""Record the machine's load while a run is trained: CPU, memory, and the GPU where there is one.

The metrics have the names of MLflow's own system metrics, so that its page of them shows these.
"""

from __future__ import annotations

import time
from contextlib import suppress

import psutil
import torch

from finetune.models.nvml import MIB, find_gpu
from finetune.tracking.events import EventLog

SAMPLE_SECONDS = 15.0  # between two samples


class SystemMetrics:
    """Samples a machine's load at steps of a training."""

    def __init__(self, device: torch.device) -> None:
        self._due = 0.0  # by the monotonic clock
        self._cpu = _cpu_seconds()
        self._gpu = find_gpu(device)
        self._process = psutil.Process()

    def record(self, events: EventLog, step: int) -> None:
        """Record a sample at a step, where the last one is old enough."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + SAMPLE_SECONDS
        values = self._sample_machine() | ({} if self._gpu is None else self._gpu.load())
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


def _cpu_seconds() -> tuple[float, float]:
    """Return the seconds that all cores were busy, and those they had in all."""
    times = psutil.cpu_times()
    # A guest's time is in user's already.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total
