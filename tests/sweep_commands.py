"""Sweeps of the tiny model as commands: started in a folder, followed by its files, compared."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from finetune.tracking.run_folder import RunFolder
from tests.conftest import last_of_each

# 240 steps a run: long enough to be met in training, by Slurm's scheduler too. One thread a worker:
# a sum over two threads has other bits.
GRID = (
    "model=tiny", "tracking=none", "data.num_examples=40", "evaluation.limit=12",
    "training.max_length=400", "training.epochs=24", "training.checkpoint_every=20",
    "training.device=cpu", "sweep.max_concurrent_adapters=1", "workers.threads=1", "--multirun",
)  # fmt: skip
TWO_RUNS, THREE_RUNS, FOUR_RUNS = "lora.r=2,4", "lora.r=2,4,8", "lora.r=2,4,8,16"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command in a folder; a setting that is given again takes the place of GRID's."""
    return subprocess.Popen(
        [sys.executable, "-m", "finetune", *last_of_each([*GRID, *arguments])], cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(command: subprocess.Popen[str], expected: int = 0) -> str:
    """Wait for a command's end; return what it printed."""
    printed, _ = command.communicate(timeout=400)
    assert command.returncode == expected, printed
    return printed


def run(folder: Path, *arguments: str, expected: int = 0) -> str:
    """Run the command in a folder to its end; return what it printed."""
    return finish(start(folder, *arguments), expected)


def wait_for(is_so: Callable[[], bool], seconds: float = 200) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: it is not in time.
    """
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)


def adapters(folder: Path) -> dict[str, str]:
    """Return the sha256 of each run's adapter, by its rank."""
    found = {}
    for path in folder.glob("outputs/*/adapter/adapter_model.safetensors"):
        rank = re.search(r"-r(\d+)-", path.parts[-3])
        assert rank is not None
        found[rank[1]] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def assert_same_adapters(folder: Path, reference: dict[str, str], count: int) -> None:
    """Make sure that so many runs have the adapters that one worker trains."""
    found = adapters(folder)
    assert len(found) == count
    assert found == {rank: reference[rank] for rank in found}


def trained_steps(folder: Path) -> dict[str, int]:
    """Return the last step of each run that has begun to train, by its folder's name."""
    runs = [RunFolder(path.parent) for path in folder.glob("outputs/*/events.jsonl")]
    losses = {run.name: run.metric("train/loss") for run in runs}
    return {name: points[-1].step for name, points in losses.items() if points}


def are_training(folder: Path, count: int, *, beyond: int) -> bool:
    """Return whether so many runs have got beyond a step."""
    return sum(step > beyond for step in trained_steps(folder).values()) >= count


def states(run: Path) -> list[str]:
    """Return the states that a run has had."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event["state"] for event in events if event["event"] == "status"]


def stopped_at(run: Path) -> list[int]:
    """Return the last step before each interruption of a run, in its log's order."""
    step, found = 0, []
    for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()):
        if event["event"] == "metric" and event["key"] == "train/loss":
            step = event["step"]
        elif event["event"] == "status" and event["state"] == "interrupted":
            found.append(step)
    return found


def resumed_at(run: Path) -> list[int]:
    """Return the steps at which a run went on."""
    log = (run / "finetune.log").read_text()
    return [int(step) for step in re.findall(r"resuming at step (\d+)", log)]


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that work on a sweep: all that join it were started in its folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line = process.info["cmdline"] or []
        if process.info["cwd"] == str(folder) and "finetune" in line:
            found.append(process)
    return found


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the adapters that one worker trains, made once for all processes of a test run."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "reference"
    with FileLock(root / "reference.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(folder / "cache"))
        folder.mkdir(exist_ok=True)
        if len(adapters(folder)) < 4:
            run(folder, FOUR_RUNS, "workers.num=1")
    found = adapters(folder)
    assert set(found) == {"2", "4", "8", "16"}
    return found
