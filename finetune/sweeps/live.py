"""Live table of a running sweep: state, step, loss, speed, time left of each run.

It is shown on a terminal or in a notebook, and read from the runs' event logs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from finetune.reporting.tables import add_row, build_table
from finetune.tracking.events import read_events, select_metric
from finetune.tracking.run_folder import RunFolder

SPEED_STEPS = 20  # newest steps, over which speed is measured
REFRESH_SECONDS = 1.0  # in a notebook


def is_watched() -> bool:
    """Return whether standard error is a terminal or a notebook."""
    console = Console(stderr=True)
    return console.is_terminal or console.is_jupyter


def live_table(runs: Sequence[tuple[str, RunFolder]]) -> AbstractContextManager[Any]:
    """Show the runs, by their labels, until the block ends; no table in a log file."""
    console = Console(stderr=True)
    if console.is_jupyter:
        return _notebook_table(runs)
    if not console.is_terminal:
        return nullcontext()
    return Live(
        get_renderable=lambda: render_runs(runs),
        console=console,
        refresh_per_second=1,
        transient=True,
    )


@contextmanager
def _notebook_table(runs: Sequence[tuple[str, RunFolder]]) -> Iterator[None]:
    """Show the runs in a cell's output; rich's live table would need ipywidgets."""
    from IPython.display import display

    shown = display(render_runs(runs), display_id=True)
    is_over = threading.Event()

    def refresh() -> None:
        while not is_over.wait(REFRESH_SECONDS):
            shown.update(render_runs(runs))

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        shown.update(render_runs(runs))


@dataclass(frozen=True)
class Progress:
    """The progress of one run's training."""

    step: int = 0
    max_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None


def render_runs(runs: Sequence[tuple[str, RunFolder]]) -> Table:
    """Return the table of the runs' current states."""
    numbers = ("step", "loss", "tokens/s", "time left")
    table = build_table("run", "state", *numbers, right=numbers)
    for label, run in runs:
        status = run.status()
        state: str = status.state if status else "waiting"
        now = read_progress(run)
        if state == "running" and run.read_json("training.json") is not None:
            state = "scoring"
        add_row(
            table,
            label,
            state,
            f"{now.step}/{now.max_steps}" if now.max_steps else "",
            "" if now.loss is None else f"{now.loss:.3f}",
            f"{now.tokens_per_second:.0f}" if now.tokens_per_second and state == "running" else "",
            f"{now.seconds_left:.0f} s" if now.seconds_left and state == "running" else "",
        )
    return table


def read_progress(run: RunFolder) -> Progress:
    """Read a run's progress and speed from its event log."""
    events = list(read_events(run.events))
    losses = select_metric(events, "train/loss")
    tags = {event["key"]: event["value"] for event in events if event["event"] == "tag"}
    max_steps = _count(tags.get("train.max_steps"))
    if not losses or max_steps is None:
        return Progress(max_steps=max_steps)
    newest = losses[-SPEED_STEPS:]
    step, seconds = losses[-1].step, (newest[-1].time - newest[0].time) / 1000
    if len(newest) < 2 or seconds <= 0:
        return Progress(step, max_steps, losses[-1].value)
    num_tokens = _count(tags.get("train.num_tokens"))
    steps_per_second = (step - newest[0].step) / seconds
    return Progress(
        step,
        max_steps,
        losses[-1].value,
        steps_per_second * num_tokens / max_steps if num_tokens and max_steps else None,
        (max_steps - step) / steps_per_second if steps_per_second else None,
    )


def _count(tag: str | None) -> int | None:
    """Return a tag's number; None where its line was damaged."""
    return int(tag) if tag is not None and tag.isdecimal() else None
