"""Paired comparison of tuned models with their base in an objective of several metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping

from finetune.statistics.comparison import Comparison, Outcomes, compare
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import Metric
from finetune.statistics.objective import Objective

Sides = tuple[Outcomes, Outcomes]  # of base and tuned model


def average_metric(objective: Objective, metrics: Mapping[str, Metric]) -> Metric | None:
    """Return the definition of a weighted mean; None where its metrics have several directions."""
    directions = {metrics[str(name)].higher_is_better for name in objective.weights}
    only = directions.pop() if len(directions) == 1 else None
    return None if only is None else Metric("mean", only, "equal")


def compare_average(
    objective: Objective,
    metrics: Mapping[str, Metric],
    answers: Mapping[str, Mapping[MetricName, Sides]],
) -> Comparison | None:
    """Compare runs with their bases in a weighted mean, by resampling the questions of each task.

    Args:
        objective: the metrics and weights.
        metrics: their definitions.
        answers: by run and metric, the outcomes of base and tuned model.

    Returns:
        None where a metric is no mean over questions, or is one over a part of another's.

    Raises:
        ValueError: the runs were scored on different questions.
    """
    kinds = [metrics[str(name)] for name in objective.weights]
    metric = average_metric(objective, metrics)
    strata = _find_strata(next(iter(answers.values())))
    if metric is None or strata is None:
        return None
    if not all(kind.aggregation == "mean" and kind.is_mean for kind in kinds):
        return None
    weights = [math.fsum(objective.weights[name] for name in names) for names in strata]
    members: dict[str, str] = {}
    pairs: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
    for run, by_metric in answers.items():
        pairs[run] = {}, {}
        for number, (names, total) in enumerate(zip(strata, weights, strict=True)):
            shares = {name: objective.weights[name] / total for name in names}
            for side, found in enumerate(pairs[run]):
                mixed = _mix({name: by_metric[name][side] for name in names}, shares)
                named = {f"{number}:{question}": value for question, value in mixed.items()}
                found.update(named)
                members.update(dict.fromkeys(named, str(number)))
    by_stratum = {str(number): weight for number, weight in enumerate(weights)}
    return compare(pairs, metric, members, weights=by_stratum)


def _find_strata(answers: Mapping[MetricName, Sides]) -> list[list[MetricName]] | None:
    """Return the metrics of the same questions together, since these are drawn together."""
    strata: list[list[MetricName]] = []
    asked: list[set[str]] = []
    for name, (base, _) in answers.items():
        for known, names in zip(asked, strata, strict=True):
            if names[0].task != name.task or known.isdisjoint(base):
                continue
            if known != set(base):
                return None
            names.append(name)
            break
        else:
            asked.append(set(base))
            strata.append([name])
    return strata


def _mix(
    outcomes: Mapping[MetricName, Outcomes], shares: Mapping[MetricName, float]
) -> dict[str, float]:
    """Return each question's weighted mean of several metrics' outcomes."""
    first, *others = outcomes.values()
    if any(one.keys() != first.keys() for one in others):
        raise ValueError("its metrics were scored on different questions")
    return {
        question: math.fsum(share * outcomes[name][question] for name, share in shares.items())
        for question in first
    }
