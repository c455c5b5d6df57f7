"""A worker that cannot start, or ends without an answer, is a reason in one line, never a hang."""

from __future__ import annotations

import errno
import multiprocessing.context
import os
import signal
import time
from pathlib import Path
from typing import NoReturn

import pytest

from finetune import distributed, signals
from finetune.config.schema import Config, ModelConfig
from finetune.pipeline.jobs import Job
from finetune.problems import Refused
from finetune.sweeps import planning, worker, worker_process
from finetune.sweeps.pool import Pool
from finetune.sweeps.worker import LaunchedWorker, Worker
from finetune.sweeps.worker_process import WorkerDied

# Put into the worker by PYTHONPATH: what becomes of its start, once it imports what torch needs.
START = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            {trouble}

sys.meta_path.insert(0, Finder())
"""
TROUBLES = {
    "a library is missing": (
        "raise OSError('libcudart.so.13: cannot open shared object file')",
        "the worker process cannot start: OSError: libcudart.so.13: cannot open",
    ),
    "it crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "the worker was killed by SIGSEGV"),
    "it ends": ("os._exit(3)", "the worker ended with exit code 3"),
}
JOB = Job(Config(model=ModelConfig(path="random://tiny")), "", [], {})


@pytest.mark.parametrize("name", TROUBLES)
def test_a_worker_that_cannot_start_says_why(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever its imports do: one reason for the whole grid, refused before the start."""
    trouble, reason = TROUBLES[name]
    (tmp_path / "sitecustomize.py").write_text(START.format(trouble=trouble), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Pool([Worker()]) as started, pytest.raises(Refused) as refused:
        planning.plan_sweep([JOB, JOB], "sweep", started)
    (problem,) = refused.value.problems
    assert reason in problem
    assert "\n" not in problem
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "cannot start: MemoryError; it needs more memory"),
        (SystemExit("no\nlicence"), "cannot start: SystemExit: no licence; repair"),
        (ImportError("x" * 9999), f"ImportError: {'x' * 287}"),
    ],
)
def test_the_reason_is_one_line_with_a_remedy(error: BaseException, reason: str) -> None:
    """However a library puts it."""
    said = worker_process._why_not_started(error)
    assert reason[:300] in said
    assert len(said) < 500
    assert "\n" not in said


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.EPIPE])
def test_a_process_that_cannot_be_made_says_why(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process, no memory, no descriptors, or dead before it has read what it is to do."""

    def start(_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", start)
    with Worker() as started, pytest.raises(WorkerDied, match=os.strerror(number)):
        started.prepare(JOB)


class Silent:
    """Stands for a pipe that stays open though its process is dead, held by a child of it."""

    def poll(self, seconds: float = 0.0) -> bool:
        time.sleep(min(seconds, 0.01))
        return False

    def send(self, _: object) -> None:
        pass

    def close(self) -> None:
        pass


class Dead:
    """Stands for the process."""

    exitcode = -signal.SIGKILL

    def is_alive(self) -> bool:
        return False

    def join(self, _: float | None = None) -> None:
        pass

    def kill(self) -> None:
        pass


@pytest.mark.parametrize(
    ("outcome", "is_blocked", "code"),
    [
        ("interrupted", False, 130),
        ("held", True, 75),
        ("held", False, None),
        ("failed", True, None),
    ],
)
def test_under_a_launcher_a_lost_claim_is_no_interruption_by_the_user(
    monkeypatch: pytest.MonkeyPatch, outcome: str, is_blocked: bool, code: int | None
) -> None:
    """Where the other ranks still train the run, the processes end and are to be started again."""
    monkeypatch.setattr(worker, "do_work", lambda *_: [outcome])
    monkeypatch.setattr(distributed, "is_desynchronised", lambda: is_blocked)
    launched = LaunchedWorker()
    monkeypatch.setattr(launched, "_session", None)
    if code is None:
        assert launched.run("train", [JOB]) == [outcome]
        return
    with pytest.raises(KeyboardInterrupt) as stop:
        launched.run("train", [JOB])
    assert signals.exit_code(stop.value) == code


def test_a_dead_worker_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what it left behind holds its pipe open."""
    monkeypatch.setattr(worker, "ALIVE_SECONDS", 0.01)
    with Worker() as started:
        started._process, started._pipe = Dead(), Silent()  # type: ignore[assignment]
        with pytest.raises(WorkerDied, match="killed by SIGKILL"):
            started.prepare(JOB)
