"""The conduct of a sweep by workers that are stood in for: what becomes of each run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from finetune.config.schema import Config, SweepConfig
from finetune.pipeline.jobs import Job
from finetune.signals import Deadline, OutOfTime, Stopped
from finetune.sweeps.conduct import Conduct
from finetune.sweeps.planning import Action, Point, Sweep
from finetune.sweeps.pool import Pool
from finetune.sweeps.schedule import Kind
from finetune.sweeps.worker_process import WorkerDied, WorkerKilled
from finetune.tracking.run_folder import RunFolder, Status
from finetune.tracking.tracker import NullTracker
from finetune.training.grouping import Group

Answer = Callable[[Kind, list[str]], list[str]]


class StandIn:
    """Stands for a worker: answers at once, as a test says, and keeps what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[tuple[Kind, list[str]]] = []
        self.stops: list[KeyboardInterrupt] = []
        self.timeouts: list[float | None] = []

    def __enter__(self) -> StandIn:
        return self

    def run(self, kind: Kind, jobs: Sequence[Job], timeout: float | None = None) -> list[str]:
        names = [job.yaml for job in jobs]
        self.asked.append((kind, names))
        self.timeouts.append(timeout)
        return self.answer(kind, names)

    def interrupt(self, stop: KeyboardInterrupt) -> None:
        self.stops.append(stop)

    def hang_up(self) -> None:
        pass

    def stop(self, grace_seconds: float = 0.0) -> None:
        pass


def finished(kind: Kind, names: list[str]) -> list[str]:
    """Answer that all went well."""
    return {"base": [], "train": ["trained"] * len(names), "evaluate": ["finished"]}[kind]


def build_sweep(
    folder: Path, groups: Sequence[Sequence[int]], action: Action = "train", **changes: Any
) -> Sweep:
    """Return a sweep of runs that lack one base's scores; a run's name is its place."""
    config = replace(Config(), sweep=SweepConfig(**changes))
    count = sum(map(len, groups))
    points = [
        Point(
            Job(config, str(place), [], {"lora.r": str(place)}), RunFolder(folder / str(place)),
            action, base="base", base_scores=(str(folder / "base.json"),),
        )
        for place in range(count)
    ]  # fmt: skip
    return Sweep("sweep", points, [Group(list(group)) for group in groups])


def conduct(sweep: Sweep, *answers: Answer) -> tuple[list[str], list[StandIn]]:
    """Return the states of a conducted sweep, and its workers, one for each answer."""
    workers = [StandIn(answer) for answer in answers]
    with Pool(cast(Any, workers)) as pool:
        return [*Conduct(sweep, NullTracker(), pool).states()], workers


def test_a_base_is_scored_once_and_each_run_trained_and_scored(tmp_path: Path) -> None:
    """In units of their own: a group is trained together, its runs are scored one by one."""
    sweep = build_sweep(tmp_path, [[0, 1], [2]])
    states, (worker,) = conduct(sweep, finished)
    assert states == ["finished"] * 3
    assert worker.asked[0] == ("base", ["0", "1", "2"])
    assert [asked for asked in worker.asked if asked[0] == "train"] == [
        ("train", ["0", "1"]),
        ("train", ["2"]),
    ]
    assert sorted(names for kind, names in worker.asked if kind == "evaluate") == [
        ["0"],
        ["1"],
        ["2"],
    ]


def test_workers_work_side_by_side(tmp_path: Path) -> None:
    """Neither can train before the other does."""
    both = threading.Barrier(2, timeout=20)

    def meet(kind: Kind, names: list[str]) -> list[str]:
        if kind == "train":
            both.wait()
        return finished(kind, names)

    states, _ = conduct(build_sweep(tmp_path, [[0], [1]]), meet, meet)
    assert states == ["finished"] * 2


