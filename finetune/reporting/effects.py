"""Effects of the swept settings on the main metric: each value's mean, and what differs most.

A value's mean is over all runs that have it; its interval is over the questions, paired with the
base. Of a grid the runs of two values differ in nothing else, so their means can be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isclose

import numpy as np
import numpy.typing as npt

from finetune.reporting.outcomes import find_outcomes
from finetune.reporting.results import Results
from finetune.reporting.rows import Row
from finetune.reporting.seeds import SEED_KEYS
from finetune.statistics.comparison import Outcomes, paired_interval
from finetune.statistics.metric_names import MetricName

Array = npt.NDArray[np.float64]
FEWEST_VALUES = 3  # of a setting whose best value may be at the edge


@dataclass(frozen=True)
class ValueEffect:
    """One value of a swept setting, and the mean of the runs that have it."""

    key: str
    value: str
    runs: int
    mean: float  # of the main metric
    low: float | None  # of the difference to the base, 95 %, over questions
    high: float | None


@dataclass(frozen=True)
class KeyEffect:
    """A swept setting: its values' means, and its share of the variance between runs."""

    key: str
    values: list[ValueEffect]
    share: float | None  # eta squared; None where all runs score the same


def find_effects(results: Results) -> list[KeyEffect]:
    """Return the effect of each swept setting with several values, the largest share first."""
    metric, rows = results.main_metric, results.compared_rows()
    if metric is None or len(rows) < 2:
        return []
    answers = _find_answers(results, metric)
    effects = []
    for key in results.record.swept:
        by_value: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            by_value[str(row[key])].append(row)
        if len(by_value) > 1:
            values = [
                _value_effect(key, value, [row[metric] for row in some], _join(some, answers))
                for value, some in by_value.items()
            ]
            effects.append(KeyEffect(key, values, _share(by_value, metric)))
    return sorted(effects, key=lambda effect: -(effect.share or 0.0))


def _find_answers(results: Results, metric: str) -> dict[str, tuple[Array, Array]]:
    """Return base and tuned outcomes by run; none where the metric is no mean over questions."""
    comparison = results.comparisons.get(metric)
    name = MetricName.parse(metric)
    if comparison is None or not comparison.metric.is_mean or name.task not in results.scored:
        return {}
    tables = results.scored[name.task].tables
    pairs = {run: find_outcomes(tables[run], name.name) for run in comparison.differences}
    questions = list(next(iter(pairs.values()))[0])
    return {
        run: (_sorted(base, questions), _sorted(tuned, questions))
        for run, (base, tuned) in pairs.items()
    }


def _sorted(outcomes: Outcomes, questions: Sequence[str]) -> Array:
    return np.array([outcomes[question] for question in questions], dtype=np.float64)


def _join(
    rows: Sequence[Row], answers: Mapping[str, tuple[Array, Array]]
) -> list[tuple[Array, Array]]:
    pairs = [answers[row["run"]] for row in rows if row["run"] in answers]
    return pairs if len(pairs) == len(rows) else []


def _value_effect(
    key: str, value: str, scores: Sequence[float], pairs: Sequence[tuple[Array, Array]]
) -> ValueEffect:
    low = high = None
    if pairs:
        base, tuned = (np.mean(side, axis=0) for side in zip(*pairs, strict=True))
        low, high = paired_interval(base, tuned)
    return ValueEffect(key, value, len(scores), float(np.mean(scores)), low, high)


def _share(by_value: Mapping[str, Sequence[Row]], metric: str) -> float | None:
    """Return the share of the variance between runs that the values' means have."""
    groups = [np.array([row[metric] for row in rows]) for rows in by_value.values()]
    scores = np.concatenate(groups)
    total = float(((scores - scores.mean()) ** 2).sum())
    between = sum(len(one) * float(one.mean() - scores.mean()) ** 2 for one in groups)
    return None if isclose(total, 0.0, abs_tol=1e-18) else between / total


def find_edges(results: Results) -> list[str]:
    """Return a line for each setting whose best value is the lowest or highest that was tried."""
    metric = results.main_metric
    leaders = results.leaders()
    if metric is None or len(leaders) != 1:
        return []
    keys = [key for key in results.record.swept if key not in SEED_KEYS]
    lines = [_find_edge(key, results.compared_rows(), leaders[0]) for key in keys]
    return [line for line in lines if line]


def _find_edge(key: str, rows: Sequence[Row], best_row: Row) -> str:
    numbers, best = [_number(row[key]) for row in rows], _number(best_row[key])
    tried = sorted({number for number in numbers if number is not None})
    if best is None or best <= 0 or None in numbers or len(tried) < FEWEST_VALUES:
        return ""
    if best not in (tried[0], tried[-1]):
        return ""
    beside = tried[-2] if best == tried[-1] else tried[1]
    beyond = best * best / beside if beside > 0 else 2 * best
    side = "highest" if best == tried[-1] else "lowest"
    return f"The best {key}, {best:g}, is the {side} that was tried: try {beyond:.3g}."


def _number(value: object) -> float | None:
    with suppress(ValueError):
        return float(str(value))
    return None
