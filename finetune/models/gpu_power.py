"""Mean power of a GPU over a training, from NVML's energy counter; unknown on a CPU."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import torch

from finetune import distributed

LIBRARY = "libnvidia-ml.so.1"  # of NVIDIA's driver


class PowerMeter:
    """The mean power of a process's GPU from here on; other processes on the GPU are included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._started = time.monotonic()
        self._before = read_energy_joules(device)

    def mean_watts(self) -> float | None:
        """Return the mean power so far; None where the GPU has no counter, or there are several."""
        seconds, now = time.monotonic() - self._started, read_energy_joules(self.device)
        if now is None or self._before is None or not seconds:
            return None
        return (now - self._before) / seconds


def read_energy_joules(device: torch.device) -> float | None:
    """Return the energy that a GPU has used since its driver was loaded; None if unknown.

    Volta and newer cards count it (nvmlDeviceGetTotalEnergyConsumption).
    """
    if device.type != "cuda" or distributed.num_processes() > 1:
        return None
    try:
        nvml: Any = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    failed = (  # each returns 0, or the number of an error
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))
        or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    )
    return None if failed else millijoules.value / 1000
