"""Two runs side by side: the settings that differ, and scores on the same questions."""

from __future__ import annotations

from math import isclose

from rich.table import Table

from finetune.reporting.outcomes import read_answers
from finetune.reporting.score_tables import show_flips, show_p, show_range
from finetune.reporting.settings import read_run_settings
from finetune.reporting.tables import add_row, build_table
from finetune.reporting.verdict import show_difference
from finetune.statistics.comparison import compare
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import show_score
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.run_names import shorten_names
from finetune.tracking.score_files import MetricScore

ENVIRONMENT = ("dtype", "threads", "processes", "gpu", "host", "python", "git_commit")


def render_settings(one: RunFolder, other: RunFolder) -> Table:
    """Return a table of the settings, versions and machines that differ; no row: none does."""
    names = shorten_names([one.name, other.name])
    table = build_table("setting", *names)
    for sides in (
        [_show_settings(run) for run in (one, other)],
        [_read_environment(run) for run in (one, other)],
    ):
        for key in dict.fromkeys(key for side in sides for key in side):
            values = [side.get(key, "") for side in sides]
            if values[0] != values[1]:
                add_row(table, key, *values)
    return table


def _show_settings(run: RunFolder) -> dict[str, str]:
    return {key: str(value) for key, value in read_run_settings(run).items()}


def _read_environment(run: RunFolder) -> dict[str, str]:
    found = run.read_json("environment.json") or {}
    versions = found.get("versions") or {}
    machine = {name: found[name] for name in ENVIRONMENT if found.get(name) is not None}
    return {key: str(value) for key, value in (machine | versions).items()}


def render_pair(one: RunFolder, other: RunFolder) -> Table:
    """Return a table of two runs' scores on the same questions: difference, interval and p."""
    numbers = (*shorten_names([one.name, other.name]), "difference", "95 %", "gained / lost", "p")
    table = build_table("metric", *numbers, right=numbers)
    for task in one.scored_tasks():
        first, second = one.read_scores(task), other.read_scores(task)
        if first is None or second is None:
            continue
        rows = []
        for name, score in first.tuned.metrics.items():
            if name in second.tuned.metrics:
                metric, scores = MetricName(task, name), (score, second.tuned.metrics[name])
                if cells := _pair_cells(one, other, metric, scores):
                    rows.append((name, *cells))
        if rows:
            add_row(table, task, *[""] * len(numbers))
        for name, *cells in rows:
            add_row(table, f"  {name}", *cells)
    return table


def _pair_cells(
    one: RunFolder, other: RunFolder, metric: MetricName, scores: tuple[MetricScore, MetricScore]
) -> list[str]:
    """Return the cells of a metric's row; none where a run's outcomes are not stored."""
    first, second = (read_answers(run, metric.task, metric.name) for run in (one, other))
    if not (first.tuned and second.tuned):
        return []
    values, definition = [score.value for score in scores], scores[0].definition
    plain = [*map(show_score, values), f"{values[1] - values[0]:+.4g}"]
    if scores[1].definition != definition:
        return [*plain[:2], "the runs define this metric differently", "", "", ""]
    if not definition.is_known:
        return [*plain, "", "", ""]  # only a run and its base are resampled at scoring
    try:
        pairs = {other.name: (first.tuned, second.tuned)}
        comparison = compare(pairs, definition, first.members)
    except ValueError as error:
        return ["", "", str(error), "", "", ""]
    found = comparison.differences[other.name]
    if not isclose(found.base, values[0], rel_tol=1e-6, abs_tol=1e-9):
        return [*plain, "", "", ""]  # scored by an older version, without its outcomes
    if not found.changed:
        return [*plain[:2], "none", "", "", ""]
    interval, flips = show_range(found, comparison), show_flips(found)
    return [
        *plain[:2], show_difference(found.value, comparison), interval, flips, show_p(found.p)
    ]  # fmt: skip
