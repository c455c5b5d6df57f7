"""Live table of a sweep: state, worker, step, loss, speed, time left of each run, and a summary.

It is shown on a terminal or in a notebook, and read from the runs' folders alone, whoever works on
them and wherever.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.reporting.tables import add_row, build_table, shorten_labels, show_duration
from finetune.tracking.progress import (
    SETTLED,
    WORKING,
    FollowedRun,
    RunState,
    estimate_seconds_left,
)
from finetune.tracking.run_folder import RunFolder

REFRESH_SECONDS = 1.0
NUMBERS = ("step", "loss", "tokens/s", "time left")
NOTEBOOK_WIDTH, NOTEBOOK_ROWS = 120, 40
SHORTEST_LABEL = 12  # characters; for less, columns are left out
LONGEST_HOST = 12
LEFT_OUT = ("tokens/s", "loss", "worker", "time left")  # of a narrow terminal, in this order
# Which runs a table that is too short shows first; those that wait come last.
FIRST = ("running", "scoring", "trained", "lost", "failed", "diverged", "interrupted", "finished")
LOST = (
    "lost: no process has renewed its claim on the run; the sweep's command, started again, "
    "resumes it"
)

Runs = Sequence[tuple[str, RunFolder]]  # with their labels, the swept values
FindRuns = Callable[[], Runs]


@dataclass(frozen=True)
class Row:
    """A run's label, and its state now."""

    label: str
    run: RunState


class Board:
    """The runs of a sweep, followed; each look reads what has changed since the one before."""

    def __init__(self) -> None:
        self._followed: dict[Path, FollowedRun] = {}

    def look(self, runs: Runs) -> list[Row]:
        """Return the state of each run now."""
        return [Row(label, self._follow(run).look()) for label, run in runs]

    def _follow(self, run: RunFolder) -> FollowedRun:
        if run.path not in self._followed:
            self._followed[run.path] = FollowedRun(run)
        return self._followed[run.path]


def is_watched() -> bool:
    """Return whether standard error is a terminal or a notebook."""
    console = Console(stderr=True)
    return console.is_terminal or console.is_jupyter


def live_table(find_runs: FindRuns) -> AbstractContextManager[Any]:
    """Show the runs, by their labels, until the block ends; no table in a log file."""
    console, board = Console(stderr=True), Board()
    if console.is_jupyter:
        return _notebook_table(find_runs, board)
    if not console.is_terminal:
        return nullcontext()
    return _terminal_table(
        Live(
            get_renderable=lambda: render_rows(
                board.look(find_runs()), console.width, console.height
            ),
            console=console,
            refresh_per_second=1 / REFRESH_SECONDS,
            transient=True,
        )
    )


@contextmanager
def _terminal_table(live: Live) -> Iterator[None]:
    """Show a live table; what is logged to the terminal meanwhile is printed above it."""
    handlers = [
        one
        for one in logging.getLogger().handlers
        if isinstance(one, logging.StreamHandler) and one.stream.isatty()
    ]
    streams = [handler.stream for handler in handlers]
    with live:
        for handler in handlers:
            handler.setStream(sys.stderr)  # rich's, which knows where the table is
        try:
            yield
        finally:
            for handler, stream in zip(handlers, streams, strict=True):
                handler.setStream(stream)


@contextmanager
def _notebook_table(find_runs: FindRuns, board: Board) -> Iterator[None]:
    """Show the runs in a cell's output; rich's live table would need ipywidgets."""
    from IPython.display import display

    def render() -> Group:
        return render_rows(board.look(find_runs()), NOTEBOOK_WIDTH, NOTEBOOK_ROWS)

    shown = display(render(), display_id=True)
    is_over = threading.Event()

    def refresh() -> None:
        while not is_over.wait(REFRESH_SECONDS):
            shown.update(render())

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        shown.update(render())


