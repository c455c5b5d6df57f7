"""A sweep whose workers are on other machines: followed by the folders of its runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Protocol

from finetune import signals
from finetune.sweeps.lost_runs import write_cut_off
from finetune.sweeps.planning import Sweep
from finetune.tracking.claims import LOST_SECONDS
from finetune.tracking.events import State
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.sweep_record import SweepRecord
from finetune.tracking.tracker import Tracker, follow

log = logging.getLogger("finetune")

POLL_SECONDS = 2.0
INTERRUPT_SECONDS = 120.0  # that workers have to write checkpoints
ENDED = ("finished", "failed", "diverged")


class Tasks(Protocol):
    """What starts processes that join a sweep: Slurm, or Ray."""

    def alive(self) -> int:
        """Return how many tasks wait or are at work."""

    def interrupt(self, timeout_seconds: float) -> bool:
        """Let the tasks end where they end with this process; return whether they have."""


class Follower:
    """One sweep that tasks elsewhere work on."""

    def __init__(self, sweep: Sweep, tracker: Tracker, tasks: Tasks) -> None:
        self._sweep = sweep
        self._tracker = tracker
        self._tasks = tasks
        self._runs: dict[int, RunFolder] = {}  # those that have their folders, by their places
        self._ended: set[int] = set()

    def states(self, deadline: signals.Deadline | None = None) -> Iterator[State]:
        """Yield how each run ends, in any order, until all have or nobody works on them.

        Args:
            deadline: at which all is to stop.

        Raises:
            signals.OutOfTime: the deadline has come.
        """
        silent_since = None
        while True:
            yield from self._find_ended()
            if len(self._ended) == len(self._sweep.points):
                return
            if self._tasks.alive():
                silent_since = None
            elif silent_since is None:
                silent_since = time.monotonic()
                log.info("no worker is left; looking for %.0f s at what they wrote", LOST_SECONDS)
            elif time.monotonic() - silent_since > LOST_SECONDS:  # file systems show changes late
                break
            time.sleep(POLL_SECONDS if deadline is None else min(POLL_SECONDS, deadline.check()))
        for place in set(range(len(self._sweep.points))) - self._ended:
            if place in self._runs:
                write_cut_off(self._runs[place], "its worker has ended; the same command goes on")
            yield "interrupted"

    def interrupt(self, stop: KeyboardInterrupt) -> None:
        """Let the tasks end that end with this process."""
        log.info("%s: waiting for the workers; Ctrl-C again does not wait", signals.describe(stop))
        self._tasks.interrupt(INTERRUPT_SECONDS)

    def _find_ended(self) -> Iterator[State]:
        for place, run in self._find_runs():
            status = run.status()
            if place not in self._ended and status is not None and status.state in ENDED:
                self._ended.add(place)
                log.info("%s: %s", self._sweep.points[place], status.state)
                yield status.state

    def _find_runs(self) -> Iterator[tuple[int, RunFolder]]:
        """Yield the runs that have their folders; those that are new are tracked from now on."""
        if len(self._runs) < len(self._sweep.points):
            record = SweepRecord.load(self._sweep.folder)
            for place, run in enumerate(record.runs):
                if run.is_named and place not in self._runs:
                    self._runs[place] = RunFolder(self._sweep.folder / run.folder)
                    follow(self._tracker, self._runs[place])
        yield from self._runs.items()
