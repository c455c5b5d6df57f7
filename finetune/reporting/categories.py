"""Scores of the best run by category, such as the subjects of mmlu, against its base.

Each category is one paired comparison over its questions; p is adjusted over them (Holm 1979).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.reporting.flip_lists import find_best, find_metrics
from finetune.reporting.results import Results
from finetune.statistics.comparison import Comparison, Difference, compare
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import Metric
from finetune.statistics.resampling import holm
from finetune.tracking.items import find_category

MOST = 100  # categories of a task that are compared: those with the most questions

Pair = tuple[Any, Any]  # outcomes of base and tuned model


@dataclass(frozen=True)
class CategoryScore:
    """One category's questions, base and tuned, with p adjusted over all that are compared."""

    name: str
    difference: Difference


@dataclass(frozen=True)
class CategoryScores:
    """One metric of a task by category, sorted by name."""

    metric: str  # task/metric
    run: str
    comparison: Comparison  # as differences are shown: those of each category, by its name
    scores: list[CategoryScore]
    left_out: int = 0  # smaller categories
    without: int = 0  # questions that have no category

    @property
    def has_significant(self) -> bool:
        return any(score.difference.is_significant for score in self.scores)


def score_categories(results: Results) -> Iterator[CategoryScores]:
    """Yield the scores by category of the best run's tasks that have several categories."""
    run = find_best(results)
    if run is None:
        return
    label = next(results.label(row) for row in results.rows if row["run"] == run.name)
    for task in results.record.tasks:
        items: list[dict[str, Any]] | None = None
        for name in find_metrics(results, run, task):
            column = str(MetricName(task, name))
            metric = results.metrics.get(column)
            if metric is None or not metric.is_known:
                continue
            items = run.read_items(task) if items is None else items
            found = compare_categories(items, name, metric)
            if found is not None:
                yield replace(found, metric=column, run=label)


def compare_categories(
    items: Sequence[Mapping[str, Any]], name: str, metric: Metric
) -> CategoryScores | None:
    """Compare both models in each category; None where there are fewer than two.

    Args:
        items: the questions' outcomes.
        name: of the metric.
        metric: its definition; a group's weights of tasks have no part in a category.
    """
    by_category: dict[str, list[Pair]] = {}
    for item in items:
        sides = [item.get(side, {}).get(name) for side in ("base", "tuned")]
        if None not in sides:
            by_category.setdefault(find_category(item), []).append((sides[0], sides[1]))
    without = len(by_category.pop("", []))
    if len(by_category) < 2:
        return None
    largest = sorted(by_category, key=lambda one: (-len(by_category[one]), one))[:MOST]
    try:
        comparisons = {
            one: _compare(by_category[one], replace(metric, grouping=None))
            for one in sorted(largest)
        }
    except (TypeError, ValueError, IndexError):  # outcomes that are not this metric's
        return None
    scores = _adjust({one: found.differences[""] for one, found in comparisons.items()})
    shown = Comparison(
        metric, {one.name: one.difference for one in scores}, None,
        is_share=all(one.is_share for one in comparisons.values()),
    )  # fmt: skip
    return CategoryScores("", "", shown, scores, len(by_category) - len(largest), without)


def _compare(pairs: Sequence[Pair], metric: Metric) -> Comparison:
    base, tuned = ({str(n): pair[side] for n, pair in enumerate(pairs)} for side in (0, 1))
    return compare({"": (base, tuned)}, metric)


def _adjust(differences: Mapping[str, Difference]) -> list[CategoryScore]:
    adjusted = holm([one.p for one in differences.values()])
    return [
        CategoryScore(name, replace(one, p_adjusted=float(p)))
        for (name, one), p in zip(differences.items(), adjusted, strict=True)
    ]
