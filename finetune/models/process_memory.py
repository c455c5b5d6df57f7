"""The memory of a process: its peak, what glibc keeps of it, and whether it ran out."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of the memory in use, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (counters := Path("/proc/self/clear_refs")).exists():
        with suppress(OSError):
            counters.write_text("5", encoding="ascii")  # sets VmHWM to what is held now


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak since the reset: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the time before exec
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def return_freed_memory() -> None:
    """Pin glibc's mmap threshold, so that freed blocks return to the system.

    The peak is halved, for 15 % more time. By default the threshold grows as blocks are freed, and
    the memory is kept.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the GPU or of the machine."""
    out = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return out or "can't allocate memory" in str(error)  # of torch's CPU allocator
