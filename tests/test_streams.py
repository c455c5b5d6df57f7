"""Output that nobody reads any more costs nothing but itself."""

from __future__ import annotations

import ast
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from io import BufferedWriter, TextIOWrapper
from pathlib import Path

import pytest
from rich.console import Console
from tqdm import tqdm

from finetune.streams import LastingOutput, is_gone
from tests.conftest import TINY, last_of_each

COMMANDS = ("__main__", "chat", "export", "memory", "preview", "report", "rerun", "runs", "sync")
Opened = tuple[int, Callable[[], None]]  # a descriptor to write to, and what takes its reader away


def closed_pipe() -> Opened:
    reader, writer = os.pipe()
    return writer, lambda: os.close(reader)


def closed_terminal() -> Opened:
    master, terminal = pty.openpty()
    return terminal, lambda: os.close(master)


def full_disk() -> Opened:
    return os.open("/dev/full", os.O_WRONLY), lambda: None


def closed_descriptor() -> Opened:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    return descriptor, lambda: os.close(descriptor)


def write_everything(stream: TextIOWrapper) -> None:
    """Write as this project and its libraries do."""
    for _ in tqdm(range(20), file=stream, mininterval=0):
        print("a line", file=stream, flush=True)
    Console(file=stream).print("[bold]a table[/bold]")
    handler = logging.StreamHandler(stream)
    handler.emit(logging.LogRecord("finetune", logging.INFO, "", 0, "a line", None, None))
    stream.write("é" * 100_000)
    stream.flush()


@pytest.mark.parametrize(
    "opened", [closed_pipe, closed_terminal, full_disk, closed_descriptor], ids=lambda f: f.__name__
)
def test_what_cannot_be_written_is_dropped(
    opened: Callable[[], Opened], capfd: pytest.CaptureFixture[str]
) -> None:
    """Progress bars, tables, log lines and prints end without an error, on screen too."""
    descriptor, take_away = opened()
    raw = LastingOutput(descriptor, "w", closefd=False)
    stream = TextIOWrapper(BufferedWriter(raw), encoding="utf-8", line_buffering=True)
    stream.write("while it is there\n") if opened is not full_disk else None
    take_away()
    write_everything(stream)
    assert is_gone(stream) == (opened is not full_disk)  # a disk may have room again
    stream.close()
    os.close(descriptor)
    assert "Traceback" not in capfd.readouterr().err


def test_a_slow_reader_loses_nothing() -> None:
    """A pipe that another process made non-blocking is waited for."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    read: list[bytes] = []

    def drain() -> None:
        while part := os.read(reader, 4096):
            read.append(part)

    slow = threading.Thread(target=drain)
    raw = LastingOutput(writer, "w", closefd=False)
    stream = TextIOWrapper(BufferedWriter(raw), encoding="ascii")
    threading.Timer(0.1, slow.start).start()
    stream.write("x" * 300_000)
    stream.close()
    os.close(writer)
    slow.join(10)
    os.close(reader)
    assert sum(map(len, read)) == 300_000


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_keeps_its_streams_first(name: str) -> None:
    """No command prints before its output is safe."""
    path = Path(__file__).parents[1] / "finetune" / f"{name}.py"
    (main,) = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    assert ast.unparse(main.body[1]) == "keep_streams()"


SCRIPT = """
import os, sys
from finetune.streams import keep_streams
keep_streams()
for _ in range(9999):
    print("a line")
    print("another", file=sys.stderr)
opened = open(os.devnull)
os.write(3, str(opened.fileno()).encode())
"""


@pytest.mark.parametrize("shell", ["2>&1 | head -1", "| head -1", ">&- 2>&-", ">/dev/full 2>&1"])
@pytest.mark.parametrize("flag", ["", "-u"])
def test_a_process_ends_as_if_it_were_read(shell: str, flag: str) -> None:
    """Exit code 0 and no word at the interpreter's end; no file is given a stream's number."""
    reader, writer = os.pipe()
    command = f'"$0" {flag} -c "$1" 3>&{writer} {shell}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, SCRIPT], pass_fds=[writer], capture_output=True
    )
    os.close(writer)
    assert done.returncode == 0
    assert b"Exception" not in done.stderr
    assert int(os.read(reader, 100)) > 2
    os.close(reader)


@pytest.mark.parametrize(
    ("error", "is_told"), [("KeyboardInterrupt", False), ("RuntimeError", True)]
)
def test_ctrl_c_prints_no_traceback(error: str, is_told: bool) -> None:
    """In any command, at any moment; a fault of the program does."""
    script = f"from finetune.streams import keep_streams\nkeep_streams()\nraise {error}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode in (-2, 1)
    assert done.stderr.startswith("Traceback") == is_told
    assert bool(done.stderr) == is_told


def test_a_list_of_runs_may_be_cut_short(tmp_path: Path) -> None:
    """`python -m finetune.runs | head -1` of more than a pipe holds."""
    for number in range(400):
        folder = tmp_path / "outputs" / f"run-{number:03}-{'x' * 150}"
        folder.mkdir(parents=True)
        (folder / "status.json").write_text('{"state": "finished"}', encoding="utf-8")
    command = '"$0" -m finetune.runs | head -1; exit ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# Makes its input the controlling terminal of a session of its own, and runs a command there.
IN_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "shell", [(), ("bash", "-c", '"$@"; true', "bash")], ids=["", "of-a-shell"]
)
def test_a_sweep_goes_on_when_its_terminal_is_closed(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    """Its runs, table and report are finished, with exit code 0."""
    master, terminal = pty.openpty()
    sweep = (
        sys.executable, "-m", "finetune", *last_of_each((*TINY, "data.num_examples=32")),
        "evaluation=none", "training.epochs=6",
        "lora.r=2,4", "optimizer.lr=1e-3", "--multirun",
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, *shell, *sweep], cwd=tmp_path,
        stdin=terminal, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    logs = tmp_path / "outputs"
    while not any("train/loss" in log.read_text() for log in logs.glob("*/events.jsonl")):
        assert process.poll() is None
        os.read(master, 4096)  # a terminal that is full would halt it
    os.close(master)
    code = process.wait(timeout=120)
    assert code == (-signal.SIGHUP if shell else 0)  # of the shell, or of the sweep
    end = time.monotonic() + 120  # the sweep, which is not waited for where a shell started it
    while states(tmp_path) != ["finished"] * 2 or not any(tmp_path.rglob("report.html")):
        assert time.monotonic() < end
        time.sleep(0.1)


def states(folder: Path) -> list[str]:
    """Return the recorded states of all runs."""
    files = folder.glob("outputs/*/status.json")
    return [json.loads(path.read_text())["state"] for path in files]