def render_rows(rows: Sequence[Row], width: int, height: int) -> Group:
    """Return the table of the runs' current states, with a summary below.

    Args:
        rows: all runs, in the order of the grid.
        width: characters that a line has.
        height: lines that there are; where rows do not fit, those in progress are shown first.
    """
    below = [Text(summarise(rows))]
    if any(row.run.state == "lost" for row in rows):
        below.append(Text(LOST))
    lines = sum(-(-len(text) // width) for text in below)
    shown = _choose(rows, max(1, height - lines - 3))  # a heading, a count, the cursor's line
    if len(shown) < len(rows):
        below.insert(0, Text(_count_hidden(rows, shown)))
    return Group(_render_table(shown, width), *below)


def _choose(rows: Sequence[Row], room: int) -> list[Row]:
    """Return the rows that fit, those in progress first; all in the grid's order if they fit."""
    if len(rows) <= room:
        return list(rows)
    order = {state: number for number, state in enumerate(FIRST)}
    return sorted(rows, key=lambda row: order.get(row.run.state, len(FIRST)))[:room]


def _count_hidden(rows: Sequence[Row], shown: Sequence[Row]) -> str:
    hidden = Counter(row.run.state for row in rows) - Counter(row.run.state for row in shown)
    parts = ", ".join(f"{count} {state}" for state, count in hidden.items())
    return f"and {len(rows) - len(shown)} more: {parts}"


def _render_table(rows: Sequence[Row], width: int) -> Table:
    """Return the table of rows, of at most so many characters."""
    hosts = {row.run.host for row in rows if row.run.host}
    cells = [_cells(row, names_host=len(hosts) > 1) for row in rows]
    names = ["state", "worker", *NUMBERS]
    if not any(one["worker"] for one in cells):
        names.remove("worker")
    widths = {name: max(cell_len(one[name]) for one in [{name: name}, *cells]) for name in names}
    for name in LEFT_OUT:
        if _room(width, widths) >= SHORTEST_LABEL:
            break
        widths.pop(name, None)
    room = max(1, _room(width, widths))
    table = build_table("run", *widths, right=NUMBERS)
    for label, one in zip(shorten_labels([row.label for row in rows]), cells, strict=True):
        add_row(table, _cut(label, room), *(one[name] for name in widths))
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    return table


def _room(width: int, widths: dict[str, int]) -> int:
    """Return the characters that are left for labels; columns are two spaces apart."""
    return width - sum(widths.values()) - 2 * len(widths)


def _cells(row: Row, *, names_host: bool) -> dict[str, str]:
    """Return the text of each column but the first."""
    run, now = row.run, row.run.progress
    host = _cut(run.host.partition(".")[0], LONGEST_HOST) if names_host else ""
    speed, left = now.tokens_per_second, now.seconds_left
    return {
        "state": run.state,
        "worker": f"{host} {run.worker}".strip(),
        "step": f"{now.step}/{now.max_steps}" if now.max_steps else "",
        "loss": "" if now.loss is None else f"{now.loss:.3f}",
        "tokens/s": "" if speed is None else f"{speed:.0f}",
        "time left": "" if left is None else show_duration(left),
    }


def _cut(text: str, width: int) -> str:
    """Return a text of at most so many characters, its middle left out."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def summarise(rows: Sequence[Row]) -> str:
    """Return how many runs are in each state, and about how much time is left."""
    states = Counter(row.run.state for row in rows)
    working = sum(states[state] for state in WORKING)
    workers = {row.run.process for row in rows if row.run.process is not None}
    on = f" on {len(workers)} worker{'s' * (len(workers) != 1)}" if workers else ""
    parts = [f"{states['finished']} finished", f"{working} running{on}"]
    if states["trained"]:
        parts.append(f"{states['trained']} trained")
    parts.append(f"{states['waiting']} waiting")
    shown = ("finished", *WORKING, "trained", "waiting")
    parts += [f"{states[state]} {state}" for state in sorted(states) if state not in shown]
    left = estimate_seconds_left([row.run for row in rows])
    return ", ".join(parts) + ("" if left is None else f"; about {show_duration(left)} left")


def is_settled(rows: Sequence[Row]) -> bool:
    """Return whether every run has come to an end of its own."""
    return all(row.run.state in SETTLED for row in rows)
