"""Workers that do a schedule's units side by side, each driven by a thread of this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType

from finetune import distributed, signals
from finetune.pipeline.finished_runs import FinishedRuns
from finetune.pipeline.jobs import CheckedJob, Job
from finetune.sweeps.schedule import Places, Schedule, Unit
from finetune.sweeps.seats import find_seats
from finetune.sweeps.worker import STOP_SECONDS, AnyWorker, LaunchedWorker, Worker

POLL_SECONDS = 2.0  # between two looks at what other processes hold


@dataclass(frozen=True)
class Ended:
    """A unit that a worker has done: what became of its runs, or why it could not do it."""

    unit: Unit
    outcome: list[str] | Exception
    seconds: float


Work = Callable[[Unit, AnyWorker], list[str]]
FindFree = Callable[[Unit], Places]


class Pool:
    """The workers of one sweep; the first one also checks the jobs."""

    def __init__(self, workers: Sequence[AnyWorker]) -> None:
        self._workers = list(workers)
        self._threads = ThreadPoolExecutor(len(workers), thread_name_prefix="worker")
        self._ended: SimpleQueue[tuple[int, Ended]] = SimpleQueue()
        self._at_work: dict[int, Unit] = {}  # by the worker's number
        self._models: dict[int, str | None] = {}  # that each worker has loaded

    def __enter__(self) -> Pool:
        for worker in self._workers:
            worker.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_hurried = isinstance(error, KeyboardInterrupt)
        idle = [one for n, one in enumerate(self._workers) if n not in self._at_work]
        for worker in () if is_hurried else idle:
            worker.hang_up()
        for worker in self._workers:
            worker.stop(0 if is_hurried or worker not in idle else STOP_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __len__(self) -> int:
        return len(self._workers)

    def prepare(self, job: Job) -> CheckedJob:
        """Check a job and name its run.

        Raises:
            WorkerDied: the worker could not answer.
        """
        checked = self._workers[0].prepare(job)
        if not checked.finished and not job.config.sweep.dry_run:
            for worker in self._workers[1:]:
                worker.start()  # loads its libraries meanwhile
        return checked

    @property
    def is_idle(self) -> bool:
        return not self._at_work

    def run(
        self,
        schedule: Schedule,
        work: Work,
        find_free: FindFree,
        deadline: signals.Deadline | None = None,
    ) -> Iterator[Ended]:
        """Let idle workers take units until all are over; yield each as it ends, in any order.

        Whoever asks for the next one has told the schedule what became of this one.

        Args:
            schedule: what there is to do.
            work: does a unit by a worker, in a thread of its own.
            find_free: as `Schedule.take` takes it.
            deadline: at which no more is waited for.

        Raises:
            signals.OutOfTime: the deadline has come; what is at work goes on.
        """
        while not schedule.is_over:
            for number in range(len(self._workers)):
                if number not in self._at_work:
                    self._hand_out(number, schedule, work, find_free)
            ended = self._wait(deadline)
            if ended is not None:
                yield ended

    def _hand_out(self, number: int, schedule: Schedule, work: Work, find_free: FindFree) -> None:
        unit = schedule.take(self._models.get(number), find_free)
        if unit is None:
            return
        worker = self._workers[number]
        self._models[number] = schedule.model_of(unit)
        if isinstance(worker, LaunchedWorker):  # it is this process
            self._ended.put((number, _do(unit, worker, work)))
            self._at_work[number] = unit
            return
        with signals.held_back():  # at a stop, what is at work is known
            self._at_work[number] = unit
            self._threads.submit(lambda: self._ended.put((number, _do(unit, worker, work))))

    def _wait(self, deadline: signals.Deadline | None) -> Ended | None:
        """Return a unit that has ended; None where none has for a while."""
        left = POLL_SECONDS if deadline is None else deadline.check()
        try:
            return self._collect(min(left, POLL_SECONDS))
        except Empty:
            return None

    def _collect(self, timeout_seconds: float) -> Ended:
        number, ended = self._ended.get(timeout=timeout_seconds)
        self._at_work.pop(number, None)
        return ended

    def interrupt(self, stop: KeyboardInterrupt, timeout_seconds: float) -> bool:
        """Let all units at work write checkpoints and end, for the reason that the sweep stops.

        Returns:
            Whether all have ended in time.
        """
        for number in self._at_work:
            self._workers[number].interrupt(stop)
        end = time.monotonic() + timeout_seconds
        while self._at_work:
            try:
                self._collect(max(0.0, end - time.monotonic()))
            except Empty:
                return False
        return True

    def stop(self) -> None:
        """End all workers at once."""
        for worker in self._workers:
            worker.stop(0)


def _do(unit: Unit, worker: AnyWorker, work: Work) -> Ended:
    started = time.monotonic()
    try:
        outcome: list[str] | Exception = work(unit, worker)
    except Exception as error:  # raised where the sweep decides on it
        outcome = error
    return Ended(unit, outcome, time.monotonic() - started)


def build_pool(jobs: Sequence[Job], *, is_quiet: bool) -> Pool:
    """Return the workers of this machine, or under accelerate and torchrun this process.

    Args:
        jobs: of the sweep; beyond one worker for each and one for the base, none has work.
        is_quiet: whether the live table is on the terminal.

    Raises:
        Refused: the machine has too few GPUs for them.
    """
    if distributed.is_launched():
        return Pool([LaunchedWorker(is_quiet=is_quiet)])
    finished = FinishedRuns()
    seats = find_seats(jobs[0].config)[: len(jobs) + 1]
    return Pool([Worker(seat, finished, is_quiet=is_quiet) for seat in seats])
