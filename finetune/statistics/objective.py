"""The objective of a sweep (`evaluation.objective`): what chooses its best run.

One metric, or the weighted mean of several, written as `2*arc_easy/acc_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.statistics.metric_names import MetricName

SETTING = "evaluation.objective"
MEAN = MetricName("objective", "mean")  # the column of a weighted mean
VALIDATION = "validation/loss"  # chooses, and is not reported as a score


@dataclass(frozen=True)
class Objective:
    """The metrics that choose the best run, with their weights, whose sum is 1."""

    weights: Mapping[MetricName, float]

    @classmethod
    def parse(cls, terms: Sequence[str]) -> Objective:
        """Read terms such as `2*arc_easy/acc_norm`; without a number the weight is 1.

        Raises:
            ValueError: a term is none; the message says what is.
        """
        found: dict[MetricName, float] = {}
        for term in terms:
            weight, star, name = term.rpartition("*")
            found[_read_name(name.strip(), term)] = _read_weight(weight, term) if star else 1.0
        if len(found) < len(terms):
            raise ValueError(f"{SETTING} names a metric twice; name each once")
        if len(found) > 1 and VALIDATION in map(str, found):
            raise ValueError(
                f"{SETTING} averages {VALIDATION} with other metrics; set it alone, or leave it out"
            )
        total = sum(found.values())
        return cls({name: weight / total for name, weight in found.items()})

    @property
    def column(self) -> str:
        """The task/metric that is reported and compared."""
        return str(next(iter(self.weights))) if len(self.weights) == 1 else str(MEAN)

    @property
    def is_loss(self) -> bool:
        """True if the validation loss chooses, on other rows than any score is of."""
        return self.column == VALIDATION

    def average(self, values: Mapping[str, Any], part: str = "") -> float | None:
        """Return the weighted mean of a row's columns; None where one is missing.

        Args:
            values: the row.
            part: the column made from a metric's name, such as `base`; the metric itself by
                default.
        """
        total = 0.0
        for name, weight in self.weights.items():
            value = values.get(getattr(name, part) if part else str(name))
            if value is None or not math.isfinite(value):
                return None
            total += weight * value
        return total

    def describe(self) -> str:
        """Return the metrics, with their weights where there are several."""
        if len(self.weights) == 1:
            return self.column
        return " + ".join(f"{weight:.3g} x {name}" for name, weight in self.weights.items())


def _read_name(name: str, term: str) -> MetricName:
    task, slash, metric = name.rpartition("/")
    if not (task and slash and metric):
        raise ValueError(
            f"{SETTING} has {term!r}; write TASK/METRIC, such as arc_easy/acc_norm, or with a "
            "weight 2*TASK/METRIC"
        )
    return MetricName(task, metric)


def _read_weight(text: str, term: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"{SETTING} has {term!r}; a weight is a number above 0")
    return weight
