"""Mean power of a GPU over a training, from the driver's energy counter; unknown on a CPU."""

from __future__ import annotations

import time

import torch

from finetune import distributed
from finetune.models.nvml import find_gpu


class PowerMeter:
    """The mean power of a process's GPU from here on; other processes on the GPU are included."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = find_gpu(device) if distributed.num_processes() == 1 else None
        self._started, self._before = time.monotonic(), self._energy_joules()

    def mean_watts(self) -> float | None:
        """Return the mean power so far; None where the GPU has no counter, or there are several."""
        seconds, now = time.monotonic() - self._started, self._energy_joules()
        if now is None or self._before is None or not seconds:
            return None
        return (now - self._before) / seconds

    def _energy_joules(self) -> float | None:
        return None if self._gpu is None else self._gpu.energy_joules()
