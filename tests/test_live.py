"""The live table says what the event logs say, and only to a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from finetune.reporting.tables import shorten_labels
from finetune.sweeps.live import Board, Row, live_table, render_rows, summarise
from finetune.tracking.events import EventLog
from finetune.tracking.progress import EventTail, Progress, RunState
from finetune.tracking.run_folder import RunFolder, Status
from tests.conftest import TINY, last_of_each


def shown(runs: list[tuple[str, RunFolder]]) -> str:
    """Return the table as text."""
    return drawn(Board().look(runs), 100, 40)


def drawn(rows: Sequence[Row], width: int, height: int) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(render_rows(rows, width, height))
    return captured.get()


def training(step: int, worker: str, host: str, seconds_left: float = 61.0) -> RunState:
    progress = Progress(step, 1000, 2.3456, 1234.0, seconds_left)
    return RunState("running", worker, host, (host, 100 + step), progress)


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
    progress = EventTail(run.events).read()
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
    with live_table(lambda: [("a", RunFolder(tmp_path))]):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_grid_fits_a_terminal_of_80_columns() -> None:
    """Labels lose their sections and, if need be, their middle; the hosts are named in short."""
    rows = [
        Row("lora.r=16 optimizer.lr=0.0002 training.seed=1", training(9, "GPU 0", "node3.cluster")),
        Row("lora.r=32 optimizer.lr=0.0002 training.seed=1", training(8, "GPU 1", "node4.cluster")),
        Row("lora.r=64 optimizer.lr=0.0002 training.seed=1", RunState()),
    ]
    lines = drawn(rows, 80, 24).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == [
        "run", "state", "worker", "step", "loss", "tokens/s", "time", "left",
    ]  # fmt: skip
    assert lines[1].startswith("r=16 lr")
    assert "seed=1  running  node3 GPU 0  9/1000  2.346      1234       61 s" in lines[1]
    assert lines[4] == "0 finished, 2 running on 2 workers, 1 waiting; about 92 s left"
    longer = [Row(f"{row.label} data.path=alpaca", row.run) for row in rows]
    assert drawn(longer, 80, 24).splitlines()[1].startswith("r=16 lr=0.0…ath=alpaca  running")
    for width in (60, 40, 20):
        assert max(map(len, drawn(rows, width, 24).splitlines())) <= width
    one_host = [Row(row.label, replace(row.run, host="node3")) for row in rows]
    assert "node3" not in drawn(one_host, 80, 24)


def test_of_many_runs_those_in_progress_are_shown_first() -> None:
    """The others are counted; the table is never longer than the terminal."""
    rows = [Row(f"lora.r={n}", RunState()) for n in range(240)]
    rows[3] = Row("lora.r=3", RunState("finished", seconds=120.0))
    rows[200] = Row("lora.r=200", training(1, "GPU 0", "node"))
    rows[210] = Row("lora.r=210", RunState("failed"))
    rows[220] = Row("lora.r=220", RunState("lost"))
    lines = drawn(rows, 80, 24).splitlines()
    assert len(lines) < 24
    assert [line.split()[0] for line in lines[1:5]] == ["r=200", "r=220", "r=210", "r=3"]
    assert [line for line in lines if line.startswith("and ")] == ["and 223 more: 223 waiting"]
    below = " ".join(" ".join(lines[-4:]).split())
    assert "1 finished, 1 running on 1 worker, 236 waiting, 1 failed, 1 lost; about " in below
    assert "7.9 h left" in below
    assert "lost: no process has renewed its claim on the run; " in below


def test_keys_that_end_alike_keep_their_sections() -> None:
    """Short labels still tell the swept keys apart."""
    assert shorten_labels(["a.r=1 b.r=2 c.lr=3"]) == ["a.r=1 b.r=2 lr=3"]
    assert shorten_labels(["tiny-lora-r4"]) == ["tiny-lora-r4"]
    assert shorten_labels(["data.path=x.y=1"]) == ["path=x.y=1"]


def test_workers_are_counted_by_their_processes() -> None:
    """Two nodes may each have a GPU 0, and one worker trains several runs together."""
    states = [
        RunState("running", "GPU 0", "node1", ("node1", 5)),
        RunState("scoring", "GPU 0", "node2", ("node2", 5)),
        RunState("running", "GPU 0", "node2", ("node2", 5)),
        RunState("trained", "GPU 0", "node2"),
    ]
    rows = [Row(str(number), state) for number, state in enumerate(states)]
    assert summarise(rows) == "0 finished, 3 running on 2 workers, 1 trained, 0 waiting"


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


LOGGED = """
import logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from pathlib import Path
from finetune.sweeps.live import live_table
from finetune.tracking.run_folder import RunFolder
with live_table(lambda: [("lora.r=4", RunFolder(Path("run")))]):
    for number in range(2):
        time.sleep(1.2)
        logging.info("line %d", number)
logging.info("after it")
"""


def test_what_is_logged_stands_above_the_table(tmp_path: Path) -> None:
    """Written into the table, each line would leave a copy of the table's head behind."""
    ours, theirs = pty.openpty()
    size = struct.pack("HHHH", 24, 80, 0, 0)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    terminal = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", LOGGED], cwd=tmp_path, stdout=theirs, stderr=theirs, env=terminal
    )
    process.wait()
    os.close(theirs)
    written = os.read(ours, 65536).decode()
    os.close(ours)
    # A line of text never follows the table's last line: the cursor is moved up before it.
    assert "0 finished, 0 running, 1 waiting" in written
    for number in range(2):
        before, _, _ = written.partition(f"line {number}")
        assert before.endswith(("\n", "\x1b[2K")), repr(before[-40:])
    assert written.endswith("after it\r\n")
