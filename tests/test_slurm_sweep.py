"""Sweeps on a real Slurm node: preempted, cancelled, followed and reported by the same command."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.sweeps.slurm_queue import Array, find_array, list_states
from finetune.tracking.run_folder import RunFolder
from tests.test_slurm_cluster import node as node

# Long enough to be met in training; one thread, whose sums have the same bits everywhere.
GRID = (
    "model=tiny", "tracking=none", "data.num_examples=200", "evaluation.limit=12",
    "training.max_length=400", "training.epochs=12", "lora.r=2,4",
    "sweep.max_concurrent_adapters=1", "workers.threads=1", "training.device=cpu", "--multirun",
)  # fmt: skip
SLURM = ("workers=slurm", "workers.num=2")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "finetune", *GRID, *arguments], cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run(folder: Path, *arguments: str, expected: int = 0) -> str:
    """Return what the command printed."""
    command = start(folder, *arguments)
    printed, _ = command.communicate(timeout=400)
    assert command.returncode == expected, printed
    return printed


def wait_for(is_so: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.2)


def adapters(folder: Path) -> dict[str, str]:
    """Return the sha256 of each run's adapter, by the name of its folder."""
    return {
        path.parts[-3]: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("outputs/*/adapter/adapter_model.safetensors")
    }


def last_steps(folder: Path) -> list[int]:
    """Return the last step of each run that trains."""
    runs = [RunFolder(path.parent) for path in folder.glob("outputs/*/events.jsonl")]
    losses = [run.metric("train/loss") for run in runs]
    return [points[-1].step for points in losses if points]


def array_of(folder: Path) -> Array:
    (sweep,) = folder.glob("multirun_reports/*")
    array = find_array(sweep)
    assert array is not None
    return array


def states(run: Path) -> list[str]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event["state"] for event in events if event["event"] == "status"]


def resumed(run: Path) -> list[int]:
    """Return the steps at which a run went on."""
    return [
        int(n) for n in re.findall(r"resuming at step (\d+)", (run / "finetune.log").read_text())
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the adapters of the sweep without Slurm."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(folder / "cache"))
        run(folder, "workers.num=2")
        yield adapters(folder)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # another process may have the node
def test_a_preempted_sweep_is_the_local_one(
    tmp_path: Path, alone: dict[str, str], node: None
) -> None:
    """Both tasks are preempted in mid-training and requeued; no step is lost, nor a bit."""
    printed = run(tmp_path, *SLURM, "workers.partition=low")
    assert printed.count("named by its first worker") == 2
    assert "submitted: Slurm array" in printed
    wait_for(lambda: len(last_steps(tmp_path)) == 2 and min(last_steps(tmp_path)) > 20)
    urgent = ["--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(["sbatch", *urgent], check=True, capture_output=True)
    following = run(tmp_path, *SLURM, "workers.partition=low")
    assert "report.html" in following
    assert following.count(": finished") == 2
    assert adapters(tmp_path) == alone
    for folder in tmp_path.glob("outputs/*"):
        assert states(folder) == ["running", "interrupted", "running", "finished"]
        (at,) = resumed(folder)
        assert at > 20
        steps = [point.step for point in RunFolder(folder).metric("train/loss")]
        assert steps == list(range(1, len(steps) + 1))
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["worker"].startswith("task ")
    assert run(tmp_path, *SLURM, "workers.partition=low").count("finished already") == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)  # another process may have the node
def test_what_a_user_cancels_is_submitted_again(
    tmp_path: Path, alone: dict[str, str], node: None
) -> None:
    """Scancel saves checkpoints; Ctrl-C of the command that follows leaves the array at work."""
    run(tmp_path, *SLURM)
    wait_for(lambda: len(last_steps(tmp_path)) == 2 and min(last_steps(tmp_path)) > 20)
    array = array_of(tmp_path)
    subprocess.run(["scancel", array.job], check=True)
    wait_for(lambda: list_states(array) == [])
    folders = list(tmp_path.glob("outputs/*"))
    assert [states(folder)[-1] for folder in folders] == ["interrupted"] * 2
    assert "submitted: Slurm array" in run(tmp_path, *SLURM)
    assert array_of(tmp_path) != array
    following = start(tmp_path, *SLURM)
    assert following.stdout is not None
    assert any("2 running" in line for line in iter(following.stdout.readline, ""))
    following.send_signal(signal.SIGINT)
    printed, _ = following.communicate(timeout=100)
    assert following.returncode == 130, printed
    assert re.search(r"Slurm array \d+ goes on; scancel \d+ ends it", printed)
    run(tmp_path, *SLURM)
    assert adapters(tmp_path) == alone
    assert [states(folder)[-1] for folder in folders] == ["finished"] * 2
    assert all(len(resumed(folder)) == 1 for folder in folders)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # another process may have the node
def test_a_grid_for_gpus_is_planned_without_one(tmp_path: Path, node: None) -> None:
    """Of the reference experiment only what is static is refused here: the model is missing."""
    command = [sys.executable, "-m", "finetune", "experiment=mistral_alpaca_arc", "workers=slurm"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "mistralai/Mistral-7B-v0.1 is not on this machine" in done.stderr
    assert "CUDA" not in done.stderr
    grid = ["model=tiny", "lora.r=2,4", "training.device=cuda", "sweep.dry_run=true"]
    command = [sys.executable, "-m", "finetune", *grid, "workers=slurm", "--multirun"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("named by its first worker") == 2
