"""Table of the verdict on each task: the best run beside the base, one line a task."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.reporting.results import Results
from finetune.reporting.rows import Row
from finetune.reporting.score_tables import Cell, ScoreTable, show_p, show_range
from finetune.reporting.verdict import main_verdict, show_claim, show_detectable, show_difference
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import show_score

COLUMNS = ["task", "verdict", "difference", "95 %", "p", "base to tuned"]


def build_verdicts(results: Results) -> ScoreTable | None:
    """Return the best run's verdict in each task, its main metric first; None without a best."""
    leaders = results.leaders()
    if not leaders or not results.metrics:
        return None
    label, tied = results.label(leaders[0]), f", tied with {len(leaders) - 1} more"
    title = f"Best run: {label}{tied if len(leaders) > 1 else ''}"
    metrics = choose_metrics(results)
    rows = [list(_cells(results, leaders[0], name)) for name in metrics]
    compared = [one for name in metrics if (one := results.comparisons.get(name)) is not None]
    columns = list(COLUMNS)
    if _is_adjusted(results, max((len(one.differences) for one in compared), default=1)):
        columns[columns.index("p")] = "p, adjusted"
        columns.append("runs better")
    notes = [note for one in compared[:1] if (note := show_detectable(one))]
    said = main_verdict(results)
    return ScoreTable(title, columns, rows, [note for note in notes if note not in said])


def choose_metrics(results: Results) -> list[str]:
    """Return a metric for each task, in which something changed if any: the main one first."""
    weighted = [] if results.objective is None else list(map(str, results.objective.weights))
    found: dict[str, str] = {}

    def is_changed(name: str) -> bool:
        comparison = results.comparisons.get(name)
        return comparison is not None and comparison.has_changes

    def order(name: str) -> tuple[bool, bool, bool]:
        return name != results.main_metric, name not in weighted, not is_changed(name)

    for name in sorted(results.metrics, key=order):
        if name == results.main_metric and not is_changed(name):
            found[name] = name  # another metric of its task may have changed
        elif name in weighted or is_changed(name) or results.scored_rows(name):
            found.setdefault(MetricName.parse(name).task, name)
    tasks = [MetricName.parse(name).task for name in results.metrics]

    def place(name: str) -> tuple[bool, int]:
        return name != results.main_metric, tasks.index(MetricName.parse(name).task)

    return sorted(found.values(), key=place)


def _is_adjusted(results: Results, num_runs: int) -> bool:
    return num_runs > 1 and not results.selects


def _cells(results: Results, best: Row, metric: str) -> Iterator[Cell]:
    comparison, score = results.comparisons.get(metric), best.get(metric)
    higher = results.metrics[metric].higher_is_better
    yield Cell(f"{metric} (lower is better)" if higher is False else metric)
    base = best.get(MetricName.parse(metric).base)
    scores = Cell(" to ".join(show_score(one) for one in (base, score) if one is not None))
    if comparison is None or best["run"] not in comparison.differences:
        why = "not scored" if score is None else "no base" if base is None else "not compared"
        yield from (Cell(why), Cell(""), Cell(""), Cell(""), scores)
        return
    found, grid = comparison.differences[best["run"]], len(comparison.differences)
    is_adjusted = _is_adjusted(results, grid)
    p = found.p_adjusted if is_adjusted else found.p
    unit = " points" if comparison.is_share else ""
    yield Cell(*show_claim(found, comparison, p))
    shown = (f"{show_difference(found.value, comparison)}{unit}", show_range(found, comparison),
             show_p(p))  # fmt: skip
    yield from (Cell(text if found.changed else "") for text in shown)
    yield scores
    if is_adjusted:
        better = sum(map(comparison.is_improvement, comparison.differences))
        yield Cell(f"{better} of {grid}")
