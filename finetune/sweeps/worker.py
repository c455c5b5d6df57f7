"""Worker process that checks and runs jobs, so that the sweep's process imports no torch."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, cast

from finetune import distributed, signals
from finetune.config.inputs import Inputs
from finetune.logs import quieten_libraries
from finetune.pipeline.finished_runs import FinishedRuns, Looked
from finetune.pipeline.jobs import CheckedJob, Job
from finetune.sweeps.schedule import Kind
from finetune.sweeps.seats import Seat
from finetune.sweeps.worker_process import WorkerDied, WorkerKilled, do_work, serve

if TYPE_CHECKING:
    from finetune.pipeline.session import Session

STOP_SECONDS = 5.0  # for an idle worker to end by itself
ALIVE_SECONDS = 5.0  # between checks that a silent worker is alive


class Worker:
    """A worker process, started when first needed, and again after it died.

    Jobs whose runs are recorded as finished do not need it. One thread at a time may ask it;
    `interrupt` and `stop` may be called from another one meanwhile.
    """

    _starting = threading.Lock()  # `_main_left_out` is for one thread at a time

    def __init__(
        self,
        seat: Seat | None = None,
        finished_runs: FinishedRuns | None = None,
        *,
        is_quiet: bool = False,
    ) -> None:
        """Keep what the process is started with.

        Args:
            seat: where it computes; None: as a single worker.
            finished_runs: the records of this machine, which workers share.
            is_quiet: whether the live table is on the same terminal.
        """
        self._seat = seat or Seat()
        self._finished_runs = finished_runs or FinishedRuns()
        self._looked: Looked = {}  # states of the files that jobs share, kept while planning
        self._is_quiet = is_quiet
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._stops: Connection | None = None  # announces stop signals to the worker
        self._changing = threading.RLock()  # whether it has a request, and may be signalled
        self._is_asked = False
        self._is_stopped = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(0 if isinstance(error, KeyboardInterrupt) else STOP_SECONDS)

    def prepare(self, job: Job) -> CheckedJob:
        """Check a job and resolve its inputs."""
        inputs = self._find_finished(job, self._looked)
        if inputs is not None:
            return CheckedJob(inputs, [], finished=True)
        return cast(CheckedJob, self._ask("prepare", job))

    def run(
        self, kind: Kind, jobs: Sequence[Job], timeout_seconds: float | None = None
    ) -> list[str]:
        """Train or score runs, or score their base, to its end or until its time is up.

        Returns:
            What became of each run (`run_jobs.Outcome`); nothing for a base.

        Raises:
            WorkerDied: the process ended, or its time was up.
            ValueError, OSError: the jobs cannot be run.
        """
        if kind == "evaluate" and self._find_finished(jobs[0]) is not None:
            return ["finished"]
        return cast(list[str], self._ask(kind, list(jobs), timeout_seconds))

    def _find_finished(self, job: Job, looked: Looked | None = None) -> Inputs | None:
        if (
            job.config.workers.is_elsewhere or self._seat.processes > 1
        ):  # records are of runs of one process here
            return None
        return self._finished_runs.find(job.config, looked)

    def start(self) -> None:
        """Start the process if there is none, so that the first request need not wait for it.

        Raises:
            WorkerDied: it cannot be started.
        """
        with self._changing:
            if self._process is None:
                self._start()

    def interrupt(self, stop: KeyboardInterrupt) -> None:
        """Let what it works on write a checkpoint and end; it takes no more requests."""
        with self._changing:
            self._is_stopped = True
            if not self._is_asked or self._process is None or self._stops is None:
                return
            with suppress(OSError):  # it has ended
                self._stops.send(stop)
                os.kill(self._process.pid or 0, signal.SIGINT)

    def hang_up(self) -> None:
        """Let the process end, which has no request."""
        if self._pipe is not None:
            self._pipe.close()

    def stop(self, grace_seconds: float = STOP_SECONDS) -> None:
        """End the process; it has nothing to save."""
        process = self._process
        if process is None:
            return
        try:
            if grace_seconds:
                self.hang_up()
                process.join(grace_seconds)
        finally:
            process.kill()  # a thread that waits for its answer sees that
            process.join()
            self._forget()

    def _forget(self) -> None:
        self._process = self._pipe = self._stops = None

    def _ask(self, verb: str, payload: Any, timeout_seconds: float | None = None) -> Any:
        try:
            process, pipe = self._send(verb, payload)
            try:
                if not _answers_within(process, pipe, timeout_seconds):
                    process.kill()
                    process.join()
                    self._forget()
                    late = f"it took longer than {timeout_seconds:g} s (sweep.job_timeout)"
                    raise WorkerDied(late)
                answer, is_last = pipe.recv()
            except (EOFError, ConnectionResetError):
                raise self._describe_end(process) from None
        finally:
            with self._changing:
                self._is_asked = False
        if is_last:  # the process ends, and the next request gets another one
            self.stop()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _send(
        self, verb: str, payload: Any
    ) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        """Send a request to the process, which is started where there is none."""
        with self._changing:
            if self._is_stopped:
                raise WorkerDied("the sweep was stopped before this began")
            if self._process is None:
                self._start()
            process, pipe = self._process, self._pipe
            assert process is not None
            assert pipe is not None
            self._is_asked = True
            try:
                pipe.send((verb, payload))
            except (BrokenPipeError, ConnectionResetError):
                raise self._describe_end(process) from None
            return process, pipe

    def _describe_end(self, process: multiprocessing.process.BaseProcess) -> WorkerDied:
        """Return how a process ended."""
        process.join()
        self._forget()
        code = process.exitcode or 0
        if code >= 0:
            return WorkerDied(f"the worker ended with exit code {code}")
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return WorkerKilled(f"the worker was killed by {signal.Signals(-code).name}{hint}")

    def _start(self) -> None:
        """Start the process; stop signals are blocked in it until its handlers are set."""
        context = multiprocessing.get_context("spawn")
        try:
            resource_tracker.ensure_running()  # started later, it would unblock the signals
            pipe, theirs = context.Pipe()
            heard, stops = context.Pipe(duplex=False)
            process = context.Process(
                target=serve, args=(theirs, heard, self._seat, self._is_quiet), daemon=True
            )
            with self._starting, signals.held_back(), _main_left_out():
                process.start()
                self._process, self._pipe, self._stops = process, pipe, stops
            theirs.close()
            heard.close()
        except OSError as error:  # no process, pipe or memory left, or it died at once
            fault = error.strerror or str(error)
            raise WorkerDied(f"the worker process cannot be started: {fault}") from None


def _answers_within(
    process: multiprocessing.process.BaseProcess, pipe: Connection, timeout_seconds: float | None
) -> bool:
    """Wait for an answer; return whether there is one.

    Raises:
        EOFError: the process has ended without.
    """
    end = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
    while not pipe.poll(min(ALIVE_SECONDS, max(0.0, end - time.monotonic()))):
        if time.monotonic() >= end:
            return False
        # A process that it left behind may hold the pipe open.
        if not process.is_alive() and not pipe.poll():
            raise EOFError
    return True


class LaunchedWorker:
    """The worker under accelerate or torchrun: rank 0 runs jobs itself, all ranks train."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet

    @cached_property
    def _session(self) -> Session:
        from finetune.pipeline.session import Session  # loads torch

        return Session()

    def __enter__(self) -> LaunchedWorker:
        quieten_libraries(is_quiet=self._is_quiet)
        distributed.join()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prepare(self, job: Job) -> CheckedJob:
        """Check a job and resolve its inputs."""
        from finetune.pipeline import preflight

        return preflight.prepare(job.config, self._session)

    def run(
        self, kind: Kind, jobs: Sequence[Job], timeout_seconds: float | None = None
    ) -> list[str]:
        """Train or score runs, or score their base, to its end.

        Raises:
            KeyboardInterrupt: they were interrupted, checkpoints written; or another process has
                taken over their run, and the other ranks are blocked in its training.
        """
        assert timeout_seconds is None, "launchers.find_problems refuses it"
        outcome = do_work(kind, jobs, self._session)
        if "interrupted" in outcome:
            raise signals.first_stop()
        if "held" in outcome and distributed.is_desynchronised():
            raise signals.TakenOver
        return outcome

    def interrupt(self, stop: KeyboardInterrupt) -> None:
        pass

    def start(self) -> None:
        pass

    def hang_up(self) -> None:
        pass

    def stop(self, grace_seconds: float = STOP_SECONDS) -> None:
        pass


AnyWorker = Worker | LaunchedWorker


@contextmanager
def _main_left_out() -> Iterator[None]:
    """Keep a spawned process from importing the main module again, which it does not need.

    It may be a user's script that calls a sweep without `if __name__ == "__main__"`.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
