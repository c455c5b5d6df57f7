"""Progress is read from what runs leave in their folders, by any process on any host."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune import files
from finetune.tracking import claims, events, progress
from finetune.tracking.claims import Watch, claimed
from finetune.tracking.progress import (
    EventTail,
    FollowedRun,
    Progress,
    RunState,
    estimate_seconds_left,
    look_once,
)
from finetune.tracking.run_folder import RunFolder, Status

# Holds a run on a host of the given name whose clock is wrong, and trains it to a step.
WRITER = """
import os, socket, sys, time
folder, host, late, first, last = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
socket.gethostname = lambda: host
from pathlib import Path
from finetune.tracking import events
from finetune.tracking.run_folder import RunFolder, Status
run = RunFolder(Path(folder))
with run.claimed() as claim:
    run.write_json("environment.json", {"versions": {}, "host": host, "worker": "GPU 0"})
    run.write_status(Status("running", started=time.time() + late))
    log = events.EventLog(run.events, claim)
    log.tag("train.max_steps", "100")
    log.tag("train.num_tokens", "5000")
    for step in range(first, last + 1):
        events._now_ms = lambda: (late + step) * 1000  # a step a second
        log.metrics({"train/loss": 5 / step}, step)
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(9)  # as a killed one does
"""


@contextmanager
def writer(folder: Path, host: str, *numbers: int) -> Iterator[subprocess.Popen[str]]:
    """Start a process that trains a run, and then holds it."""
    command = [sys.executable, "-c", WRITER, str(folder), host, *map(str, numbers)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_run_that_another_host_resumes_has_the_speed_of_that_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clocks of two hosts are an hour apart; one look follows the run through both."""
    run = RunFolder(tmp_path / "run")
    followed = FollowedRun(run)
    assert followed.look() == RunState()
    monkeypatch.setattr(claims, "LOST_SECONDS", 0.5)
    with writer(run.path, "node1", 7200, 1, 10):
        first = followed.look()
        assert (first.state, first.worker, first.host) == ("running", "GPU 0", "node1")
        assert first.process is not None
        assert first.process[0].startswith("node1")
        assert first.progress == Progress(10, 100, 0.5, 50.0, 90.0)
    assert followed.look().state == "running"  # nobody here can ask whether it lives
    time.sleep(0.6)
    assert followed.look().state == "lost"
    run.claim.unlink()  # as one does that takes it over
    with writer(run.path, "node2", 3600, 11, 11):
        assert followed.look().progress == Progress(11, 100, 5 / 11)  # of one step no speed
    run.claim.unlink()
    with writer(run.path, "node2", 0, 12, 20):
        second = followed.look()
        assert (second.state, second.host) == ("running", "node2")
        assert second.progress == Progress(20, 100, 0.25, 50.0, 80.0)
        assert EventTail(run.events).read() == second.progress


def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path: Path) -> None:
    """Its run is lost without a wait; the claim is looked at, and not taken."""
    run = RunFolder(tmp_path / "run")
    here = os.uname().nodename
    with writer(run.path, here, 0, 1, 3) as process:
        watch, before = Watch(run.claim), run.claim.read_bytes()
        assert look_once(run).state == "running"
        assert not watch.look().is_lost
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        assert watch.look().unrenewed_seconds == math.inf
        assert look_once(run).state == FollowedRun(run).look().state == "lost"
        assert run.claim.read_bytes() == before


@pytest.mark.parametrize(
    ("status", "trained", "held", "state"),
    [
        (None, False, False, "waiting"),
        ("running", False, True, "running"),
        ("running", True, True, "scoring"),
        ("running", True, False, "trained"),
        ("finished", True, False, "finished"),
        ("failed", False, True, "failed"),
        ("interrupted", False, False, "interrupted"),
    ],
)
def test_a_run_is_named_by_its_status_and_its_claim(
    tmp_path: Path, status: Any, trained: bool, held: bool, state: str
) -> None:
    """What is trained and held by nobody waits for its score."""
    run = RunFolder(tmp_path / "run")
    if status is not None:
        run.write_status(Status(status))
    if trained:
        run.write_json("training.json", {})
    if not held:
        assert FollowedRun(run).look().state == state
        return
    with claimed(run.claim):
        assert FollowedRun(run).look().state == look_once(run).state == state


def test_the_worker_that_scores_a_run_is_shown_while_it_does(tmp_path: Path) -> None:
    """Then the one that trained it again: its environment is that of the training."""
    run = RunFolder(tmp_path / "run")
    run.write_json("environment.json", {"versions": {}, "host": "node1", "worker": "GPU 0"})
    run.write_json("training.json", {})
    followed = FollowedRun(run)
    with run.claimed() as claim:
        log = events.EventLog(run.events, claim)
        log.worker("GPU 0", "node1")
        log.close()
        write_losses(run.events, range(1, 3), claim.token)
    run.write_status(Status("running", started=1.0))
    with run.claimed() as claim:
        log = events.EventLog(run.events, claim)
        log.worker("GPU 1", "node2")
        log.close()
        seen = followed.look()
        assert (seen.state, seen.worker, seen.host) == ("scoring", "GPU 1", "node2")
    run.write_status(Status("finished", started=1.0, ended=2.0))
    seen = followed.look()
    assert (seen.state, seen.worker, seen.host) == ("finished", "GPU 0", "node1")