@pytest.mark.parametrize(("times", "state"), [(1, "finished"), (2, "failed")])
def test_a_killed_worker_is_retried_once(tmp_path: Path, times: int, state: str) -> None:
    """Then it is the run's failure, and no other's."""
    left = [times]

    def kill(kind: Kind, names: list[str]) -> list[str]:
        if (kind, names) == ("train", ["0"]) and left[0]:
            left[0] -= 1
            raise WorkerKilled("the worker was killed by SIGKILL (out of memory?)")
        return finished(kind, names)

    sweep = build_sweep(tmp_path, [[0], [1]])
    states, _ = conduct(sweep, kill)
    assert sorted(states) == sorted([state, "finished"])
    status = sweep.points[0].run.status()
    assert (status is not None and status.reason) == (
        "the worker was killed by SIGKILL (out of memory?)" if state == "failed" else False
    )


def test_a_group_that_dies_goes_on_one_by_one(tmp_path: Path) -> None:
    """Its runs may each have a place where they fit."""

    def die(kind: Kind, names: list[str]) -> list[str]:
        if len(names) > 1 and kind == "train":
            raise WorkerDied("it took longer than 60 s (sweep.job_timeout)")
        return finished(kind, names)

    states, (worker,) = conduct(build_sweep(tmp_path, [[0, 1]], job_timeout=30.0), die)
    assert states == ["finished"] * 2
    assert worker.asked.count(("train", ["0"])) == worker.asked.count(("train", ["1"])) == 1
    timeouts = dict(zip(map(str, worker.asked), worker.timeouts, strict=True))
    assert timeouts[str(("base", ["0", "1"]))] is None
    assert timeouts[str(("train", ["0", "1"]))] == 60
    later = timeouts[str(("train", ["0"]))]
    assert later is not None
    assert 29 < later <= 30  # of the run, what the group has taken left out


def test_a_base_that_cannot_be_scored_fails_its_runs_by_themselves(tmp_path: Path) -> None:
    """They are trained; each one's own scoring says what is wrong."""

    def refuse(kind: Kind, names: list[str]) -> list[str]:
        if kind == "base":
            raise ValueError("data.path has changed")
        return ["failed"] if kind == "evaluate" else ["trained"]

    states, _ = conduct(build_sweep(tmp_path, [[0], [1]]), refuse)
    assert states == ["failed"] * 2


def test_nothing_begins_after_a_failure_under_fail_fast(tmp_path: Path) -> None:
    """What is trained is kept, and said to be."""

    def fail(kind: Kind, names: list[str]) -> list[str]:
        for name in names if kind == "train" else ():
            (tmp_path / name).mkdir()
            RunFolder(tmp_path / name).write_status(Status("running", started=1.0))
        return ["failed"] if names == ["1"] else finished(kind, names)

    sweep = build_sweep(tmp_path, [[0], [1], [2]], fail_fast=True)
    sweep = replace(sweep, points=[replace(one, base_scores=()) for one in sweep.points])
    blocked = threading.Event()

    def slow(kind: Kind, names: list[str]) -> list[str]:
        blocked.wait(20)
        return fail(kind, names)

    def quick(kind: Kind, names: list[str]) -> list[str]:
        outcome = fail(kind, names)
        if names == ["1"]:
            blocked.set()
        return outcome

    workers = [StandIn(slow), StandIn(quick)]
    with Pool(cast(Any, workers)) as pool:
        states = [*Conduct(sweep, NullTracker(), pool).states()]
    assert states == ["failed"]
    assert [asked for worker in workers for asked in worker.asked if asked[1] == ["2"]] == []
    status = sweep.points[0].run.status()
    assert status is not None
    assert status.state == "interrupted"
    assert "sweep.fail_fast" in str(status.reason)


