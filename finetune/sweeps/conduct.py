"""The conduct of a sweep: its units handed to workers, and what became of each run recorded."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import cast, get_args

from finetune import distributed, signals
from finetune.reporting.tables import show_duration
from finetune.sweeps.lost_runs import write_cut_off, write_failure
from finetune.sweeps.planning import Sweep
from finetune.sweeps.pool import Ended, Pool
from finetune.sweeps.schedule import Places, Schedule, Unit, Work
from finetune.sweeps.worker import AnyWorker
from finetune.sweeps.worker_process import WorkerDied, WorkerKilled
from finetune.tracking.claims import CLAIM_FILE, Watch
from finetune.tracking.events import State
from finetune.tracking.tracker import Tracker, follow

log = logging.getLogger("finetune")

INTERRUPT_SECONDS = 120.0  # that workers have to end their steps and write checkpoints
TRIES = 2  # of a unit whose worker was killed
TRAINED = "its training is kept, the same command scores it"


class Conduct:
    """One sweep on a pool of workers; other processes may work on its runs, too."""

    def __init__(self, sweep: Sweep, tracker: Tracker, pool: Pool) -> None:
        self._sweep = sweep
        self._points = sweep.points
        self._tracker = tracker
        self._pool = pool
        self._schedule = Schedule(build_work(sweep))
        self._runs = [Watch(point.run.claim) for point in self._points]
        self._bases = {file: Watch(Path(f"{file}{CLAIM_FILE}")) for file in _base_scores(sweep)}
        self._waited_for: set[int] = set()  # places of runs that another process was seen to hold
        self._before = [point.run.status() for point in self._points]
        self._used: dict[int, float] = defaultdict(float)  # seconds of work on a run so far
        self._took: list[float] = []  # seconds that each run took that is finished
        self._begun: set[int] = set()
        self._num_runs = sum(point.action != "skip" for point in self._points)

    def states(self, deadline: signals.Deadline | None = None) -> Iterator[State]:
        """Run what is to be run and yield how each run ended, in any order.

        No unit begins after a failure under `sweep.fail_fast`, or where other ranks are blocked.

        Args:
            deadline: at which all is to stop.

        Raises:
            signals.OutOfTime: the deadline has come.
        """
        for place, point in enumerate(self._points):
            follow(self._tracker, point.run)
            if point.left is not None:
                self._announce([place])
                yield point.left
        for ended in self._pool.run(self._schedule, self._work, self._find_free, deadline):
            for state in self._settle(ended):
                yield state
                if state != "finished" and self._sweep.config.sweep.fail_fast:
                    self._schedule.close()
            if distributed.is_desynchronised():
                return
        if self._schedule.is_closed:
            for point in self._points:
                write_cut_off(point.run, f"stopped by sweep.fail_fast; {TRAINED}")

    def interrupt(self, stop: KeyboardInterrupt) -> None:
        """Let the runs at work write checkpoints; at a second request they are ended at once.

        Raises:
            KeyboardInterrupt: the second request.
        """
        reason, is_ended = signals.describe(stop), False
        if not self._pool.is_idle:
            log.info("%s: writing checkpoints; Ctrl-C again stops without them", reason)
        try:
            is_ended = self._pool.interrupt(stop, INTERRUPT_SECONDS)
        finally:
            if not is_ended:
                self._pool.stop()
            for point in self._points:
                lost = TRAINED if point.run.is_trained else "without a checkpoint of its last steps"
                write_cut_off(point.run, f"{reason}; {lost}")

    def _work(self, unit: Unit, worker: AnyWorker) -> list[str]:
        """Do a unit by a worker, in a thread of the pool."""
        if unit.kind != "base":
            ended = [self._find_end_elsewhere(place) for place in unit.places]
            if all(ended):
                return [state for state in ended if state is not None]
            self._announce(unit.places)
        jobs = [self._points[place].job for place in unit.places]
        return worker.run(unit.kind, jobs, self._seconds_left(unit))

    def _find_end_elsewhere(self, place: int) -> State | None:
        """Return how another process has ended a run since this sweep began, where it failed."""
        now = self._points[place].run.status()
        if now is None or now == self._before[place] or place in self._used:
            return None
        return now.state if now.state in ("failed", "diverged") else None

    def _seconds_left(self, unit: Unit) -> float | None:
        """Return what a unit's runs have left of `sweep.job_timeout`."""
        timeout = self._sweep.config.sweep.job_timeout
        if timeout is None or unit.kind == "base":
            return None
        return max(0.0, sum(timeout - self._used[place] for place in unit.places))

    def _find_free(self, unit: Unit) -> Places:
        """Return those of a unit's places that no other process works on."""
        if unit.kind == "base":
            files = self._points[unit.places[0]].base_scores
            return unit.places if all(self._bases[file].is_free() for file in files) else ()
        free = [place for place in unit.places if self._runs[place].is_free()]
        for place in {*unit.places} - {*free} - self._waited_for:
            self._waited_for.add(place)
            holder = self._runs[place].holder() or "another process"
            name = self._points[place].run.name
            log.info("%s: %s is running it; waiting for its end", name, holder)
        return free

    def _settle(self, ended: Ended) -> Iterator[State]:
        """Tell the schedule what became of a unit; yield the states of runs that have ended."""
        unit, outcome = ended.unit, ended.outcome
        for place in () if unit.kind == "base" else unit.places:
            self._used[place] += ended.seconds / len(unit.places)
        if isinstance(outcome, Exception):
            yield from self._settle_fault(unit, outcome)
        else:
            found = dict(zip(unit.places, outcome, strict=False))  # none for a base
            held = [place for place, one in found.items() if one == "held"]
            self._schedule.end(unit, [p for p, one in found.items() if one == "trained"], held)
            for place, state in found.items():
                if state == "finished" and self._points[place].action != "skip":
                    self._took.append(self._used[place])
                    if len(self._pool) > 1:  # whose progress bars do not say so
                        log.info("%s finished in %.0f s", self._points[place], self._used[place])
                if state in get_args(State):
                    yield cast(State, state)

    def _settle_fault(self, unit: Unit, error: Exception) -> Iterator[State]:
        """Try a unit once more whose worker was killed; else its run has failed, and no other."""
        if not isinstance(error, WorkerDied | ValueError | OSError):
            raise error
        if len(unit.places) > 1 and unit.kind == "train":
            log.warning("%s; its %d runs are run separately", error, len(unit.places))
            self._schedule.give_back(unit, [[place] for place in unit.places])
        elif isinstance(error, WorkerKilled) and unit.retries + 1 < TRIES:
            log.warning("%s; it is tried once more: %s", error, self._points[unit.places[0]])
            self._schedule.retry(unit)
        elif unit.kind == "base":
            log.error("the base cannot be scored: %s", error)
            self._schedule.end(unit)
        else:
            yield from self._fail(unit, str(error))

    def _fail(self, unit: Unit, reason: str) -> Iterator[State]:
        """Record the failure of a unit's run, unless another process has taken it over."""
        (place,) = unit.places
        run = self._points[place].run
        log.error("%s failed: %s", run.name, reason)
        state = write_failure(run, reason, self._before[place])
        if state is None:
            self._schedule.give_back(unit)
        else:
            self._schedule.end(unit)
            yield state

    def _announce(self, places: Places) -> None:
        """Log the runs that begin, once each, but those that are finished already."""
        for place in places:
            if place not in self._begun and self._points[place].action != "skip":
                self._begun.add(place)
                number, point = len(self._begun), self._points[place]
                log.info("[%d/%d] %s%s", number, self._num_runs, point, self._time_left(number))

    def _time_left(self, number: int) -> str:
        """Estimate the time for the run of this number and those after it, from the runs so far."""
        if not self._took:
            return ""
        seconds = (self._num_runs - number + 1) * fmean(self._took) / len(self._pool)
        return f" (about {show_duration(seconds)} left)"


def build_work(sweep: Sweep) -> Work:
    """Return what there is to do for the points of a sweep, by their places.

    A finished run is work too: what was asked for now is written into its folder.
    """
    points = dict(enumerate(sweep.points))
    return Work(
        groups=[group.indices for group in sweep.groups if points[group.indices[0]].trains],
        trained=[n for n, one in points.items() if one.action in ("evaluate", "skip")],
        bases={n: ",".join(one.base_scores) for n, one in points.items() if one.base_scores},
        models={n: one.base for n, one in points.items() if one.base},
        lengths={n: one.rows for n, one in points.items()},
    )


def _base_scores(sweep: Sweep) -> set[str]:
    return {file for point in sweep.points for file in point.base_scores}
