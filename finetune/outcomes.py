"""The outcome of each question of a task that a run stored, by base and tuned model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.comparison import Outcomes
from finetune.resampling import Resampled
from finetune.run_folder import RunFolder


@dataclass(frozen=True)
class Answers:
    """The outcomes in one metric of a run's base and tuned model, by question."""

    base: dict[str, Any]
    tuned: dict[str, Any]
    members: dict[str, str]  # the question's task, in a group

    @property
    def changed(self) -> int:
        return sum(self.base.get(question) != value for question, value in self.tuned.items())


def read_answers(run: RunFolder, task: str, metric: str) -> Answers:
    """Return a run's outcomes; none of a model that was not asked, or not in this metric."""
    answers = Answers({}, {}, {})
    for key, item in _items(run, task):
        for side, outcomes in (("base", answers.base), ("tuned", answers.tuned)):
            if metric in item.get(side, {}):
                outcomes[key] = item[side][metric]
        if "task" in item:
            answers.members[key] = item["task"]
    return answers


def _items(run: RunFolder, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the questions' entries, each by a name of its own."""
    if run.read_scores(task) is None:
        return
    seen: Counter[str] = Counter()
    for item in run.read_items(task):
        key = f"{item['hash']}:{item['prompt']}" + (f":{item['task']}" if "task" in item else "")
        seen[key] += 1
        # A task may ask the same question twice.
        yield key + "'" * (seen[key] - 1), item


def read_outcomes(run: RunFolder, task: str, metric: str) -> tuple[Outcomes, Outcomes] | None:
    """Return a run's outcomes on each question, the base's and its own; None without both."""
    answers = read_answers(run, task, metric)
    return (answers.base, answers.tuned) if answers.base and answers.tuned else None


def read_sides(run: RunFolder, task: str, metric: str) -> dict[str, dict[str, Any]]:
    """Return the outcomes of a run's `base` and `tuned` model; none where one was not asked."""
    answers = read_answers(run, task, metric)
    return {"base": answers.base, "tuned": answers.tuned}


def read_resamples(
    run: RunFolder, task: str, metric: str, scores: tuple[float, float]
) -> Resampled | None:
    """Return the resamples that were stored at scoring of a metric that only lm-eval computes."""
    stored = (run.read_json(f"resamples/{task}.json") or {}).get(metric)
    if not stored:
        return None
    drawn = (np.asarray(stored[name], dtype=np.float64) for name in ("bootstrap", "swapped"))
    return Resampled(*scores, read_answers(run, task, metric).changed, *drawn)
