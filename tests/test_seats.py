"""Where workers compute: one a GPU of one kind by its UUID, or a share of the CPU's cores."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from finetune.config.schema import Config, TrainingConfig, WorkersConfig
from finetune.home import WORKER
from finetune.models.devices import VISIBLE, Gpu
from finetune.problems import Refused
from finetune.sweeps.seats import Seat, find_seats

TWO_T4 = [Gpu("Tesla T4", "GPU-a"), Gpu("Tesla T4", "GPU-b")]
MIXED = [Gpu("P100", "GPU-p"), *TWO_T4]


def seats(gpus: list[Gpu], environment: dict[str, str] | None = None, **workers: Any) -> list[Seat]:
    config = replace(Config(), workers=WorkersConfig(**workers))
    return find_seats(config, environment or {}, lambda: gpus)


def visible(found: list[Seat]) -> list[str | None]:
    return [seat.environment.get(VISIBLE) for seat in found]


@pytest.mark.parametrize("gpus", [TWO_T4, MIXED])
def test_each_gpu_of_one_kind_has_a_worker(gpus: list[Gpu]) -> None:
    """By UUID, and named; another kind would compute in another dtype, and slow all down."""
    found = seats(gpus)
    assert visible(found) == ["GPU-a", "GPU-b"]
    assert [seat.environment[WORKER] for seat in found] == ["GPU 0", "GPU 1"]


def test_the_environment_names_the_gpus() -> None:
    """Those that it hides are nobody's; on a machine without any it means nothing."""
    assert visible(seats(MIXED, {VISIBLE: "2, 0"})) == ["2", "0"]
    assert seats(MIXED, {VISIBLE: "1"}) == [Seat()]
    assert seats(MIXED, {VISIBLE: ""}) == [Seat()]
    assert seats([], {VISIBLE: "0,1"}) == [Seat()]


def test_a_single_worker_sees_what_the_process_sees() -> None:
    """Its threads and its GPU are as without workers, so its bits are, too."""
    assert seats([]) == [Seat()]
    assert seats([], threads=3) == [Seat({"OMP_NUM_THREADS": "3"})]


def test_several_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are set before torch is imported; at least one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    found = seats([], num=3)
    assert [seat.environment["OMP_NUM_THREADS"] for seat in found] == ["2"] * 3
    assert [seat.environment[WORKER] for seat in found] == ["CPU 0", "CPU 1", "CPU 2"]
    assert seats([], num=16)[15].environment["OMP_NUM_THREADS"] == "1"
    assert seats([], num=2, gpus_per_worker=2)[0] == Seat(
        {WORKER: "CPU 0", "OMP_NUM_THREADS": "2"}, 2
    )


def test_a_worker_of_a_task_is_named_after_it() -> None:
    """Slurm's task 3 has two GPUs."""
    found = seats(TWO_T4, {WORKER: "task 3"})
    assert [seat.environment[WORKER] for seat in found] == ["task 3 GPU 0", "task 3 GPU 1"]


def test_a_worker_may_have_several_gpus() -> None:
    """Which train one run together."""
    four = [Gpu("A100", f"GPU-{letter}") for letter in "abcd"]
    found = seats(four, gpus_per_worker=2)
    assert visible(found) == ["GPU-a,GPU-b", "GPU-c,GPU-d"]
    assert [seat.processes for seat in found] == [2, 2]
    assert found[1].environment[WORKER] == "GPU 2+3"


def test_training_on_the_cpu_needs_no_gpu() -> None:
    """Where there are some, too."""
    config = Config(training=TrainingConfig(device="cpu"), workers=WorkersConfig(num=2))
    assert visible(find_seats(config, {}, lambda: TWO_T4)) == [None, None]


@pytest.mark.parametrize("launch", ["slurm", "ray"])
def test_a_head_node_computes_nothing(launch: str) -> None:
    """Its own GPUs say nothing about the workers' number."""
    assert seats(TWO_T4, launch=launch, num=8) == [Seat({VISIBLE: ""})]


@pytest.mark.parametrize(
    ("workers", "remedy"),
    [
        ({"num": 3}, "set workers.num=2"),
        ({"num": 2, "gpus_per_worker": 2}, "set workers.num=1"),
        ({"gpus_per_worker": 4}, "set workers.num=1 workers.gpus_per_worker=2"),
    ],
)
def test_more_than_there_are_is_refused(workers: dict[str, Any], remedy: str) -> None:
    """Two workers on one GPU would not have the memory that the plan counts on."""
    with pytest.raises(Refused) as refused:
        seats(TWO_T4, **workers)
    (problem,) = refused.value.problems
    assert "there are only 2 visible GPUs of one kind here" in problem
    assert problem.endswith(remedy)
