"""Arrays of workers on a real Slurm node: preemption, time limits, cancelling, refusals."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from filelock import FileLock

from finetune.config.schema import WorkersConfig
from finetune.problems import Refused
from finetune.sweeps import slurm, slurm_queue
from finetune.sweeps.slurm_queue import Array

UP = Path(__file__).with_name("slurm_up.sh")
SLURM = WorkersConfig(launch="slurm", partition="main")
CANNOT_INSTALL = 3  # exit code of slurm_up.sh

# In place of finetune: counts its steps in a file, saves at a signal, ends at its last step.
WORKER = """\
import os, signal, sys, time
from pathlib import Path
from typing import Any

stops = []
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
steps = Path(f"steps-{os.environ['SLURM_ARRAY_TASK_ID']}")
done = int(steps.read_text()) if steps.exists() else 0
print("from step", done, flush=True)
while done < int(sys.argv[1]):
    time.sleep(0.5)
    done += 1
    if stops:
        time.sleep(2)  # the time of a checkpoint
        steps.write_text(str(done))
        print("saved at step", done, flush=True)
        sys.exit(75)
steps.write_text(str(done))
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start a Slurm cluster of one node, of which there is one at a time on this machine."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm node is started by root only")
    folder = tmp_path_factory.mktemp("slurm")
    with FileLock(Path(gettempdir()) / "finetune-slurm.lock"):
        yield from _started(folder)


def _started(folder: Path) -> Iterator[None]:
    done = subprocess.run([UP, "up", folder], capture_output=True, text=True, check=False)
    if done.returncode == CANNOT_INSTALL:
        pytest.skip("Slurm cannot be installed by apt here")
    try:
        assert done.returncode == 0, done.stderr
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            yield
            subprocess.run(["scancel", "--user", "root"], check=False)
    finally:
        subprocess.run([UP, "down", folder], check=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: None) -> Path:
    """Return a sweep's folder, below one whose `python -m finetune` is the stand-in."""
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "__init__.py").touch()
    (tmp_path / "finetune" / "__main__.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "reports" / "stand-in"
    path.mkdir(parents=True)
    return path


def submit(folder: Path, steps: int, num: int = 1, **changes: Any) -> Array:
    workers = replace(SLURM, **changes)
    return slurm.submit(workers, folder, [str(steps)], num, needs_gpu=False)


def wait_for(is_so: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.5)


def is_running(array: Array) -> bool:
    states = [one.state for one in slurm_queue.list_states(array)]
    return states == ["RUNNING"] * array.workers


def is_over(array: Array) -> bool:
    return slurm_queue.list_states(array) == []


def read_log(folder: Path, task: int = 0) -> list[str]:
    """Return what the worker of a task printed, over all its starts."""
    (log,) = folder.glob(f"slurm-*_{task}.log")
    lines = log.read_text().splitlines()
    return [line for line in lines if line.startswith(("from step", "saved at step"))]


@pytest.mark.slow
@pytest.mark.timeout(1500)  # another process may have the node
@pytest.mark.parametrize("partition", ["low", "now"])
def test_a_preempted_worker_comes_back(folder: Path, partition: str) -> None:
    """With a time of grace it asks for it itself, without one Slurm requeues it; it has saved."""
    array = submit(folder, 12, num=2, partition=partition)
    wait_for(lambda: is_running(array))
    wait_for(lambda: len(list(folder.glob("*.log"))) == 2)
    time.sleep(1)
    urgent = ["--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(["sbatch", *urgent], check=True, capture_output=True)
    wait_for(lambda: is_over(array))
    for task in range(2):
        begun, saved, again = read_log(folder, task)
        assert begun == "from step 0"
        assert again == f"from {saved.removeprefix('saved at ')}" != "from step 0"
        assert (folder.parents[1] / f"steps-{task}").read_text() == "12"


@pytest.mark.slow
@pytest.mark.timeout(1500)  # another process may have the node
def test_a_cancelled_worker_saves_and_stays_away(folder: Path) -> None:
    """What the user ends is not requeued, and how it ended can be asked."""
    array = submit(folder, 1000)
    wait_for(lambda: is_running(array))
    wait_for(lambda: bool(list(folder.glob("*.log"))) and len(read_log(folder)) == 1)
    slurm_queue.cancel(array)
    wait_for(lambda: is_over(array))
    assert read_log(folder)[1].startswith("saved at step")
    assert slurm_queue.describe_end(array).startswith("task 0 CANCELLED")
    time.sleep(10)  # beyond the time in which a requeued job waits
    assert is_over(array)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # another process may have the node
@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"partition": "none"}, "set workers.partition"),
        ({"gres": "tpu:1"}, "set workers.gres"),
        ({"gres": "gpu:99"}, "set workers.gres"),
        ({"extra": ["--memm=1"]}, "see workers.extra"),
    ],
)
def test_what_sbatch_refuses_is_not_recorded(
    folder: Path, changes: dict[str, Any], remedy: str
) -> None:
    """Its words are followed by the setting to change."""
    with pytest.raises(Refused) as refused:
        submit(folder, 1, **changes)
    assert remedy in refused.value.problems[0]
    assert slurm_queue.find_array(folder) is None


@pytest.mark.cluster
def test_a_worker_whose_time_is_up_comes_back(folder: Path) -> None:
    """Slurm's signal comes before the end of the time limit; the rest is done in a new start."""
    array = submit(folder, 260, time="3:00")
    wait_for(lambda: is_over(array), seconds=300)
    begun, saved, again = read_log(folder)
    assert begun == "from step 0"
    assert again == f"from {saved.removeprefix('saved at ')}"
    assert (folder.parents[1] / "steps-0").read_text() == "260"