def test_what_another_process_works_on_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Meanwhile the other runs of a group are trained."""
    monkeypatch.setattr("finetune.sweeps.pool.POLL_SECONDS", 0.05)
    caplog.set_level("INFO", "finetune")
    sweep = build_sweep(tmp_path, [[0, 1]])
    with sweep.points[0].run.claimed():
        worker = StandIn(finished)
        with Pool(cast(Any, [worker])) as pool:
            states = Conduct(sweep, NullTracker(), pool).states()
            assert next(states) == "finished"
            assert worker.asked[1:] == [("train", ["1"]), ("evaluate", ["1"])]
            assert "this machine, process" in caplog.text
            assert "is running it; waiting for its end" in caplog.text
            threading.Timer(0.3, lambda: None).start()
            monkeypatch.setattr("finetune.tracking.claims.Watch.is_free", lambda _: True)
            assert [*states] == ["finished"]
    assert caplog.text.count("waiting for its end") == 1


def test_a_run_that_is_taken_over_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim was lost in mid-training; of its group the other run has failed, and once only."""
    monkeypatch.setattr("finetune.sweeps.pool.POLL_SECONDS", 0.05)
    took: list[list[str]] = []

    def lose(kind: Kind, names: list[str]) -> list[str]:
        took.extend([names] if kind == "train" else [])
        return ["held", "failed"] if names == ["0", "1"] and kind == "train" else ["finished"]

    sweep = build_sweep(tmp_path, [[0, 1]])
    sweep = replace(sweep, points=[replace(one, base_scores=()) for one in sweep.points])
    states, _ = conduct(sweep, lose)
    assert sorted(states) == ["failed", "finished"]
    assert took == [["0", "1"], ["0"]]


def test_what_failed_in_another_process_is_not_tried_here(tmp_path: Path) -> None:
    """It has had its turn in this sweep."""
    sweep = build_sweep(tmp_path, [[0], [1]])

    def fail_elsewhere(kind: Kind, names: list[str]) -> list[str]:
        if names == ["0"] and kind == "train":
            sweep.points[1].run.write_status(Status("failed", "there", 1.0, 2.0))
        return finished(kind, names)

    states, (worker,) = conduct(sweep, fail_elsewhere)
    assert sorted(states) == ["failed", "finished"]
    assert ("train", ["1"]) not in worker.asked


def test_a_deadline_lets_units_at_work_save(tmp_path: Path) -> None:
    """They are told why; what they have not ended is recorded as cut off."""
    told = threading.Event()

    def work(kind: Kind, names: list[str]) -> list[str]:
        if kind == "base":
            return []
        sweep.points[int(names[0])].run.write_status(Status("running", started=1.0))
        told.wait(20)
        return ["interrupted"]

    class Told(StandIn):
        def interrupt(self, stop: KeyboardInterrupt) -> None:
            super().interrupt(stop)
            told.set()

    sweep = build_sweep(tmp_path, [[0]])
    worker = Told(work)
    with Pool(cast(Any, [worker])) as pool:
        at_work = Conduct(sweep, NullTracker(), pool)
        with pytest.raises(OutOfTime) as stop:
            list(at_work.states(Deadline("1s", 0.5)))
        at_work.interrupt(stop.value)
        assert worker.stops == [stop.value]
        assert pool.is_idle
    status = sweep.points[0].run.status()
    assert status is not None
    assert (status.state, str(status.reason).partition(";")[0]) == (
        "interrupted",
        "stopped after workers.stop_after=1s",
    )


def test_an_error_of_our_own_is_raised(tmp_path: Path) -> None:
    """It is no run's failure."""

    def fault(kind: Kind, names: list[str]) -> list[str]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        conduct(build_sweep(tmp_path, [[0]]), fault)


def test_a_stop_reaches_no_idle_worker(tmp_path: Path) -> None:
    """There is nothing to save."""
    worker = StandIn(finished)
    with Pool(cast(Any, [worker])) as pool:
        Conduct(build_sweep(tmp_path, [[0]]), NullTracker(), pool).interrupt(Stopped(2))
    assert worker.stops == []
