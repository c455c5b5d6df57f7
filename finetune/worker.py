"""The process that runs jobs one after another, so that torch lives outside the sweep."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, cast

from finetune import distributed
from finetune.run_folder import Job, Plan, State

STOP_SECONDS = 5.0  # that an idle worker has to end by itself


class WorkerDied(RuntimeError):
    """The worker ended without an answer; the message says how."""


class Worker:
    """A worker process that is started when first needed, and again when it died."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet  # since a table on the same terminal shows what it does
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def prepare(self, job: Job) -> Plan:
        """Check a job and name its run."""
        return cast(Plan, self._ask("prepare", job))

    def run(self, jobs: Sequence[Job], timeout_seconds: float | None = None) -> list[State]:
        """Run jobs together to their end, or until their time is up."""
        return cast(list[State], self._ask("run", list(jobs), timeout_seconds))

    def interrupt(self, timeout_seconds: float) -> None:
        """Let the job at hand write a checkpoint and end."""
        if self._process is None or self._pipe is None or self._process.pid is None:
            return
        os.kill(self._process.pid, signal.SIGINT)
        if self._pipe.poll(timeout_seconds):
            with suppress(EOFError, ConnectionResetError):  # it ended before it had a job
                self._pipe.recv()

    def stop(self) -> None:
        """End the process; it has nothing to save."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()  # an idle worker ends at this
            self._process.join(STOP_SECONDS)
            self._process.kill()
            self._process.join()
            self._process = self._pipe = None

    def _ask(self, verb: str, given: Any, timeout_seconds: float | None = None) -> Any:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self._is_quiet), daemon=True
            )
            self._process.start()
            theirs.close()
        assert self._pipe is not None
        try:
            self._pipe.send((verb, given))
            if not self._pipe.poll(timeout_seconds):
                self._process.kill()
                self._how_it_ended()
                raise WorkerDied(f"it took longer than {timeout_seconds:g} s (sweep.job_timeout)")
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise WorkerDied(self._how_it_ended()) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _how_it_ended(self) -> str:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode or 0
        self._process = self._pipe = None
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"the worker was killed by {name}{hint}"
        return f"the worker ended with exit code {code}"


class LaunchedWorker:
    """The worker's twin under a launcher: jobs run in this process, and train in all of them."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet

    def __enter__(self) -> LaunchedWorker:
        quieten_libraries(is_quiet=self._is_quiet)
        distributed.join()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prepare(self, job: Job) -> Plan:
        """Check a job and name its run."""
        from finetune import preflight

        return preflight.prepare(job.config)

    def run(self, jobs: Sequence[Job], timeout_seconds: float | None = None) -> list[State]:
        """Run jobs to their end.

        Raises:
            KeyboardInterrupt: they were interrupted, checkpoints written.
        """
        from finetune import pipeline

        assert timeout_seconds is None, "distributed.find_problems refuses it"
        states = pipeline.run(jobs)
        if "interrupted" in states:
            raise KeyboardInterrupt
        return states

    def interrupt(self, timeout_seconds: float) -> None:
        pass

    def stop(self) -> None:
        pass


AnyWorker = Worker | LaunchedWorker


def build_worker(*, is_quiet: bool) -> AnyWorker:
    return (LaunchedWorker if distributed.is_launched() else Worker)(is_quiet=is_quiet)


def follow() -> int:
    """Take part in the trainings of the first process until it ends; return its exit code."""
    quieten_libraries(is_quiet=True)
    distributed.join()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the first process decides, and tells
    from finetune import pipeline

    while True:
        try:
            verb, given = distributed.hear()
        except RuntimeError:  # it is gone; the launcher tells how
            return 1
        if verb == "end":
            return cast(int, given)
        assert verb == "train", verb
        pipeline.take_part(*given)


def _serve(pipe: Connection, is_quiet: bool) -> None:
    """Answer requests until the sweep is gone."""
    if os.name == "posix":
        os.setpgid(0, 0)  # Ctrl-C in a terminal goes to the sweep, which passes it on once
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    try:
        quieten_libraries(is_quiet=is_quiet)
        from finetune import pipeline, preflight

        verbs: dict[str, Callable[[Any], Any]] = {
            "prepare": lambda job: preflight.prepare(job.config),
            "run": pipeline.run,
        }
        while True:
            verb, given = pipe.recv()
            try:
                answer: Any = verbs[verb](given)
            except (ValueError, OSError) as error:
                answer = error
            pipe.send(answer)
    except (EOFError, KeyboardInterrupt):
        pass


def _end_with_the_sweep() -> None:
    """End this process when the sweep's is killed, also in the middle of a job."""
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os._exit(1)


def quieten_libraries(*, is_quiet: bool = False) -> None:
    """Leave on screen what a user acts on: our own lines, and the libraries' errors."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    screen = logging.StreamHandler()
    screen.setLevel(logging.ERROR if is_quiet else logging.INFO)
    if is_quiet:
        os.environ["TQDM_DISABLE"] = "1"
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[screen], force=True)
    logging.getLogger("finetune").setLevel(logging.DEBUG)
    warnings.simplefilter("ignore")
    from datasets.utils.logging import disable_progress_bar as disable_datasets_bar
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_datasets_bar()
