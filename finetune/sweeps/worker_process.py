"""The process of a worker: answers requests, alone or as rank 0 of several that train one run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from subprocess import Popen, TimeoutExpired
from typing import TYPE_CHECKING, Any, cast, get_args

from finetune import distributed, signals
from finetune.logs import quieten_libraries
from finetune.models import devices
from finetune.pipeline.jobs import Job
from finetune.streams import keep_streams
from finetune.sweeps.schedule import Kind
from finetune.sweeps.seats import Seat
from finetune.sweeps.tied_process import start_tied

if TYPE_CHECKING:
    from finetune.pipeline.session import Session

RANK_SECONDS = 5.0  # for a killed process to be gone once its connections are
LONGEST_FAULT = 300  # characters of a library's error


class WorkerDied(RuntimeError):
    """The worker ended without an answer; the message has its exit code or signal."""


class WorkerKilled(WorkerDied):
    """It was ended by a signal: for want of memory, or by another program."""


def do_work(kind: Kind, jobs: Sequence[Job], session: Session) -> list[str]:
    from finetune.pipeline import run_jobs

    if kind == "base":
        run_jobs.score_base(jobs[0], session)
        return []
    return [*run_jobs.run(jobs, session, kind)]


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


def serve(pipe: Connection, stops: Connection, seat: Seat, is_quiet: bool) -> None:
    """Answer requests until the sweep's process ends, and stop when it says so."""
    keep_streams()
    if os.name == "posix":
        os.setpgid(0, 0)  # Ctrl-C in a terminal goes to the sweep, which passes it on once
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    try:
        # A scheduler signals every process; only the sweep's process decides on it.
        signals.listen_to(lambda number: stops.recv() if stops.poll() else None)
        try:
            ranks, verbs = _begin(seat, is_quiet=is_quiet)
        except (Exception, SystemExit) as error:  # whatever a library's import may raise
            pipe.recv()
            pipe.send((WorkerDied(_why_not_started(error)), True))
            return
        try:
            _answer(pipe, verbs, ranks)
        finally:
            _end_ranks(ranks)
    except (EOFError, OSError, KeyboardInterrupt):  # the sweep is gone, or wants it to end
        pass


def _answer(
    pipe: Connection, verbs: dict[str, Callable[[Any], Any]], ranks: Sequence[Popen[bytes]]
) -> None:
    """Answer requests until there is no sweep, or the other ranks are blocked in a collective."""
    while not distributed.is_desynchronised():
        try:
            verb, payload = pipe.recv()
        except EOFError:
            return
        try:
            answer: Any = verbs[verb](payload)
        except (ValueError, OSError) as error:
            answer = error
        is_last = distributed.is_desynchronised()
        pipe.send(((_find_killed(ranks) or answer) if is_last else answer, is_last))


def _end_ranks(ranks: Sequence[Popen[bytes]]) -> None:
    """End the other processes, and then this one; alone it ends as any process does."""
    if not ranks:
        return
    distributed.end_ranks(0)
    for rank in ranks:
        with suppress(TimeoutExpired):
            rank.wait(0 if distributed.is_desynchronised() else RANK_SECONDS)
        rank.kill()
        rank.wait()
    distributed.exit_now(0)


def _find_killed(ranks: Sequence[Popen[bytes]]) -> WorkerKilled | None:
    """Return what took another process out of a training, if that was a signal."""
    for rank in ranks:
        with suppress(TimeoutExpired):
            if (code := rank.wait(RANK_SECONDS)) < 0:
                name = signal.Signals(-code).name
                return WorkerKilled(f"a process of the worker was killed by {name}")
    return None


def _begin(
    seat: Seat, *, is_quiet: bool
) -> tuple[list[Popen[bytes]], dict[str, Callable[[Any], Any]]]:
    """Take the seat, then load the libraries: torch sees the seat's GPUs and threads.

    Returns:
        The other processes that train with this one, and the requests that it answers.
    """
    os.environ.update(devices.see_one_gpu(os.environ) | seat.environment)
    quieten_libraries(is_quiet=is_quiet)
    return _open_ranks(seat.processes), _load_verbs()


def _load_verbs() -> dict[str, Callable[[Any], Any]]:
    """Return the functions that answer requests, by their names."""
    from finetune.pipeline import preflight
    from finetune.pipeline.session import Session

    session = Session()
    work = {kind: partial(do_work, kind, session=session) for kind in get_args(Kind)}
    return {"prepare": lambda job: preflight.prepare(job.config, session), **work}


def _open_ranks(count: int) -> list[Popen[bytes]]:
    """Start the other processes that train each run, one a GPU; they die with this one."""
    if count == 1:
        return []
    from tqdm import tqdm  # once TQDM_DISABLE is set

    tqdm.set_lock(threading.RLock())  # its semaphore would be left behind by `exit_now`
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    command, folder = [sys.executable, "-m", "finetune"], os.getcwd()
    ranks = [
        start_tied(
            command, folder, os.environ | world | place, sys.stderr.buffer, at_death=signal.SIGKILL
        )
        for place in places[1:]
    ]
    os.environ.update(world | places[0])
    distributed.join()
    return ranks


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
