"""Forecasts of scoring a task: its number of questions, and its time once a speed is known.

A model's speed is measured by its last scores on this machine. Multiple choice is measured in
characters, with shared prefixes counted once as the scorer computes them, so that one task predicts
another; generation in questions of the same task, since the lengths of answers differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import normalize_gen_kwargs

from finetune.evaluation.tasks import LoadedTask
from finetune.files import Damaged, read_json, write_atomic


@dataclass(frozen=True)
class Speeds:
    """One model's speeds, kept in a file: amounts a second, by what is measured."""

    file: Path

    def forecast(self, task: LoadedTask) -> str:
        """Return one line: how many questions and choices a task has, and how long they take."""
        num_questions = len({(one.task_name, one.doc_id) for one in task.requests})
        line = f"{task.key}: {num_questions:,} questions"
        if _generates(task):
            line += f", answers of up to {_most_tokens(task)} tokens"
        elif len(task.requests) > num_questions:
            line += f", {len(task.requests):,} choices"
        if task.notes:
            line += f"; {task.notes}"
        measure, amount = _measure(task)
        speed = self.read().get(measure)
        return line if speed is None else f"{line}, about {_render_seconds(amount() / speed)}"

    def record(self, task: LoadedTask, seconds: float) -> None:
        """Record a task's speed for later forecasts, if the cache can be written to."""
        measure, amount = _measure(task)
        self.keep({measure: amount() / max(seconds, 1e-3)})

    def keep(self, measured: Mapping[str, float]) -> None:
        """Add speeds to the file, if the cache can be written to."""
        speeds = {**self.read(), **measured}
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.file, json.dumps(speeds))

    def read(self) -> dict[str, float]:
        """Return the speeds by what is measured; none where the file is missing or damaged."""
        with suppress(Damaged):  # a speed that is lost is measured again
            speeds = read_json(self.file, dict) or {}
            return {name: one for name, one in speeds.items() if isinstance(one, float) and one > 0}
        return {}


def _generates(task: LoadedTask) -> bool:
    return any(request.request_type == "generate_until" for request in task.requests)


def _measure(task: LoadedTask) -> tuple[str, Callable[[], float]]:
    """Return the unit of a task's speed, and a function that counts the task in it."""
    if _generates(task):
        return task.name, lambda: len(task.requests)
    return "characters", lambda: task.num_characters


def _most_tokens(task: LoadedTask) -> int:
    """Return the longest answer that a task allows, which bounds its time."""
    settings = [one.args[1] for one in task.requests if one.request_type == "generate_until"]
    limits = [normalize_gen_kwargs(one, DEFAULT_MAX_GEN_TOKS)["max_gen_toks"] for one in settings]
    return int(max(limits))


def _render_seconds(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
