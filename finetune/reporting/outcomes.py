"""Outcomes per question of base and tuned model, as a run stored them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.reporting.outcome_tables import OutcomeTable, read_table
from finetune.statistics.comparison import Outcomes
from finetune.statistics.metric_names import MetricName
from finetune.statistics.resampling import Resampled
from finetune.tracking.run_folder import RunFolder


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
    """Return a run's outcomes; none of a model that was not scored in this metric."""
    if run.read_scores(task) is None:
        return Answers({}, {}, {})
    return find_answers(read_table(run, task), metric)


def find_answers(table: OutcomeTable, metric: str) -> Answers:
    """Return the outcomes in one metric."""
    base, tuned = (table.outcomes(side, metric) for side in ("base", "tuned"))
    return Answers(base, tuned, table.members)


def find_outcomes(table: OutcomeTable, metric: str) -> tuple[Outcomes, Outcomes]:
    """Return the outcomes per question of base and tuned model; empty where not scored."""
    answers = find_answers(table, metric)
    return answers.base, answers.tuned


def read_sides(run: RunFolder, task: str, metric: str) -> dict[str, dict[str, Any]]:
    """Return the outcomes of a run's `base` and `tuned` model; none where one was not scored."""
    answers = read_answers(run, task, metric)
    return {"base": answers.base, "tuned": answers.tuned}


def read_resamples(
    run: RunFolder, name: MetricName, scores: tuple[float, float], changed: int
) -> Resampled | None:
    """Return the resamples that were stored at scoring of a metric that only lm-eval computes."""
    stored = (run.read_json(f"resamples/{name.task}.json") or {}).get(name.name)
    if not stored:
        return None
    drawn = (np.asarray(stored[key], dtype=np.float64) for key in ("bootstrap", "swapped"))
    return Resampled(*scores, changed, *drawn)
