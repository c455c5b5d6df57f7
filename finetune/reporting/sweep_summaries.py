"""Summarise a sweep's results for MLflow: verdict, best score, costs, differences, the base."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from math import isfinite
from typing import Any

from finetune.reporting.results import Results
from finetune.reporting.rows import COSTS, Row
from finetune.reporting.settings import read_run_settings
from finetune.reporting.verdict import verdict
from finetune.statistics.metric_names import MetricName
from finetune.statistics.objective import VALIDATION
from finetune.tracking.sweep_record import label_run
from finetune.tracking.sweep_summary import BaseRun, Numbers, SweepSummary

SPENT = (*COSTS, "evaluation_seconds")  # columns of results.csv
SUMMED = ("train_seconds", "evaluation_seconds")


def summarise(results: Results) -> SweepSummary:
    """Return what MLflow shows of a sweep beyond the events of its runs."""
    best = next(iter(results.leaders()), None)
    return SweepSummary(
        champion=results.best_run(),
        metrics=results.drawn_metrics(),
        lowest_first=results.lowest_first,
        note=_describe(results) if best is not None or results.metrics else "",
        values=_total(results) | (_best_values(results, best) if best is not None else {}),
        tags=_tags(results, best),
        runs={str(row["run"]): _run_values(results, row) for row in results.rows},
        bases=_bases(results),
    )


def _describe(results: Results) -> str:
    """Return verdict, command, and where the report is, in Markdown."""
    command = f"python -m finetune {shlex.join(results.record.command)}".rstrip()
    multirun = " --multirun" if results.record.swept else ""
    report = "The report is among the artifacts: `report/report.html`."
    return f"{verdict(results)}\n\n`{command}{multirun}`\n\n{report}"


def _total(results: Results) -> Numbers:
    """Return counts of runs by state, and the sums of what they took."""
    states = [row["status"] for row in results.rows]
    sums = {f"cost/{key}": sum(row[key] or 0.0 for row in results.rows) for key in SUMMED}
    finished = states.count("finished")
    return {"num_runs": len(states), "num_finished": finished, **_numbers(sums)}


def _best_values(results: Results, best: Row) -> Numbers:
    """Return the best run's score, the base's, and their difference with its interval and p."""
    main = results.main_metric
    if main is None:
        return _numbers({"best_score": best[VALIDATION]})
    name = MetricName.parse(main)
    return _numbers(
        {
            "best_score": best.get(main),
            "base_score": best.get(name.base),
            "best_score_diff": best.get(name.difference),
            "best_score_diff_low": best.get(f"{name.difference}_low"),
            "best_score_diff_high": best.get(f"{name.difference}_high"),
            "best_score_p_adjusted": best.get(name.p_adjusted),
        }
    )


def _tags(results: Results, best: Row | None) -> dict[str, str]:
    if best is None:
        return {}
    return {
        "finetune.best_run": results.label(best),
        "finetune.best_metric": results.main_metric or VALIDATION,
    }


def _run_values(results: Results, row: Row) -> Numbers:
    """Return a run's costs, and its differences to the base."""
    values: dict[str, Any] = {f"cost/{key}": row.get(key) for key in SPENT}
    for text in results.metrics:
        name = MetricName.parse(text)
        columns = (name.difference, f"{name.difference}_low", f"{name.difference}_high")
        values |= {column: row.get(column) for column in (*columns, name.p, name.p_adjusted)}
    return _numbers(values)


def _bases(results: Results) -> dict[str, BaseRun]:
    """Return the bases that the runs were tuned from: those with the same scores are one.

    Where there are several, each is named by the swept values that all its runs share.
    """
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for number, row in enumerate(results.rows):
        columns = {text: row.get(MetricName.parse(text).base) for text in results.metrics}
        if scores := _numbers(columns):
            groups.setdefault(tuple(scores.items()), []).append(number)
    bases: dict[str, BaseRun] = {}
    for number, (found, places) in enumerate(groups.items()):
        swept = _shared(results, places) if len(groups) > 1 else {}
        name = f"base {label_run(swept)}".rstrip()
        unique = name if name not in bases else f"{name} ({number + 1})"
        params, seconds = _params(results, places[0]), _seconds(results, places[0])
        bases[unique] = BaseRun(dict(found), params, seconds)
    return bases


def _shared(results: Results, places: Sequence[int]) -> dict[str, str]:
    """Return the swept values that some runs share, and other runs do not."""
    runs = results.record.runs
    first = runs[places[0]].swept
    return {
        key: value
        for key, value in first.items()
        if all(runs[place].swept[key] == value for place in places)
        and any(run.swept[key] != value for run in runs)
    }


def _params(results: Results, place: int) -> dict[str, str]:
    """Return the settings of the model that a run was tuned from."""
    settings = read_run_settings(results.runs[place])
    return {key: str(value) for key, value in settings.items() if key.startswith("model.")}


def _seconds(results: Results, place: int) -> float:
    """Return how long the scoring of a run's base took."""
    scored = (scores for scores in results.scores[place].values() if scores is not None)
    return sum(scores.base.seconds for scores in scored if scores.base is not None)


def _numbers(values: dict[str, Any]) -> Numbers:
    """Return the values that are finite numbers."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and isfinite(value)
    }
