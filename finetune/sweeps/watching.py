"""Watch a sweep that other processes run, from its folder: `python -m finetune.runs --watch`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from rich.console import Console
from rich.live import Live

from finetune.escaping import for_terminal
from finetune.problems import Refused, first_line
from finetune.reporting.tables import shorten_labels
from finetune.streams import is_gone
from finetune.sweeps.live import (
    REFRESH_SECONDS,
    Board,
    FindRuns,
    Row,
    Runs,
    is_settled,
    render_rows,
    summarise,
)
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.sweep_record import RECORD, SweepRecord, render_swept


def find_sweep(name: str, reports: Path) -> Path | None:
    """Return the folder of a sweep, by its path or name; the newest one where no name is given.

    Raises:
        Refused: there is no sweep of this name.
    """
    if name:
        for folder in (Path(name), reports / name):
            if (folder / RECORD).is_file():
                return folder
        sweeps = [path.parent.name for path in reports.glob(f"*/{RECORD}")]
        close = get_close_matches(Path(name).name, sweeps, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise Refused([f"no sweep {name}: {reports / name / RECORD} is missing{hint}"])
    records = list(reports.glob(f"*/{RECORD}"))
    return max(records, key=lambda path: path.stat().st_mtime).parent if records else None


def runs_of_sweep(folder: Path) -> FindRuns:
    """Return a function that reads a sweep's runs; its record is read again when it changes.

    A run that no worker has named its folder of yet has one that is not there.
    """
    seen: tuple[int, int] | None = None
    runs: Runs = []

    def find() -> Runs:
        nonlocal seen, runs
        try:
            file = os.stat(folder / RECORD)
        except OSError:  # the folder was moved: the runs may go on
            return runs
        if seen != (file.st_ino, file.st_mtime_ns):
            record = SweepRecord.load(folder)
            runs = [
                (render_swept(run.swept) or Path(run.folder).name, RunFolder(folder / run.folder))
                for run in record.runs
            ]
            seen = (file.st_ino, file.st_mtime_ns)
        return runs

    return find


def runs_of_folder(outputs: Path, is_run: Callable[[RunFolder], bool]) -> FindRuns:
    """Return a function that finds all runs in a folder."""

    def find() -> Runs:
        paths = sorted(outputs.glob("*"))
        return [(run.name, run) for path in paths if is_run(run := RunFolder(path))]

    return find


def watch(find_runs: FindRuns) -> None:
    """Show the runs until all are settled, or Ctrl-C: a table, or lines of what changed."""
    console = Console()
    try:
        if console.is_terminal:
            _show_table(find_runs, console)
        else:
            _print_changes(find_runs)
    except KeyboardInterrupt:  # nobody's failure: the runs go on
        return


def _show_table(find_runs: FindRuns, console: Console) -> None:
    """Refresh a table; its last state stays on the screen."""
    board = Board()
    rows = board.look(find_runs())

    with Live(
        get_renderable=lambda: render_rows(rows, console.width, console.height),
        console=console,
        auto_refresh=False,
    ) as live:
        live.refresh()
        while not is_settled(rows):
            time.sleep(REFRESH_SECONDS)
            rows = board.look(find_runs())
            live.refresh()


def _print_changes(find_runs: FindRuns) -> None:
    """Print a line for each change of a run's state, and a summary at the end."""
    board, states = Board(), dict[str, str]()
    while True:
        rows = board.look(find_runs())
        if not states:
            print(summarise(rows), flush=True)
        for line in describe_changes(rows, states):
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
        if is_settled(rows):
            print(summarise(rows), flush=True)
            return
        if is_gone(sys.stdout):
            return
        time.sleep(REFRESH_SECONDS)


def describe_changes(rows: Sequence[Row], states: dict[str, str]) -> list[str]:
    """Return a line for each run whose state, or worker, is another one than before.

    Args:
        rows: the runs now.
        states: by label, as described before; those that are met are recorded.
    """
    lines = []
    for row, label in zip(rows, shorten_labels([row.label for row in rows]), strict=True):
        run, state = row.run, _describe(row)
        if states.get(row.label, "waiting") != state:
            reason = f": {first_line(run.reason)}" if run.reason else ""
            lines.append(for_terminal(f"{label}: {state}{reason}"))
        states[row.label] = state
    return lines


def _describe(row: Row) -> str:
    """Return a run's state, with the worker that is at it."""
    run = row.run
    place = " of ".join(part for part in (run.worker, run.host) if part)
    return f"{run.state} on {place}" if place and run.process else run.state
