"""Progress of runs that other processes work on, followed through the files of their folders.

A look reads what was appended since the one before. Times are compared only where one process
wrote them both: hosts have different clocks.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from finetune.files import open_file
from finetune.tracking.claims import Sighting, Watch
from finetune.tracking.events import CLAIM, Measured, drop_superseded, parse_events
from finetune.tracking.run_folder import RunFolder, Status

SPEED_STEPS = 20  # newest steps, over which speed is measured
PART_BYTES = 2**16  # of a log's beginning and end; the middle of a long one is not read at first
WORKING = ("running", "scoring")
SETTLED = ("finished", "failed", "diverged")  # by the process that ran it

FileState = tuple[int, int, int]  # inode, size and time of its last change


@dataclass(frozen=True)
class Progress:
    """The progress of one run's training."""

    step: int = 0
    max_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class RunState:
    """A run as one look found it."""

    state: str = "waiting"  # or a status, or trained (to be scored), scoring, lost
    worker: str = ""  # that works on it, or trained it last
    host: str = ""
    process: tuple[str, int] | None = None  # host and number of the one that works on it
    progress: Progress = Progress()
    reason: str | None = None
    seconds: float | None = None  # from start to end
    started: float | None = None  # seconds since the epoch
    ended: float | None = None


class EventTail:
    """Follows a run's event log, and keeps what its progress is made of."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._inode, self._offset = 0, 0
        self._claims: list[str] = []
        self._writer: str | None = None  # of the newest loss
        self._losses: deque[Measured] = deque(maxlen=SPEED_STEPS)  # of that writer
        self._tags: dict[str, str] = {}
        self.place: tuple[str, str] | None = None  # worker and host that began last

    def read(self) -> Progress:
        """Read what was appended, and return the progress."""
        try:
            file = self._path.stat()
            if file.st_ino != self._inode or file.st_size < self._offset:
                self._forget()
                self._inode = file.st_ino
            if file.st_size > self._offset:
                with open_file(self._path) as log:
                    self._read_from(log, file.st_size)
        except OSError:  # it is not there yet, or no file
            pass
        return self._progress()

    def _read_from(self, log: BinaryIO, size: int) -> None:
        """Take in the complete lines from the offset on; of a long new log its two ends."""
        if self._offset == 0 and size > 2 * PART_BYTES:
            self._take(log.read(PART_BYTES))
            log.seek(size - PART_BYTES)
            log.readline()  # from the middle of a line
            self._offset = log.tell()
        log.seek(self._offset)
        self._take(log.read())

    def _take(self, raw: bytes) -> None:
        end = raw.rfind(b"\n") + 1
        self._offset += end
        for event in drop_superseded(parse_events(raw[:end]), self._claims):
            if event["event"] == "worker":
                self.place = (event["name"], event["host"])
            elif event["event"] == "tag":
                self._tags[event["key"]] = event["value"]
            elif event["event"] == "metric" and event["key"] == "train/loss":
                self._take_loss(event)

    def _take_loss(self, event: dict[str, Any]) -> None:
        if event.get(CLAIM) != self._writer:
            self._losses.clear()
            self._writer = event.get(CLAIM)
        self._losses.append(Measured(event["step"], event["value"], event["time"]))

    def _progress(self) -> Progress:
        max_steps = _count(self._tags.get("train.max_steps"))
        if not self._losses or max_steps is None:
            return Progress(max_steps=max_steps)
        first, last = self._losses[0], self._losses[-1]
        progress = Progress(last.step, max_steps, last.value)
        seconds, steps = (last.time - first.time) / 1000, last.step - first.step
        if seconds <= 0 or steps <= 0:
            return progress
        num_tokens = _count(self._tags.get("train.num_tokens"))
        return replace(
            progress,
            tokens_per_second=steps / seconds * num_tokens / max_steps if num_tokens else None,
            seconds_left=max(0, max_steps - last.step) * seconds / steps,
        )


def _count(tag: str | None) -> int | None:
    """Return a tag's number; None where its line was damaged, or it is 0."""
    return int(tag) or None if tag is not None and tag.isdecimal() else None


