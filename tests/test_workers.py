"""Several workers, killed, joined and stopped: their adapters are one worker's, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.tracking.run_folder import RunFolder

# One thread a worker: a sum over two threads has other bits.
GRID = (
    "model=tiny", "tracking=none", "data.num_examples=40", "evaluation.limit=12",
    "training.max_length=400", "training.epochs=24", "training.checkpoint_every=20",
    "lora.r=2,4,8,16", "sweep.max_concurrent_adapters=1", "workers.threads=1", "--multirun",
)  # fmt: skip
RANKS = ("2", "4", "8", "16")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the sweep's command in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "finetune", *GRID, *arguments], cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(command: subprocess.Popen[str], expected: int = 0) -> str:
    """Wait for a command's end; return what it printed."""
    printed, _ = command.communicate(timeout=300)
    assert command.returncode == expected, printed
    return printed


def adapters(folder: Path) -> dict[str, str]:
    """Return the sha256 of each run's adapter, by its rank."""
    found = {}
    for path in folder.glob("outputs/*/adapter/adapter_model.safetensors"):
        rank = re.search(r"-r(\d+)-", path.parts[-3])
        assert rank is not None
        found[rank[1]] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def wait_for(is_so: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)


def trained_steps(folder: Path) -> dict[str, int]:
    """Return the last step of each run that has begun to train, by its folder's name."""
    runs = [RunFolder(path.parent) for path in folder.glob("outputs/*/events.jsonl")]
    losses = {run.name: run.metric("train/loss") for run in runs}
    return {name: points[-1].step for name, points in losses.items() if points}


def workers_of(command: subprocess.Popen[str]) -> list[int]:
    """Return the processes of a sweep's workers."""
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, line in lines.items() if b"spawn_main" in line]


def states(run: Path) -> list[str]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event["state"] for event in events if event["event"] == "status"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the adapters that one worker trains."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(folder / "cache"))
        finish(start(folder, "workers.num=1"))
        found = adapters(folder)
        assert set(found) == {*RANKS}
        yield found


@pytest.mark.slow
def test_two_workers_train_what_one_does(tmp_path: Path, alone: dict[str, str]) -> None:
    """Each run once, its worker recorded; a repeated command finds all finished."""
    printed = finish(start(tmp_path, "workers.num=2"))
    assert adapters(tmp_path) == alone
    runs = list(tmp_path.glob("outputs/*"))
    assert [states(run) for run in runs] == [["running", "finished"]] * 4
    names = {json.loads((run / "environment.json").read_text())["worker"] for run in runs}
    assert names == {"CPU 0", "CPU 1"}
    assert "CPU 1: " in printed
    assert printed.count(" finished in ") == 4
    assert finish(start(tmp_path, "workers.num=2")).count("finished already") == 4
    assert [states(run) for run in runs] == [["running", "finished"]] * 4


@pytest.mark.slow
def test_a_killed_worker_is_replaced(tmp_path: Path, alone: dict[str, str]) -> None:
    """Its run goes on from its checkpoint, once; the other worker notices nothing."""
    sweep = start(tmp_path, "workers.num=2")
    wait_for(lambda: any(step > 24 for step in trained_steps(tmp_path).values()))
    os.kill(workers_of(sweep)[0], signal.SIGKILL)
    printed = finish(sweep)
    assert "killed by SIGKILL (out of memory?); it is tried once more" in printed
    assert adapters(tmp_path) == alone


@pytest.mark.slow
def test_a_killed_conductor_leaves_no_worker_and_loses_nothing(
    tmp_path: Path, alone: dict[str, str]
) -> None:
    """The same command goes on from the checkpoints."""
    sweep = start(tmp_path, "workers.num=2")
    wait_for(lambda: sum(step > 24 for step in trained_steps(tmp_path).values()) == 2)
    workers = workers_of(sweep)
    assert len(workers) == 2
    sweep.kill()
    sweep.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)
    printed = finish(start(tmp_path, "workers.num=2"))
    assert "resumed at step" in printed
    assert adapters(tmp_path) == alone


@pytest.mark.slow
def test_a_second_command_joins_and_leaves(tmp_path: Path, alone: dict[str, str]) -> None:
    """It takes runs that nobody has, and its end by Ctrl-C costs the sweep nothing."""
    sweep = start(tmp_path, "workers.num=1")
    wait_for(lambda: bool(trained_steps(tmp_path)))
    leaving, staying = (start(tmp_path, "workers.num=1", "workers.join=true") for _ in range(2))
    wait_for(lambda: len(trained_steps(tmp_path)) == 3)
    time.sleep(0.3)
    leaving.send_signal(signal.SIGINT)
    assert "the sweep goes on without this process" in finish(leaving, 130)
    assert "joined sweep" in finish(staying)
    finish(sweep)
    assert adapters(tmp_path) == alone
    for run in tmp_path.glob("outputs/*"):
        assert states(run)[-1] == "finished"
    holders = [
        {json.loads(line)["claim"] for line in (run / "events.jsonl").read_text().splitlines()}
        for run in tmp_path.glob("outputs/*")
    ]
    assert len(set().union(*holders)) >= 4


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_from_its_checkpoints(
    tmp_path: Path, alone: dict[str, str]
) -> None:
    """By the machine, and by `workers.stop_after`: both runs at work have saved; exit code 75."""
    sweep = start(tmp_path, "workers.num=2")
    wait_for(lambda: sum(step > 2 for step in trained_steps(tmp_path).values()) == 2)
    sweep.send_signal(signal.SIGUSR1)
    assert "stopped by SIGUSR1; the same command resumes" in finish(sweep, 75)
    begun = [RunFolder(tmp_path / "outputs" / name) for name in trained_steps(tmp_path)]
    ended = [states(run.path)[-1] for run in begun]
    assert "interrupted" in ended
    assert set(ended) <= {"interrupted", "finished"}
    assert all(run.is_trained or list(run.checkpoints.glob("step-*")) for run in begun)
    assert finish(start(tmp_path, "workers.num=2", "workers.stop_after=12s"), 75)
    finish(start(tmp_path, "workers.num=2"))
    assert adapters(tmp_path) == alone


def test_a_sweep_that_was_not_begun_is_not_joined(tmp_path: Path) -> None:
    """There is nothing to join, and it is said before anything runs."""
    printed = finish(start(tmp_path, "workers.join=true"), 2)
    assert "begun without it" in printed
    assert not list(tmp_path.glob("outputs/*"))
