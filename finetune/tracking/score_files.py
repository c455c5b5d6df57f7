"""Read `evaluation/<task>.json`, a run's scores of one task; pipeline/scores.py writes it.

A file of an older release lacks some fields, which are then None, empty or guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from finetune.files import Damaged
from finetune.statistics.metric_names import STDERR
from finetune.statistics.metrics import Metric, guess_metric


@dataclass(frozen=True)
class MetricScore:
    """One metric of one model, as lm-eval reported it."""

    value: float
    stderr: float | None  # None where lm-eval names none
    definition: Metric


@dataclass(frozen=True)
class ModelScore:
    """One model's scores on one task."""

    metrics: dict[str, MetricScore]  # by lm-eval's name
    num_questions: int | None
    seconds: float  # that scoring took
    setup: dict[str, Any]  # must be equal for scores to be comparable; older files lack some
    scoring: dict[str, Any]  # the computation of the log-likelihoods

    def value(self, metric: str) -> float | None:
        found = self.metrics.get(metric)
        return None if found is None else found.value


@dataclass(frozen=True)
class TaskScores:
    """The scores of a run and its base on one task."""

    tuned: ModelScore
    base: ModelScore | None  # None where it was not scored

    @property
    def sides(self) -> dict[str, ModelScore]:
        """The models' scores under the names of their sides in the file."""
        return {"tuned": self.tuned, **({"base": self.base} if self.base else {})}

    @property
    def definitions(self) -> dict[str, Metric]:
        """The definition of each metric of the tuned model."""
        return {name: one.definition for name, one in self.tuned.metrics.items()}


# Keys of a side that belong to its setup, though they are written beside it.
BESIDE_SETUP = ("version", "num_fewshot", "num_questions")


def parse_scores(stored: Mapping[str, Any]) -> TaskScores:
    """Return the scores that a file holds.

    Raises:
        Damaged: it holds something else.
    """
    try:
        base = _parse_model(stored["base"]) if "base" in stored else None
        return TaskScores(_parse_model(stored["tuned"]), base)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise Damaged("it holds no scores") from None


def _parse_model(stored: Mapping[str, Any]) -> ModelScore:
    """Return one side's scores; raises TypeError or another where it is none."""
    values, definitions = stored["metrics"], _mapping(stored, "definitions")
    numbers = [*values.values(), stored.get("seconds", 0.0), stored.get("num_questions") or 0]
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError
    metrics = {
        name: MetricScore(
            value,
            values.get(f"{name}{STDERR}"),
            _parse_metric(definitions[name]) if name in definitions else guess_metric(name),
        )
        for name, value in values.items()
        if not name.endswith(STDERR)
    }
    beside = {key: stored[key] for key in BESIDE_SETUP if key in stored}
    return ModelScore(
        metrics=metrics,
        num_questions=stored.get("num_questions"),
        seconds=stored.get("seconds", 0.0),
        setup={**beside, **_mapping(stored, "setup")},
        scoring=_mapping(stored, "scoring"),
    )


def _mapping(stored: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an optional mapping of a side; raises TypeError where it is another thing."""
    found = stored.get(key)
    if not isinstance(found, dict | None):
        raise TypeError
    return found or {}


def _parse_metric(stored: Mapping[str, Any]) -> Metric:
    """Return a metric's definition; later releases may say more of it, which is left out."""
    known = {field.name for field in fields(Metric)}
    metric = Metric(**{name: value for name, value in stored.items() if name in known})
    has_direction = isinstance(metric.higher_is_better, bool | None)
    if not isinstance(metric.aggregation, str) or not has_direction:
        raise TypeError
    return metric