class FollowedRun:
    """Follows one run; a look at one that changes nothing costs a look at its status file."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._events = EventTail(run.events)
        self._watch = Watch(run.claim)
        self._files: dict[str, FileState | None] = {}
        self._status: Status | None = None
        self._place: tuple[str, str] = ("", "")
        self._seen = RunState()

    def look(self) -> RunState:
        """Return the run's state and progress now."""
        is_changed = self._is_changed("status.json")
        if is_changed:
            self._status = self._run.status()
            self._watch = Watch(self._run.claim)  # of whoever wrote it; renewals count from now on
        if self._status is None or (self._status.state != "running" and not is_changed):
            return self._seen
        self._seen = self._read(self._status, self._watch.look())
        return self._seen

    def _read(self, status: Status, claim: Sighting) -> RunState:
        if self._is_changed("environment.json"):
            self._place = read_place(self._run)
        is_trained = (self._run.path / "training.json").exists()
        state = name_state(status, claim, is_trained=is_trained)
        progress, holder = self._events.read(), claim.holder
        place = (self._events.place if state in WORKING else None) or self._place
        if state != "running":  # what it took has been taken
            progress = replace(progress, tokens_per_second=None, seconds_left=None)
        return RunState(
            state, *place, progress=progress, reason=status.reason,
            process=(holder.hostname, holder.pid) if holder and state in WORKING else None,
            seconds=status.ended - status.started if status.ended and status.started else None,
            started=status.started,
            ended=status.ended,
        )  # fmt: skip

    def _is_changed(self, name: str) -> bool:
        """Return whether a file is another one than at the look before."""
        before = self._files.get(name)
        self._files[name] = _file_state(self._run.path / name)
        return self._files[name] != before


def name_state(status: Status, claim: Sighting, *, is_trained: bool) -> str:
    """Return a started run's state, by its status, its claim, and whether its training is over."""
    if status.state != "running":
        return status.state
    if claim.holder is None and is_trained:
        return "trained"
    if claim.is_lost:
        return "lost"
    return "scoring" if is_trained else "running"


def look_once(run: RunFolder) -> RunState:
    """Return a run's state by a single look; `unknown` without a status.

    A run on another machine counts as running for as long as its claim is there.
    """
    seen = FollowedRun(run).look()
    if seen.state == "waiting":
        return replace(seen, state="unknown")
    if seen.state == "running" and seen.process is None:
        return replace(seen, state="lost")
    return seen


def read_place(run: RunFolder) -> tuple[str, str]:
    """Return the worker and the host that ran a run last; empty where they are not recorded."""
    environment = run.read_json("environment.json") or {}
    worker, host = environment.get("worker"), environment.get("host")
    return (
        worker if isinstance(worker, str) else "",
        host if isinstance(host, str) else "",
    )


def estimate_seconds_left(runs: Sequence[RunState]) -> float | None:
    """Estimate the time until all runs are settled, from finished ones and speeds so far."""
    working = [run for run in runs if run.state in WORKING]
    left = [run.progress.seconds_left or 0.0 for run in working]
    waiting = [run for run in runs if run.state not in (*WORKING, *SETTLED, "trained")]
    took = [run.seconds for run in runs if run.state == "finished" and run.seconds] or [
        run.progress.seconds_left * run.progress.max_steps / steps
        for run in working
        if run.progress.seconds_left and run.progress.max_steps
        and (steps := run.progress.max_steps - run.progress.step)
    ]  # fmt: skip
    if not working or not (took or any(left)) or (waiting and not took):
        return None
    total = sum(left) + (len(waiting) * sum(took) / len(took) if waiting else 0)
    return max(total / len(working), *left)


def _file_state(path: Path) -> FileState | None:
    try:
        file = os.stat(path)
    except OSError:
        return None
    return file.st_ino, file.st_size, file.st_mtime_ns
