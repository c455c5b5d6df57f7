"""Ask before something is removed; where nobody can answer, refuse."""

from __future__ import annotations

import sys

from finetune.problems import Refused


def require_answer(*, is_confirmed: bool) -> None:
    """Refuse where a question can be answered neither by `--yes` nor on a terminal.

    Raises:
        Refused: standard input is no terminal.
    """
    if not is_confirmed and not sys.stdin.isatty():
        raise Refused(["standard input is no terminal to confirm the removal on; add --yes"])


def confirm(question: str, *, is_confirmed: bool) -> bool:
    """Return whether the user agrees, on the terminal or by `--yes`; no answer is a no."""
    if is_confirmed:
        return True
    try:
        answer = input(f"{question}? [y/N] ")
    except EOFError:
        print()
        return False
    return answer.strip().lower() in ("y", "yes")
