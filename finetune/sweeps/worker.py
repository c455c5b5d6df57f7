"""Worker process that checks and runs jobs, so that the sweep's process imports no torch."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, cast

from finetune import distributed, signals
from finetune.logs import quieten_libraries
from finetune.models import devices
from finetune.pipeline.finished_runs import FinishedRuns, Looked
from finetune.pipeline.jobs import CheckedJob, Job
from finetune.streams import keep_streams
from finetune.tracking.events import State

if TYPE_CHECKING:
    from finetune.pipeline.session import Session

STOP_SECONDS = 5.0  # for an idle worker to end by itself
ALIVE_SECONDS = 5.0  # between checks that a silent worker is alive
LONGEST_FAULT = 300  # characters of a library's error


class WorkerDied(RuntimeError):
    """The worker ended without an answer; the message has its exit code or signal."""


class Worker:
    """A worker process, started when first needed, and again after it died.

    Jobs whose runs are recorded as finished do not need it.
    """

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._finished_runs = FinishedRuns()
        self._looked: Looked = {}  # states of the files that jobs share, kept while planning
        self._is_quiet = is_quiet  # since the live table is on the same terminal
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._stops: Connection | None = None  # announces stop signals to the worker

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
        inputs = self._finished_runs.find(job.config, self._looked)
        if inputs is not None:
            return CheckedJob(inputs, [], finished=True, forecasts=[])
        return cast(CheckedJob, self._ask("prepare", job))

    def run(self, jobs: Sequence[Job], timeout_seconds: float | None = None) -> list[State]:
        """Run jobs together to their end, or until their time is up."""
        if len(jobs) == 1 and self._finished_runs.find(jobs[0].config) is not None:
            return ["finished"]
        return cast(list[State], self._ask("run", list(jobs), timeout_seconds))

    def interrupt(self, stop: KeyboardInterrupt, timeout_seconds: float) -> bool:
        """Let the running job write a checkpoint and end.

        Returns:
            Whether it has ended in time.
        """
        if self._process is None or self._pipe is None or self._stops is None:
            return True
        try:
            self._stops.send(stop)
            os.kill(self._process.pid or 0, signal.SIGINT)
            if not self._answers_within(timeout_seconds):
                return False
            self._pipe.recv()
        except (EOFError, OSError):  # it ended before it had a job
            pass
        return True

    def stop(self, grace_seconds: float = STOP_SECONDS) -> None:
        """End the process; it has nothing to save."""
        process, pipe = self._process, self._pipe
        if process is None or pipe is None:
            return
        try:
            pipe.close()  # an idle worker ends at this
            process.join(grace_seconds)
        finally:
            process.kill()
            process.join()
            self._process = self._pipe = self._stops = None

    def _ask(self, verb: str, payload: Any, timeout_seconds: float | None = None) -> Any:
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._pipe is not None
        try:
            self._pipe.send((verb, payload))
            if not self._answers_within(timeout_seconds):
                self._process.kill()
                self._how_it_ended()
                raise WorkerDied(f"it took longer than {timeout_seconds:g} s (sweep.job_timeout)")
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise WorkerDied(self._how_it_ended()) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> None:
        """Start the process; stop signals are blocked in it until its handlers are set."""
        context = multiprocessing.get_context("spawn")
        try:
            resource_tracker.ensure_running()  # started later, it would unblock the signals
            pipe, theirs = context.Pipe()
            heard, stops = context.Pipe(duplex=False)
            process = context.Process(
                target=_serve, args=(theirs, heard, self._is_quiet), daemon=True
            )
            with signals.held_back(), _main_left_out():
                process.start()
                self._process, self._pipe, self._stops = process, pipe, stops
            theirs.close()
            heard.close()
        except OSError as error:  # no process, pipe or memory left, or it died at once
            fault = error.strerror or str(error)
            raise WorkerDied(f"the worker process cannot be started: {fault}") from None

    def _answers_within(self, timeout_seconds: float | None) -> bool:
        """Wait for an answer; return whether there is one.

        Raises:
            EOFError: the process has ended without.
        """
        assert self._process is not None
        assert self._pipe is not None
        end = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        while not self._pipe.poll(min(ALIVE_SECONDS, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                return False
            # A process that it left behind may hold the pipe open.
            if not self._process.is_alive() and not self._pipe.poll():
                raise EOFError
        return True

    def _how_it_ended(self) -> str:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode or 0
        self._process = self._pipe = self._stops = None
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"the worker was killed by {name}{hint}"
        return f"the worker ended with exit code {code}"


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

    def run(self, jobs: Sequence[Job], timeout_seconds: float | None = None) -> list[State]:
        """Run jobs to their end.

        Raises:
            KeyboardInterrupt: they were interrupted, checkpoints written.
        """
        from finetune.pipeline import run_jobs

        assert timeout_seconds is None, "launchers.find_problems refuses it"
        states = run_jobs.run(jobs, self._session)
        if "interrupted" in states:
            raise signals.first_stop()
        return states

    def interrupt(self, stop: KeyboardInterrupt, timeout_seconds: float) -> bool:
        return True

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


def build_worker(*, is_quiet: bool) -> AnyWorker:
    return (LaunchedWorker if distributed.is_launched() else Worker)(is_quiet=is_quiet)


def follow() -> int:
    """Take part in the trainings of rank 0 until it ends; return its exit code."""
    quieten_libraries(is_quiet=True)
    distributed.join()
    for number in signals.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides, and broadcasts
    from finetune.pipeline import run_jobs
    from finetune.pipeline.session import Session

    session = Session()
    while True:
        try:
            verb, payload = distributed.receive()
        except RuntimeError:  # rank 0 died; the launcher reports it
            return 1
        if verb == "end":
            return cast(int, payload)
        assert verb == "train", verb
        config, inputs = payload
        run_jobs.take_part(config, inputs, session)


def _serve(pipe: Connection, stops: Connection, is_quiet: bool) -> None:
    """Answer requests until the sweep's process ends, and stop when it says so."""
    keep_streams()
    if os.name == "posix":
        os.setpgid(0, 0)  # Ctrl-C in a terminal goes to the sweep, which passes it on once
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    try:
        # A scheduler signals every process; only the sweep's process decides on it.
        signals.listen_to(lambda number: stops.recv() if stops.poll() else None)
        try:
            verbs = _load_verbs(is_quiet=is_quiet)
        except (Exception, SystemExit) as error:  # whatever a library's import may raise
            pipe.recv()
            pipe.send(WorkerDied(_why_not_started(error)))
            return
        while True:
            verb, payload = pipe.recv()
            try:
                answer: Any = verbs[verb](payload)
            except (ValueError, OSError) as error:
                answer = error
            pipe.send(answer)
    except (EOFError, OSError, KeyboardInterrupt):  # the sweep is gone, or wants it to end
        pass


def _load_verbs(*, is_quiet: bool) -> dict[str, Callable[[Any], Any]]:
    """Import torch, with one visible GPU; return the requests that a worker answers."""
    os.environ.update(devices.see_one_gpu(os.environ))
    quieten_libraries(is_quiet=is_quiet)
    from finetune.pipeline import preflight, run_jobs
    from finetune.pipeline.session import Session

    session = Session()
    return {
        "prepare": lambda job: preflight.prepare(job.config, session),
        "run": lambda jobs: run_jobs.run(jobs, session),
    }


def _why_not_started(error: BaseException) -> str:
    fault = f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_FAULT]}".rstrip(": ")
    if isinstance(error, MemoryError):
        return (
            f"the worker process cannot start: {fault}; it needs more memory, some 1 GiB at least"
        )
    return (
        f"the worker process cannot start: {fault}; repair the installation, "
        "python -c 'import finetune.pipeline.run_jobs' shows where it fails"
    )


def _end_with_the_sweep() -> None:
    """Exit when the sweep's process is killed, also in the middle of a job."""
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os._exit(1)
