"""Tables of a sweep's end on the terminal: training, and below it each task under its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.console import Group
from rich.table import Table
from rich.text import Text

from finetune.escaping import for_terminal
from finetune.reporting.results import Results
from finetune.reporting.rows import MEAN_LOSS, Row
from finetune.reporting.tables import (
    add_row,
    build_table,
    find_width,
    shorten_keys,
    show_duration,
)
from finetune.statistics.comparison import LEVEL
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import show_score
from finetune.statistics.objective import VALIDATION
from finetune.tracking.run_names import shorten_names

SIGNIFICANT = "* significant: p < .05, adjusted for the number of runs"


@dataclass(frozen=True)
class Column:
    """A heading, and a cell for each row."""

    heading: str
    cells: Sequence[str]
    is_number: bool = False

    @property
    def lines(self) -> list[str]:
        """All lines of its cells, for their width."""
        return [self.heading, *(line for cell in self.cells for line in cell.split("\n"))]


def render_end(results: Results, width: int) -> Group:
    """Return the tables of a sweep's end, each of at most so many characters where that can be.

    A task with more metrics than a line holds has several tables.
    """
    parts: list[str | Table] = [
        _build([*_name_runs(results.rows, results, width), *_training_columns(results)])
    ]
    for task in dict.fromkeys(MetricName.parse(metric).task for metric in results.metrics):
        metrics = [one for one in results.metrics if MetricName.parse(one).task == task]
        parts += ["", task, *_task_tables(results, metrics, width)]
    if any(_is_significant(row, metric) for row in results.rows for metric in results.metrics):
        parts.append(SIGNIFICANT)
    return Group(*(Text(for_terminal(one)) if isinstance(one, str) else one for one in parts))


def _name_runs(rows: Sequence[Row], results: Results, width: int) -> list[Column]:
    """Return the columns that name runs: swept values, or the name of a single run."""
    swept = results.record.swept
    if not swept:
        names = [str(row["run"]) for row in rows]
        is_long = max(map(len, names), default=0) > width // 2
        return [Column("run", shorten_names(names) if is_long else names)]
    columns = [Column(key, [str(row.get(key, "")) for row in rows]) for key in swept]
    if _width(columns) <= width // 2:
        return columns
    short = shorten_keys(swept)
    return [Column(short[one.heading], one.cells) for one in columns]


def _training_columns(results: Results) -> Iterator[Column]:
    rows = results.rows
    yield Column("status", [str(row["status"]) for row in rows])
    yield Column("mean loss", [_show_loss(row[MEAN_LOSS]) for row in rows], is_number=True)
    if results.validated_rows():
        losses = [_show_loss(row[VALIDATION]) for row in rows]
        yield Column("validation loss", losses, is_number=True)
    seconds = [row["train_seconds"] for row in rows]
    times = ["" if one is None else show_duration(one) for one in seconds]
    yield Column("train time", times, is_number=True)


def _show_loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _task_tables(results: Results, metrics: Sequence[str], width: int) -> Iterator[Table]:
    """Yield the tables of one task: a row for the base, where all runs have the same, and runs."""
    rows = [row for row in results.rows if any(row.get(one) is not None for one in metrics)]
    bases = {metric: _find_base(rows, metric) for metric in metrics}
    names, has_row = _name_runs(rows, results, width), any(bases.values())
    if has_row:
        names = [
            Column(one.heading, ["" if place else "base", *one.cells])
            for place, one in enumerate(names)
        ]
    line: list[Column] = []
    for metric, base in bases.items():
        cells = [_score_cell(row, metric, has_base_row=bool(base)) for row in rows]
        cells = [f"{base} ", *cells] if has_row else cells
        column = Column(MetricName.parse(metric).name, cells, is_number=True)
        if line and _width([*names, *line, column]) > width:
            yield _build([*names, *line])
            line = []
        line.append(column)
    yield _build([*names, *line])


def _find_base(rows: Sequence[Row], metric: str) -> str:
    """Return the base's score, if all runs have the same one."""
    scores = {row.get(MetricName.parse(metric).base) for row in rows}
    return show_score(scores.pop()) if len(scores) == 1 and None not in scores else ""


def _score_cell(row: Row, metric: str, *, has_base_row: bool) -> str:
    """Return a run's score, with its difference to the base's below it."""
    tuned, base = row.get(metric), row.get(MetricName.parse(metric).base)
    if tuned is None or base is None:
        return "" if tuned is None else show_score(tuned)
    difference = tuned - base
    shown = f"{difference:+.4f}" if abs(difference) < 1000 else f"{difference:+.5g}"
    before = "" if has_base_row else f"{show_score(base)} -> "
    mark = "*" if _is_significant(row, metric) else " "
    return f"{before}{show_score(tuned)} \n{shown}{mark}"


def _is_significant(row: Row, metric: str) -> bool:
    return (row.get(MetricName.parse(metric).p_adjusted) or 1.0) < LEVEL


def _width(columns: Sequence[Column]) -> int:
    return find_width(list(zip_longest(*(one.lines for one in columns), fillvalue="")))


def _build(columns: Sequence[Column]) -> Table:
    right = [one.heading for one in columns if one.is_number]
    table = build_table(*(one.heading for one in columns), right=right)
    for cells in zip(*(one.cells for one in columns), strict=True):
        add_row(table, *cells)
    return table
