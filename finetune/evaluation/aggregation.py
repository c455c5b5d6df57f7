"""Aggregation of a task's metrics, as lm-eval's task objects define it.

A metric that metrics.AGGREGATES does not compute (bleu, chrf, a task's own function) is resampled
here, where lm-eval is imported, so that a report needs only the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean
from lm_eval.api.registry import AGGREGATION_REGISTRY

from finetune.evaluation.tasks import LoadedTask
from finetune.statistics.metrics import Grouping, Metric
from finetune.statistics.resampling import SEED

Function = Callable[[Sequence[Any]], float]

RESAMPLES = 499
SLOW_RESAMPLES = 99  # of what lm-eval itself resamples a hundred times only
SLOW = ("bleu", "chrf", "chrf++", "ter")


def find_definitions(task: LoadedTask, reported: Iterable[str]) -> dict[str, Metric]:
    """Return the definition of each metric of a task or group.

    Args:
        task: as lm-eval built it.
        reported: the keys of its results, such as `acc,none`.
    """
    found = {}
    for key in reported:
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            name = metric if kind == "none" else f"{metric}_{kind}"
            found[name] = _definition(task, metric, _grouping(task, metric))
    return found


def list_metrics(task: LoadedTask) -> dict[str, bool | None]:
    """Return the metrics that a task or group will report, and whether higher is better in each."""
    members = task.tasks.values()
    pairs = [
        (metric, kind.name) for o in members for metric in o.aggregation() for kind in o._filters
    ]
    group = task.loaded["groups"].get(task.name)
    if group is not None:  # of its tasks' metrics it has those it aggregates
        kinds = {one.metric: one.filter_list for one in group.aggregate_metric_list}
        pairs = [(m, kind) for m, kind in pairs if m in kinds and kind in (kinds[m] or [kind])]
    return {
        metric if kind == "none" else f"{metric}_{kind}": _definition(
            task, metric, None
        ).higher_is_better
        for metric, kind in pairs
    }


def _grouping(task: LoadedTask, metric: str) -> Grouping | None:
    """Return how a group weights its tasks; None outside a group."""
    group = task.loaded["groups"].get(task.name)
    if group is None:
        return None
    (config,) = [one for one in group.aggregate_metric_list if one.metric == metric][:1]
    return "by_size" if config.weight_by_size else "equal"


def _definition(task: LoadedTask, metric: str, grouping: Grouping | None) -> Metric:
    """Return the definition that all tasks with the metric share; else `mixed`, or no direction."""
    tasks = [one for one in task.tasks.values() if metric in one.aggregation()]
    directions = {one.higher_is_better().get(metric) for one in tasks}
    names = {_registered(one.aggregation().get(metric, mean)) for one in tasks}
    return Metric(
        names.pop() if len(names) == 1 else "mixed",
        directions.pop() if len(directions) == 1 else None,
        grouping,
    )


def _registered(function: Function) -> str:
    """Return lm-eval's name of an aggregation, or the module and name of a task's function."""
    for name, known in AGGREGATION_REGISTRY.items():
        if known is function:
            return str(name)
    return f"{function.__module__}.{getattr(function, '__qualname__', 'function')}"


@dataclass(frozen=True)
class _Stratum:
    """One task's answers: lm-eval's function, and each question's value by both models."""

    aggregate: Function
    before: Sequence[Any]
    after: Sequence[Any]
    weight: float

    def difference(self, places: Sequence[int], swaps: Sequence[bool]) -> float:
        """Return tuned - base over these questions, the models' answers swapped in some."""
        pairs = [
            (self.after[n], self.before[n]) if swap else (self.before[n], self.after[n])
            for n, swap in zip(places, swaps, strict=True)
        ]
        before, after = zip(*pairs, strict=True)
        return self.weight * (self.aggregate(list(after)) - self.aggregate(list(before)))


def draw_resamples(
    task: LoadedTask,
    metric: str,
    definition: Metric,
    answers: Mapping[str | None, Sequence[tuple[Any, Any]]],
) -> dict[str, list[float]]:
    """Draw differences of a metric: `bootstrap` over questions, `swapped` base and tuned.

    The same questions have the same draws, whichever run they are drawn for.

    Args:
        task: has lm-eval's functions.
        metric: its name in the results.
        definition: its definition.
        answers: by task of a group (None outside one), base's and tuned value of each question.
    """
    strata = _strata(task, metric, definition, answers)
    draw = np.random.default_rng(SEED)
    count = SLOW_RESAMPLES if definition.aggregation in SLOW else RESAMPLES
    drawn: dict[str, list[float]] = {"bootstrap": [], "swapped": []}
    for _ in range(count):
        sizes = [len(stratum.before) for stratum in strata]
        places = [draw.integers(size, size=size).tolist() for size in sizes]
        swaps = [draw.random(size) < 0.5 for size in sizes]
        drawn["bootstrap"].append(
            sum(
                one.difference(place, [False] * len(place))
                for one, place in zip(strata, places, strict=True)
            )
        )
        drawn["swapped"].append(
            sum(
                one.difference(range(len(swap)), swap.tolist())
                for one, swap in zip(strata, swaps, strict=True)
            )
        )
    return drawn


def _strata(
    task: LoadedTask,
    metric: str,
    definition: Metric,
    answers: Mapping[str | None, Sequence[tuple[Any, Any]]],
) -> list[_Stratum]:
    total = sum(map(len, answers.values()))
    strata = []
    for member, pairs in answers.items():
        functions = task.tasks[member or task.name].aggregation()
        # A filter's name follows the metric's.
        known = [name for name in functions if metric == name or metric.startswith(f"{name}_")]
        function = functions[max(known, key=len)] if known else mean
        share = len(pairs) / total if definition.grouping == "by_size" else 1 / len(answers)
        before, after = zip(*pairs, strict=True)
        strata.append(_Stratum(function, before, after, share))
    return strata
