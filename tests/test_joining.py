"""Runs of a sweep that other machines take: named by the first worker, matched by the others."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.config.inputs import Inputs, Source
from finetune.config.schema import Config, ModelConfig, WorkersConfig
from finetune.pipeline.jobs import Job
from finetune.problems import Refused
from finetune.signals import Deadline, OutOfTime
from finetune.sweeps import elsewhere
from finetune.sweeps.elsewhere import Follower
from finetune.sweeps.joining import name_runs
from finetune.sweeps.planning import Point, Sweep
from finetune.tracking.run_folder import RunFolder, Status
from finetune.tracking.sweep_record import SweepRecord, find_names
from finetune.tracking.tracker import NullTracker


def build_sweep(root: Path, dtype: str | None, ranks: Sequence[str] = ("2", "4")) -> Sweep:
    """Return a sweep as planned on a machine that computes in a dtype; None: on a head node."""
    config = replace(Config(), report_dir=str(root / "reports"))
    config.workers = WorkersConfig(launch="local" if dtype else "slurm")
    points = []
    for rank in ranks:
        placeholder = root / "reports" / "grid" / "jobs" / f"job-{rank}"
        folder = root / "outputs" / f"r{rank}-{dtype}" if dtype else placeholder
        source = Source("", "")
        inputs = Inputs("cpu", source, [], ModelConfig(), "", folder, job=f"job-{rank}")
        job = Job(config, "", [], {"lora.r": rank}, replace(inputs, dtype=dtype or ""))
        points.append(Point(job, RunFolder(folder), "train"))
    return Sweep("grid", points, [])


@pytest.fixture
def planned(tmp_path: Path) -> Sweep:
    """Return a sweep that a head node has recorded."""
    sweep = build_sweep(tmp_path, None)
    sweep.record(["lora.r=2,4"]).write(sweep.folder)
    return sweep


def folders(sweep: Sweep) -> list[str]:
    return [run.folder for run in SweepRecord.load(sweep.folder).runs]


def test_the_first_worker_names_the_runs(planned: Sweep, tmp_path: Path) -> None:
    """Its successors find the same names; the head, started again, keeps them."""
    assert folders(planned) == ["jobs/job-2", "jobs/job-4"]
    assert find_names(planned.folder) == {}
    for _ in range(2):
        name_runs(build_sweep(tmp_path, "bf16"))
        assert folders(planned) == ["../../outputs/r2-bf16", "../../outputs/r4-bf16"]
    planned.record(["lora.r=2,4"]).write(planned.folder)
    assert folders(planned) == ["../../outputs/r2-bf16", "../../outputs/r4-bf16"]
    assert find_names(planned.folder)["job-4"] == "../../outputs/r4-bf16"


def test_another_kind_of_card_is_refused(planned: Sweep, tmp_path: Path) -> None:
    """With what the run was begun on; nothing is renamed."""
    name_runs(build_sweep(tmp_path, "bf16"))
    begun = tmp_path / "outputs" / "r2-bf16"
    begun.mkdir(parents=True)
    conditions = {"versions": {}, "dtype": "bf16", "gpu": "NVIDIA L4", "host": "node1"}
    (begun / "environment.json").write_text(json.dumps(conditions))
    with pytest.raises(Refused) as refused:
        name_runs(build_sweep(tmp_path, "fp16"))
    assert len(refused.value.problems) == 2
    assert "in fp16, than the one that was begun (bf16, NVIDIA L4, node1)" in str(refused.value)
    assert folders(planned) == ["../../outputs/r2-bf16", "../../outputs/r4-bf16"]


@pytest.mark.parametrize("change", ["inputs", "grid", "values"])
def test_another_sweep_is_refused(planned: Sweep, tmp_path: Path, change: str) -> None:
    """Rows that differ on this machine, or a command that does."""
    other = build_sweep(tmp_path, "bf16", ["2", "8"] if change == "values" else ["2", "4"])
    if change == "inputs":
        job = other.points[1].job
        assert job.inputs is not None
        inputs = replace(job.inputs, job="other rows")
        other.points[1] = replace(other.points[1], job=replace(job, inputs=inputs))
    elif change == "grid":
        other = build_sweep(tmp_path, "bf16", ["2"])
    with pytest.raises(Refused, match="start its command again without"):
        name_runs(other)
    assert folders(planned) == ["jobs/job-2", "jobs/job-4"]


def test_a_sweep_that_nobody_conducts_is_refused(tmp_path: Path) -> None:
    """No folder is made for it."""
    with pytest.raises(Refused, match="begun without it"):
        name_runs(build_sweep(tmp_path, "bf16"))
    assert not (tmp_path / "reports").exists()


class Tasks:
    """Stands for tasks elsewhere."""

    def __init__(self, alive: int) -> None:
        self.count = alive

    def alive(self) -> int:
        return self.count

    def interrupt(self, timeout_seconds: float) -> bool:
        self.count = 0
        return True


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, and do not wait long for what file systems show late."""
    monkeypatch.setattr(elsewhere, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(elsewhere, "LOST_SECONDS", 0.3)


def end(run: RunFolder, state: str) -> None:
    run.write_status(Status(state, None, 1.0, 2.0))  # type: ignore[arg-type]


@pytest.mark.usefixtures("quickly")
def test_runs_elsewhere_are_followed_by_their_folders(planned: Sweep, tmp_path: Path) -> None:
    """From when a worker has named them, until each has ended; what was reported is not again."""
    worker = build_sweep(tmp_path, "bf16")

    def work() -> None:
        name_runs(worker)
        end(worker.points[0].run, "running")
        time.sleep(0.1)
        end(worker.points[1].run, "failed")
        end(worker.points[0].run, "finished")

    thread = threading.Thread(target=work)
    thread.start()
    states = list(Follower(planned, NullTracker(), Tasks(2)).states())
    thread.join()
    assert sorted(states) == ["failed", "finished"]


@pytest.mark.usefixtures("quickly")
def test_what_no_worker_is_left_for_is_interrupted(planned: Sweep, tmp_path: Path) -> None:
    """After a while in which its end may still show; a run that has no folder, too."""
    worker = build_sweep(tmp_path, "bf16")
    name_runs(worker)
    end(worker.points[0].run, "running")
    late = threading.Timer(0.1, lambda: end(worker.points[1].run, "finished"))
    late.start()
    states = list(Follower(planned, NullTracker(), Tasks(0)).states())
    assert states == ["finished", "interrupted"]
    status = worker.points[0].run.status()
    assert status is not None
    assert (status.state, status.reason) == (
        "interrupted",
        "its worker has ended; the same command goes on",
    )


@pytest.mark.usefixtures("quickly")
def test_a_deadline_ends_the_following(planned: Sweep) -> None:
    """The tasks are told by whoever catches it."""
    with pytest.raises(OutOfTime):
        list(Follower(planned, NullTracker(), Tasks(1)).states(Deadline("1s", 0.1)))
