"""A second terminal watches a sweep from its folder, and starts nothing."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import runs
from finetune.problems import Refused
from finetune.sweeps import watching
from finetune.sweeps.live import Row
from finetune.sweeps.watching import describe_changes, find_sweep, runs_of_sweep
from finetune.tracking.progress import RunState
from finetune.tracking.run_folder import RunFolder, Status
from finetune.tracking.sweep_record import RunRecord, SweepRecord
from tests.test_progress import write_losses, write_size, writer


def write_record(reports: Path, name: str, folders: dict[str, str]) -> Path:
    """Write the record of a sweep over `lora.r`, a folder for each of its values."""
    found = [RunRecord(folder, {"lora.r": value}) for value, folder in folders.items()]
    (reports / name).mkdir(parents=True, exist_ok=True)
    SweepRecord(name, [], ["lora.r"], [], found).write(reports / name)
    return reports / name


def write_finished(run: RunFolder) -> None:
    run.write_json("environment.json", {"versions": {}, "host": "node1", "worker": "GPU 0"})
    write_size(run.events, 100)
    write_losses(run.events, range(1, 101))
    run.write_status(Status("finished", started=5.0, ended=105.0))


def test_the_newest_sweep_is_watched_unless_another_is_named(tmp_path: Path) -> None:
    """By its name or its folder; a name that is none is refused, with one like it."""
    assert find_sweep("", tmp_path) is None
    for age, name in enumerate(("newer", "older")):
        folder = write_record(tmp_path, name, {})
        os.utime(folder / "sweep.yaml", (1000 - age, 1000 - age))
    assert find_sweep("", tmp_path) == tmp_path / "newer"
    assert find_sweep("older", tmp_path) == tmp_path / "older"
    assert find_sweep(str(tmp_path / "older"), Path("elsewhere")) == tmp_path / "older"
    with pytest.raises(Refused, match=r"no sweep oldest.*did you mean older"):
        find_sweep("oldest", tmp_path)


def test_a_run_without_a_folder_yet_waits_until_a_worker_names_it(tmp_path: Path) -> None:
    """The record is read again when it changes, and kept when it is gone."""
    folder = write_record(tmp_path, "sweep", {"4": "jobs/1a2b", "8": "jobs/3c4d"})
    find = runs_of_sweep(folder)
    assert [(label, run.path.name) for label, run in find()] == [
        ("lora.r=4", "1a2b"), ("lora.r=8", "3c4d"),
    ]  # fmt: skip
    assert find() is find()
    write_record(tmp_path, "sweep", {"4": "../outputs/run-4", "8": "jobs/3c4d"})
    assert [run.path.name for _, run in find()] == ["run-4", "3c4d"]
    (folder / "sweep.yaml").unlink()
    assert len(find()) == 2


def test_a_change_of_state_or_worker_is_a_line() -> None:
    """Not one of a step."""
    states: dict[str, str] = {}

    def change(run: RunState) -> list[str]:
        return describe_changes([Row("lora.r=4", run)], states)

    assert change(RunState()) == []
    first = RunState("running", "GPU 0", "node1", ("node1", 5))
    assert change(first) == ["r=4: running on GPU 0 of node1"]
    assert change(first) == []
    assert change(RunState("lost", "GPU 0", "node1")) == ["r=4: lost"]
    second = RunState("running", "GPU 1", "node2", ("node2", 5))
    assert change(second) == ["r=4: running on GPU 1 of node2"]
    assert change(RunState("failed", reason="out of memory\x1b\nmore")) == [
        "r=4: failed: out of memory\\x1b"
    ]


WATCH = [sys.executable, "-m", "finetune.runs", "--watch"]


def wait_until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_without_a_terminal_a_line_is_printed_for_each_change(tmp_path: Path) -> None:
    """Two processes run the sweep, on hosts of two names; it ends when all runs are settled."""
    names = {"4": "../../outputs/run-4", "8": "../../outputs/run-8", "16": "jobs/5e6f"}
    write_record(tmp_path / "multirun_reports", "sweep", names)
    done = [RunFolder(tmp_path / "outputs" / f"run-{r}") for r in (4, 8)]
    log = tmp_path / "log"
    with (
        writer(done[0].path, "node1", 0, 1, 10),
        writer(done[1].path, "node2", 3600, 1, 10),
        log.open("w") as output,
        subprocess.Popen(WATCH, cwd=tmp_path, stdout=output, stderr=output) as watched,
    ):
        wait_until(lambda: log.read_text().count("\n") == 3)
        write_finished(done[0])
        done[1].write_status(Status("failed", "out of memory", 5.0, 105.0))
        write_record(
            tmp_path / "multirun_reports", "sweep", {**names, "16": "../../outputs/run-16"}
        )
        write_finished(RunFolder(tmp_path / "outputs" / "run-16"))
        assert watched.wait(timeout=30) == 0
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in log.read_text().splitlines()]
    assert lines[0].startswith("0 finished, 2 running on 2 workers, 1 waiting; about ")
    assert lines[1:3] == ["r=4: running on GPU 0 of node1", "r=8: running on GPU 0 of node2"]
    assert set(lines[3:-1]) == {"r=4: finished", "r=8: failed: out of memory", "r=16: finished"}
    assert lines[-1] == "2 finished, 0 running, 0 waiting, 1 failed"


def test_a_terminal_shows_the_table_until_ctrl_c(tmp_path: Path) -> None:
    """At 80 columns no line is wrapped; Ctrl-C is no failure, and touches no run."""
    folder = write_record(
        tmp_path / "multirun_reports", "sweep",
        {"4": "../../outputs/run-4", "8": "../../outputs/run-8", "16": "jobs/5e6f"},
    )  # fmt: skip
    write_finished(RunFolder(tmp_path / "outputs" / "run-4"))
    working = RunFolder(tmp_path / "outputs" / "run-8")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with (
        writer(working.path, "node2", 0, 1, 10),
        subprocess.Popen(
            [*WATCH, folder.name], cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
        ) as watched,
    ):  # fmt: skip
        os.close(theirs)
        claim, seen = working.claim.read_bytes(), b""
        while b"1 waiting" not in seen:
            seen += os.read(ours, 65536)
        watched.send_signal(signal.SIGINT)
        assert watched.wait(timeout=30) == 0
        assert working.claim.read_bytes() == claim
    os.close(ours)
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode()).replace("\r", "")
    lines = [line.rstrip() for line in screen.splitlines()]
    assert [line.split() for line in lines[:4]] == [
        ["run", "state", "worker", "step", "loss", "tokens/s", "time", "left"],
        ["r=4", "finished", "node1", "GPU", "0", "100/100", "1.000"],
        ["r=8", "running", "node2", "GPU", "0", "10/100", "0.500", "50", "90", "s"],
        ["r=16", "waiting"],
    ]
    assert lines[4] == "1 finished, 1 running on 1 worker, 1 waiting; about 3 min left"
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch"], "no sweep in multirun_reports/, and no runs in outputs/, to watch"),
        (["--watch", "name"], "no sweep name: multirun_reports/name/sweep.yaml is missing"),
        (["--watch", "--outputs", "x"], "and no runs in x/, to watch"),
    ],
)
def test_nothing_to_watch_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """In one line, with exit code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["runs", *arguments])
    with pytest.raises(SystemExit) as ended:
        runs.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_of_a_folder_are_watched_where_there_is_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their names, until all are settled."""
    write_finished(RunFolder(tmp_path / "outputs" / "tiny-lora-r4"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watching, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(sys, "argv", ["runs", "--watch"])
    runs.main()
    assert "tiny-lora-r4: finished" in capsys.readouterr().out


def test_the_list_names_worker_and_host_and_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the remedy; a run of an older release has neither."""
    write_finished(RunFolder(tmp_path / "outputs" / "run-1"))
    RunFolder(tmp_path / "outputs" / "run-2").write_status(Status("running"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["runs"])
    runs.main()
    told = capsys.readouterr()
    lines = [line.split() for line in told.out.splitlines()]
    assert lines[0] == ["run", "state", "step", "loss", "worker", "host", "ended"]
    assert lines[1][:7] == ["run-1", "finished", "100/100", "1.000", "GPU", "0", "node1"]
    assert lines[2] == ["run-2", "lost"]
    assert "started again, resumes it" in told.err
