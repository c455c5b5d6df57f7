"""Errors as a user reads them: refusals, the nearest known name, an error's first line."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any


class Refused(ValueError):
    """Settings that cannot be run; `problems` has one line each, with its remedy."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def nearest(name: Any, known: tuple[str, ...] | list[str]) -> str:
    """Return the remedy for an unknown name: the closest known one, and all of them."""
    close = get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}"


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's text; OmegaConf's has a dump of the key below it."""
    return next((line for line in str(error).strip().split("\n") if line), type(error).__name__)
