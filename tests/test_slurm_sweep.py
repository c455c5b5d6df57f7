"""Sweeps on a real Slurm node: preempted, out of time, cancelled, followed by the same command."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from finetune.sweeps.slurm_queue import Array, find_array, list_states
from finetune.tracking.run_folder import RunFolder
from tests.sweep_commands import (
    TWO_RUNS,
    adapters,
    are_training,
    assert_same_adapters,
    processes_in,
    resumed_at,
    run,
    start,
    states,
    stopped_at,
    wait_for,
)
from tests.test_slurm_cluster import node as node

# Long enough to be met in training on a fast machine too: Slurm takes seconds to start a task.
GRID = (TWO_RUNS, "data.num_examples=200", "training.epochs=12")
SLURM = (*GRID, "workers=slurm", "workers.num=2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the adapters that one worker trains."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(folder / "cache"))
        run(folder, *GRID, "workers.num=1")
    return adapters(folder)


def array_of(folder: Path) -> Array:
    (sweep,) = folder.glob("multirun_reports/*")
    array = find_array(sweep)
    assert array is not None
    return array


@contextmanager
def slowed(folder: Path, seconds: float) -> Iterator[None]:
    """Let a sweep's workers run for so many seconds of each half second, as on a slow machine."""
    is_over = threading.Event()

    def halt() -> None:
        workers: list[psutil.Process] = []
        while not is_over.is_set():
            for worker in workers:  # before the others are looked for, which takes a while
                call(worker.suspend)
            workers = [one for process in processes_in(folder) for one in children_of(process)]
            for worker in workers:
                call(worker.suspend)
            is_over.wait(0.5)
            for worker in workers:
                call(worker.resume)
            is_over.wait(seconds)

    thread = threading.Thread(target=halt)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def call(function: Callable[[], None]) -> None:
    with suppress(psutil.NoSuchProcess):
        function()


def children_of(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children()
    return []


def assert_no_step_is_lost(folder: Path) -> None:
    """Make sure that a run went on at the step at which it was stopped, and did each step once."""
    assert states(folder) == ["running", "interrupted", "running", "finished"]
    assert resumed_at(folder) == stopped_at(folder)
    steps = [point.step for point in RunFolder(folder).metric("train/loss")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.timeout(1500)  # another process may have the node
def test_a_preempted_sweep_is_the_local_one(
    tmp_path: Path, reference: dict[str, str], node: None
) -> None:
    """Both tasks are preempted in mid-training and requeued; no step is lost, nor a bit."""
    printed = run(tmp_path, *SLURM, "workers.partition=low")
    assert printed.count("named by its first worker") == 2
    assert "submitted: Slurm array" in printed
    wait_for(lambda: are_training(tmp_path, 2, beyond=5))
    urgent = ["--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(["sbatch", *urgent], check=True, capture_output=True)
    following = run(tmp_path, *SLURM, "workers.partition=low")
    assert "report.html" in following
    assert following.count(": finished") == 2
    assert_same_adapters(tmp_path, reference, 2)
    for folder in tmp_path.glob("outputs/*"):
        assert_no_step_is_lost(folder)
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["worker"].startswith("task ")
    assert run(tmp_path, *SLURM, "workers.partition=low").count("finished already") == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)  # another process may have the node
def test_what_a_user_cancels_is_submitted_again(
    tmp_path: Path, reference: dict[str, str], node: None
) -> None:
    """Scancel saves checkpoints; Ctrl-C of the command that follows leaves the array at work."""
    run(tmp_path, *SLURM)
    wait_for(lambda: are_training(tmp_path, 2, beyond=20))
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
    assert_same_adapters(tmp_path, reference, 2)
    for folder in folders:
        assert_no_step_is_lost(folder)


@pytest.mark.cluster  # its shortest wall clock is three minutes
@pytest.mark.timeout(1500)  # another process may have the node
def test_a_sweep_whose_time_is_up_goes_on_at_the_same_step(
    tmp_path: Path, reference: dict[str, str], node: None
) -> None:
    """Slurm's signal comes before the end of the wall clock; the tasks ask to be requeued."""
    command = (*SLURM, "workers.time=3:00")
    run(tmp_path, *command)
    wait_for(lambda: are_training(tmp_path, 2, beyond=0))
    folders = list(tmp_path.glob("outputs/*"))
    with slowed(tmp_path, 0.01):  # longer than three minutes
        wait_for(lambda: all(stopped_at(folder) for folder in folders))
    run(tmp_path, *command)
    assert_same_adapters(tmp_path, reference, 2)
    for folder in folders:
        assert_no_step_is_lost(folder)
        assert "stopped by SIGTERM" in (folder / "events.jsonl").read_text()
    logs = [path.read_text() for path in tmp_path.glob("multirun_reports/*/slurm-*_*.log")]
    assert [log.count("requeued: the runs continue") for log in logs] == [1, 1]


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
