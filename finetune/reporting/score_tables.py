"""Tables of scores: the sweep's on the terminal, and one for each metric in the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune.reporting.results import Results
from finetune.reporting.rows import Row
from finetune.reporting.verdict import show_detectable, show_difference
from finetune.statistics.comparison import Comparison, Difference
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import show_score
from finetune.statistics.objective import VALIDATION

NO_DIFFERENCE = "no detectable difference"


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    is_significant: bool = False  # shown in bold


@dataclass(frozen=True)
class ScoreTable:
    """One metric's table."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    notes: list[str]


@dataclass(frozen=True)
class SummaryRow:
    """One run's cells in the table of all metrics; the base's row has neither label nor name."""

    run: str | None  # its label
    name: str | None
    cells: list[Cell]


@dataclass(frozen=True)
class Summary:
    """The table of all runs and metrics."""

    title: str
    columns: list[str]
    rows: list[SummaryRow]


def build_summary(results: Results) -> Summary:
    """Return all metrics in one table: the base, then a row for each run, the best marked."""
    swept = results.record.swept or ["run"]
    columns, leaders = [*swept, ""], [row["run"] for row in results.leaders()]
    for metric in results.metrics:
        columns += [metric, "difference"] if metric in results.comparisons else [metric]
    columns += ["validation loss"] if results.validated_rows() else []
    rows = []
    for row in results.rows:
        mark = "" if row["run"] not in leaders else "tied best" if len(leaders) > 1 else "best"
        cells = [Cell(str(row.get(key, ""))) for key in swept] + [Cell(mark)]
        for metric in results.metrics:
            cells += _summary_cells(results, row, metric)
        if results.validated_rows():
            cells.append(Cell(show_score(row[VALIDATION])))
        rows.append(SummaryRow(results.label(row), row["run"], cells))
    base = [cell for metric in results.metrics for cell in _base_cells(results, metric)]
    if any(cell.text for cell in base):
        base += [Cell("")] if results.validated_rows() else []
        rows.insert(0, SummaryRow(None, None, [Cell("base"), *[Cell("")] * len(swept), *base]))
    return Summary("All runs", columns, rows)


def _summary_cells(results: Results, row: Row, metric: str) -> Iterator[Cell]:
    score, comparison = row.get(metric), results.comparisons.get(metric)
    yield Cell("" if score is None else show_score(score))
    if comparison is not None:
        found = comparison.differences.get(row["run"])
        text = "" if found is None else show_difference(found.value, comparison)
        yield Cell(text, found is not None and found.is_significant)


def _base_cells(results: Results, metric: str) -> Iterator[Cell]:
    """Yield the base's score, where all runs have the same."""
    column = MetricName.parse(metric).base
    scores = {row[column] for row in results.rows if row.get(column) is not None}
    yield Cell(show_score(scores.pop()) if len(scores) == 1 else "")
    if metric in results.comparisons:
        yield Cell("")


def build_score_table(results: Results, metric: str) -> ScoreTable:
    """Return the table of a task/metric, with the comparison to the base if there is one."""
    comparison = results.comparisons.get(metric)
    notes = [_direction_note(results, metric)]
    if comparison is None:
        columns, rows = _score_rows(results, metric)
        return ScoreTable(metric, columns, rows, notes)
    grid = len(comparison.differences)
    chooses = results.selects if metric == results.main_metric else None
    unit = ", points" if comparison.is_share else ""
    columns = [
        "run", *(["selection score"] if chooses else []), "base", "tuned", f"difference{unit}",
        "95 %", "gained / lost", "p", *(["p, adjusted"] if grid > 1 else []),
    ]  # fmt: skip
    rows = []
    for row in results.rows:
        found = comparison.differences.get(row["run"])
        if found is not None:
            cells = list(_difference_cells(found, comparison))
            chosen = [Cell(show_score(row[chooses]))] if chooses else []
            rows.append([Cell(results.label(row)), *chosen, *cells])
    return ScoreTable(metric, columns, rows, [*notes, *_comparison_notes(comparison)])


