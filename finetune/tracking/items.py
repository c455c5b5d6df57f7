"""Read one line of `evaluation/<task>.items.jsonl`: what was asked, picked and accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.config.rules import HELD_OUT, OWN_QUESTIONS

KINDS = (f"{OWN_QUESTIONS}_", f"{HELD_OUT}_")  # tasks of a group that are kinds, not subjects


def find_choices(item: Mapping[str, Any]) -> list[str]:
    """Return a question's choices; none where the answer is generated, or texts are not kept."""
    choices = item.get("choices")
    return [str(choice) for choice in choices] if isinstance(choices, list) else []


def pick(choices: Sequence[str], said: Any) -> str:
    """Return what a model answered: its likeliest choice, or its text; empty where unknown.

    Args:
        choices: of the question; none where the answer is generated.
        said: each choice's log-likelihood, or the generated text.
    """
    if isinstance(said, str):
        return said.strip()
    if not isinstance(said, list) or not said or len(said) != len(choices):
        return ""
    if not all(isinstance(value, int | float) for value in said):
        return ""
    return choices[max(range(len(choices)), key=said.__getitem__)]


def describe_gold(choices: Sequence[str], gold: Any) -> str:
    """Return the right choice, or what is accepted."""
    if choices and isinstance(gold, int) and 0 <= gold < len(choices):
        return choices[gold]
    if isinstance(gold, list):
        return " or ".join(map(str, gold))
    return "" if gold is None else str(gold)


def find_category(item: Mapping[str, Any]) -> str:
    """Return a question's category: its own, else the task of the group that it belongs to."""
    task = str(item.get("task") or "")
    return str(item.get("category") or ("" if task.startswith(KINDS) else task))
