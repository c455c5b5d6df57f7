"""The live table says what the event logs say, and only to a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from finetune.sweeps.live import live_table, read_progress, render_runs
from finetune.tracking.events import EventLog
from finetune.tracking.run_folder import RunFolder, Status
from tests.conftest import TINY, last_of_each


def shown(runs: list[tuple[str, RunFolder]]) -> str:
    """Return the table as text."""
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render_runs(runs))
    return captured.get()


def test_progress_is_read_from_the_events(tmp_path: Path) -> None:
    """Step, loss, speed and time left of a run, from its own log; others wait."""
    run = RunFolder(tmp_path / "run")
    run.write_status(Status("running"))
    events = EventLog(run.events)
    assert "running" in shown([("lora.r=4", run)])
    events.tag("train.max_steps", "100")
    events.tag("train.num_tokens", "5000")
    events.close()
    with run.events.open("a") as file:
        for step in (1, 2, 3):
            file.write(
                f'{{"event": "metric", "key": "train/loss", "value": {2 / step}, "step": {step}, '
                f'"time": {1000 * step}}}\n'
            )
    progress = read_progress(run)
    assert (progress.step, progress.max_steps, progress.loss) == (3, 100, 2 / 3)
    assert progress.tokens_per_second == pytest.approx(50)
    assert progress.seconds_left == pytest.approx(97)
    table = shown([("lora.r=4", run), ("lora.r=8", RunFolder(tmp_path / "other"))])
    assert "3/100" in table
    assert "97 s" in table
    assert "waiting" in table


def test_nothing_is_shown_where_nobody_watches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logs keep plain lines."""
    with live_table([("a", RunFolder(tmp_path))]):
        pass
    assert capsys.readouterr() == ("", "")


LONGER = ("data.num_examples=400", "training.batch_size=2")  # than the table takes to be drawn


@pytest.mark.slow
def test_a_terminal_shows_the_runs_as_they_go(tmp_path: Path) -> None:
    """On a terminal the table is there, and no bar of the worker breaks it."""
    ours, theirs = pty.openpty()
    sweep = subprocess.Popen(
        [sys.executable, "-m", "finetune", *last_of_each((*TINY, *LONGER)), "lora.r=2,4", "-m"],
        cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the terminal is closed by its last user
            break
        if not part:
            break
        seen += part
    assert sweep.wait(timeout=200) == 0
    assert b"tokens/s" in seen
    assert b"waiting" in seen
    assert b"it/s" not in seen
    assert b"step/s" not in seen