def show_flips(found: Difference) -> str:
    """Return the numbers of gained and lost questions, or only of changed ones."""
    if found.gained is None or found.lost is None:
        return f"{found.changed} changed"
    return f"{found.gained} / {found.lost}"


def show_p(value: float) -> str:
    return "< .0001" if value < 0.0001 else f"{value:.4f}"


def _difference_cells(found: Difference, comparison: Comparison) -> Iterator[Cell]:
    yield Cell(show_score(found.base))
    yield Cell(show_score(found.tuned))
    has_adjusted = len(comparison.differences) > 1
    if not found.changed:
        yield Cell(NO_DIFFERENCE)
        yield from [Cell("")] * (4 if has_adjusted else 3)
        return
    yield Cell(show_difference(found.value, comparison), found.is_significant)
    yield Cell(show_range(found, comparison))
    yield Cell(show_flips(found))
    yield Cell(show_p(found.p))
    if has_adjusted:
        yield Cell(show_p(found.p_adjusted))


def show_range(found: Difference, comparison: Comparison) -> str:
    """Return the interval of a difference; empty where it has none."""
    if found.low is None or found.high is None:
        return ""
    low, high = (show_difference(value, comparison) for value in (found.low, found.high))
    return f"{low} to {high}"


def _score_rows(results: Results, metric: str) -> tuple[list[str], list[list[Cell]]]:
    """Return the scores of a metric that is not compared, with lm-eval's standard error."""
    name = MetricName.parse(metric)
    base = name.base
    scored = results.scored_rows(metric)
    has_base = any(row.get(base) is not None for row in scored)
    columns = ["run", *(["base"] if has_base else []), "tuned", "standard error"]

    def cells(row: Row) -> list[Cell]:
        error = row.get(name.stderr)
        before = [Cell(show_score(row.get(base)))] if has_base else []
        after = Cell(show_score(row[metric]))
        return [Cell(results.label(row)), *before, after, Cell(show_score(error))]

    return columns, [cells(row) for row in scored]


def _direction_note(results: Results, metric: str) -> str:
    higher = results.metrics[metric].higher_is_better
    if higher is None:
        return "lm-eval names no direction for this metric: it is shown, not ranked."
    return "Higher is better." if higher else "Lower is better."


def _comparison_notes(comparison: Comparison) -> Iterator[str]:
    differences = list(comparison.differences.values())
    grid = len(differences)
    runs = f"a grid of {grid}" if grid > 1 else "one run"
    yield f"{differences[0].questions} questions, each answered by base and tuned model; {runs}."
    if grid > 1:
        yield "Bold: significant after adjustment for the grid (adjusted p < .05)."
    elif any(found.is_significant for found in differences):
        yield "Bold: significant (p < .05)."
    if detectable := show_detectable(comparison):
        yield detectable


def describe_methods(results: Results) -> list[str]:
    """Return sentences on the methods behind the intervals and p of this report."""
    comparisons = results.comparisons.values()
    if not comparisons:
        return []
    lines = ["Base and tuned outcomes are paired by question."]
    if any(one.metric.is_mean for one in comparisons):
        lines.append(
            "Means: paired t interval; p by McNemar's mid-p where answers are right or wrong, else "
            "by the paired t-test; adjusted by max-T over the grid, flipping the signs of each "
            "question's changes for all runs together."
        )
    if any(not one.metric.is_mean for one in comparisons):
        lines.append(
            "Other aggregates (perplexity, mcc, f1, means of a group's tasks): percentile interval "
            "of a paired bootstrap over the questions of each task; p by swapping base and tuned "
            "answers of random questions; adjusted by max-T over the same swaps for all runs "
            "(by Holm where the runs' swaps cannot be joined)."
        )
    return lines
