"""Durations as they are typed: 90m, 3h, 1.5d, 2:30:00 as Slurm writes it, or seconds."""

from __future__ import annotations

import re

UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST = 2_000_000  # seconds; a pipe is waited for in milliseconds of 31 bits


def read_duration(text: str) -> float | None:
    """Return the seconds of a time such as 90m, 3h, 1.5d, 2:30:00 or 600; None for anything else.

    At least a second, and at most LONGEST.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text)
    clock = re.fullmatch(r"\s*(?:(\d+)-)?(\d+):(\d\d):(\d\d)\s*", text)
    seconds = 0.0
    if found is not None:
        seconds = float(found[1]) * UNIT_SECONDS[found[2]]
    elif clock is not None:
        days, hours, minutes, rest = (int(part or 0) for part in clock.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    return seconds if 1 <= seconds <= LONGEST else None
