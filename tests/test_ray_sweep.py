"""Sweeps on a real Ray cluster: a node killed in mid-training, and the command stopped."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from finetune.tracking.run_folder import RunFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="the extra [ray] is not installed"
    ),
]
ROOT = Path(__file__).parents[1]
# Long enough to be met in training; one thread, whose sums have the same bits everywhere.
GRID = (
    "model=tiny", "tracking=none", "data.num_examples=200", "evaluation.limit=12",
    "training.max_length=400", "training.epochs=12", "training.checkpoint_every=20", "lora.r=2,4",
    "sweep.max_concurrent_adapters=1", "workers.threads=1", "training.device=cpu", "--multirun",
)  # fmt: skip


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "finetune", *GRID, *arguments], cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(command: subprocess.Popen[str], expected: int = 0) -> str:
    printed, _ = command.communicate(timeout=400)
    assert command.returncode == expected, printed
    return printed


def wait_for(is_so: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.1)


def adapters(folder: Path) -> dict[str, str]:
    """Return the sha256 of each run's adapter, by the name of its folder."""
    return {
        path.parts[-3]: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("outputs/*/adapter/adapter_model.safetensors")
    }


def trains(folder: Path, num: int) -> bool:
    """Return whether so many runs are in mid-training."""
    runs = [RunFolder(path.parent) for path in folder.glob("outputs/*/events.jsonl")]
    losses = [run.metric("train/loss") for run in runs]
    return sum(bool(points) and points[-1].step > 40 for points in losses) >= num


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that work on a sweep: all that join it were started in its folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line = process.info["cmdline"] or []
        if process.info["cwd"] == str(folder) and "finetune" in line:
            found.append(process)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the adapters of the sweep without Ray."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(folder / "cache"))
        finish(start(folder, "workers.num=2"))
        yield adapters(folder)


@pytest.fixture
def nodes() -> Iterator[subprocess.Popen[str]]:
    """Yield the process of a cluster of two nodes."""
    cluster = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_nodes"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    yield cluster
    cluster.communicate(timeout=100)


def test_a_lost_node_loses_nothing(
    tmp_path: Path, alone: dict[str, str], nodes: subprocess.Popen[str]
) -> None:
    """Its run goes on from a checkpoint on the other one; the adapters are the local sweep's."""
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    address = nodes.stdout.readline().strip()
    sweep = start(tmp_path, "workers=ray", f"workers.address={address}")
    wait_for(lambda: trains(tmp_path, 2))
    nodes.stdin.write("kill\n")
    nodes.stdin.flush()
    assert nodes.stdout.readline() == "killed\n"
    printed = finish(sweep)
    assert printed.count(": finished") == 2
    assert adapters(tmp_path) == alone
    logs = [path.read_text() for path in tmp_path.glob("outputs/*/finetune.log")]
    assert [len(re.findall(r"resuming at step", log)) for log in sorted(logs, key=len)] == [0, 1]
    assert processes_in(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)]
)
def test_the_tasks_end_with_the_command(
    tmp_path: Path, alone: dict[str, str], number: signal.Signals, code: int
) -> None:
    """Checkpoints written, no process left; the same command goes on from them."""
    sweep = start(tmp_path, "workers=ray", "workers.num=2")
    wait_for(lambda: trains(tmp_path, 1))
    sweep.send_signal(number)
    finish(sweep, code)
    wait_for(lambda: processes_in(tmp_path) == [], 60)
    runs = [RunFolder(path.parent) for path in tmp_path.glob("outputs/*/events.jsonl")]
    assert any(list(run.checkpoints.glob("step-*")) for run in runs)
    finish(start(tmp_path, "workers=ray", "workers.num=2"))
    assert adapters(tmp_path) == alone