def test_a_claim_that_is_renewed_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a run takes; a run that waited for long is not lost as it begins."""
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(claims, "LOST_SECONDS", 0.5)
    run = RunFolder(tmp_path / "run")
    followed, end = FollowedRun(run), time.monotonic() + 0.7
    while time.monotonic() < end:
        assert followed.look().state == "waiting"
    run.write_status(Status("running"))
    assert followed.look().state == "running"
    with claimed(run.claim):
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            assert followed.look().state == "running"
            time.sleep(0.05)
    time.sleep(0.6)
    assert followed.look().state == "running"  # its holder has just let go
    time.sleep(0.6)
    assert followed.look().state == "lost"


def write_losses(path: Path, steps: range, claim: str | None = None) -> None:
    """Append the events of a training: a step a second."""
    with path.open("a", encoding="utf-8") as file:
        for step in steps:
            line: dict[str, Any] = {"event": "metric", "key": "train/loss", "value": 1.0}
            line |= {"step": step, "time": 1000 * step} | ({"claim": claim} if claim else {})
            file.write(json.dumps(line) + "\n")


def write_size(path: Path, max_steps: int) -> None:
    with path.open("a", encoding="utf-8") as file:
        for key, value in (("train.max_steps", max_steps), ("train.num_tokens", 10 * max_steps)):
            file.write(json.dumps({"event": "tag", "key": key, "value": str(value)}) + "\n")


def test_a_look_reads_only_what_was_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An incomplete line is read once it is complete; a log that began anew from its start."""
    path, read = tmp_path / "events.jsonl", list[int]()

    def parse(raw: bytes) -> list[dict[str, Any]]:
        read.append(len(raw))
        return events.parse_events(raw)

    monkeypatch.setattr(progress, "parse_events", parse)
    tail = EventTail(path)
    assert tail.read() == Progress()
    write_size(path, 100)
    write_losses(path, range(1, 30))
    assert tail.read() == Progress(29, 100, 1.0, 10.0, 71.0)
    assert tail.read() == tail.read()
    assert read == [path.stat().st_size]
    size = path.stat().st_size
    write_losses(path, range(30, 31))
    line = path.read_bytes()[size:]
    path.write_bytes(path.read_bytes()[:-5])
    assert tail.read().step == 29
    with path.open("ab") as file:
        file.write(line[-5:])
    assert tail.read().step == 30
    assert read[1:] == [0, len(line)]
    path.unlink()
    write_size(path, 50)
    write_losses(path, range(1, 3))
    assert tail.read() == Progress(2, 50, 1.0, 10.0, 48.0)


def test_of_a_long_log_the_two_ends_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of many finished runs is there at once."""
    path, read = tmp_path / "events.jsonl", list[int]()
    write_size(path, 20_000)
    write_losses(path, range(1, 10_001), "a")

    def parse(raw: bytes) -> list[dict[str, Any]]:
        read.append(len(raw))
        return events.parse_events(raw)

    monkeypatch.setattr(progress, "parse_events", parse)
    tail = EventTail(path)
    assert tail.read() == Progress(10_000, 20_000, 1.0, 10.0, 10_000.0)
    assert sum(read) <= 2 * progress.PART_BYTES < path.stat().st_size / 2
    write_losses(path, range(10_001, 10_003), "a")
    assert tail.read().step == 10_002


def test_looking_at_240_runs_again_reads_no_file_of_those_that_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished and waiting runs cost a look at their status file."""
    runs = [RunFolder(tmp_path / f"run-{n}") for n in range(240)]
    for run in runs[:120]:
        run.write_status(Status("finished", started=1.0, ended=11.0))
        write_size(run.events, 100)
        write_losses(run.events, range(1, 101))
    followed = [FollowedRun(run) for run in runs]
    before = [one.look() for one in followed]
    assert [one.state for one in before].count("finished") == 120
    assert before[0].progress.step == 100
    assert before[0].seconds == 10.0
    opened: list[Path] = []
    monkeypatch.setattr(files, "require_file", opened.append)
    started = time.process_time()
    for _ in range(5):
        assert [one.look() for one in followed] == before
    assert time.process_time() - started < 1.0  # measured: 0.01 s a round
    assert opened == []


@pytest.mark.parametrize(
    ("runs", "seconds"),
    [
        ([], None),
        ([RunState()], None),  # nobody works
        ([RunState("running"), RunState()], None),  # no speed yet
        ([RunState("running", progress=Progress(50, 100, 1.0, 9.0, 30.0))], 30),
        ([RunState("running", progress=Progress(50, 100, 1.0, 9.0, 30.0)), *[RunState()] * 3], 210),
        ([RunState("running"), RunState("finished", seconds=40.0), *[RunState()] * 3], 120),
        ([RunState("running")] * 4 + [RunState("finished", seconds=40.0), *[RunState()] * 8], 80),
        ([RunState("running", progress=Progress(1, 2, 1, 1, 9.0)), RunState("failed")], 9),
    ],
)
def test_time_left_is_estimated_over_all_workers(
    runs: Sequence[RunState], seconds: float | None
) -> None:
    """Runs that wait take as long as finished ones did, or as those in progress will."""
    assert estimate_seconds_left(runs) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("environment", [{}, {"host": 1, "worker": []}, {"host": None}])
def test_a_run_without_a_place_has_none(tmp_path: Path, environment: Mapping[str, Any]) -> None:
    """As those of older releases, or with a file that somebody edited."""
    run = RunFolder(tmp_path)
    run.write_json("environment.json", environment)
    assert progress.read_place(run) == ("", "")
