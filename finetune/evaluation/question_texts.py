"""The texts of a task's questions, to be kept beside their outcomes and read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from lm_eval.api.task import Task
from lm_eval.utils import hash_string

from finetune.evaluation.task_templates import sandboxed
from finetune.evaluation.tasks import LoadedTask

Key = tuple[str | None, str, int]  # task in a group, hash of the prompt, and its how-manieth
CATEGORIES = ("category", "subject")  # columns, the first that a question has


def describe_questions(task: LoadedTask) -> dict[Key, dict[str, Any]]:
    """Return the texts of the questions that a task asks, by what their outcomes are named by."""
    found: dict[Key, dict[str, Any]] = {}
    seen: Counter[tuple[str | None, str]] = Counter()
    for name, one in task.tasks.items():
        member = None if name == task.name else name
        with sandboxed():
            for doc, prompt in _questions(one):
                hashed = hash_string(prompt)
                seen[member, hashed] += 1
                found[member, hashed, seen[member, hashed]] = _describe(one, doc, prompt)
    return found


def _questions(task: Task) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield each question that is asked, and the prompt of its first request."""
    last = None
    for request in task.instances:
        if request.doc_id != last:
            last = request.doc_id
            yield request.doc, str(request.args[0])


def _describe(task: Task, doc: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """Return question, choices, right answer and category, as far as the task has them."""
    text: Any = doc.get("question") if isinstance(doc.get("prompt"), str) else None
    target: Any = None
    choices: list[str] = []
    with suppress(Exception):  # of a task's own code, which may want something else
        text = text or task.doc_to_text(doc)
    with suppress(Exception):
        target = task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "multiple_choice":
        with suppress(Exception):
            choices = [str(one).strip() for one in task.doc_to_choice(doc)]
    accepted = [str(one) for one in doc["answers"]] if doc.get("answers") else None
    described = {
        "question": text if isinstance(text, str) else prompt,
        "choices": choices,
        "gold": _plain_target(accepted or target),
        "category": next((str(doc[key]) for key in CATEGORIES if doc.get(key)), ""),
        "id": str(doc.get("id") or ""),
    }
    return {key: value for key, value in described.items() if value not in ("", [], None)}


def _plain_target(target: Any) -> Any:
    """Return an index, a text, or a list of texts."""
    if isinstance(target, bool) or not isinstance(target, int | str | list):
        return None if target is None else str(target)
    return [str(one) for one in target] if isinstance(target, list) else target
