"""Units of work: which an idle worker takes next, and that every run is scored once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulated_cluster import Cluster, Load, simulate
from finetune.sweeps.schedule import Places, Schedule, Unit, Work


def anything(unit: Unit) -> Places:
    """Say that no other process holds a unit's runs."""
    return unit.places


def take_all(schedule: Schedule, model: str | None = None) -> list[tuple[str, tuple[int, ...]]]:
    """Return the units that workers can take now, in order."""
    taken: list[tuple[str, tuple[int, ...]]] = []
    while (unit := schedule.take(model, anything)) is not None:
        taken.append((unit.kind, unit.places))
    return taken


def take(schedule: Schedule, model: str | None = None) -> Unit:
    """Return the next unit, which there is."""
    unit = schedule.take(model, anything)
    assert unit is not None
    return unit


def test_runs_train_without_waiting_for_the_base() -> None:
    """The base is scored first; the scores of trained runs wait for it."""
    schedule = Schedule(
        Work(groups=[(0, 1), (2,)], trained=(3,), bases=dict.fromkeys(range(4), "b"))
    )
    assert take_all(schedule) == [("base", (0, 1, 2, 3)), ("train", (0, 1)), ("train", (2,))]
    assert schedule.waiting == [Unit("evaluate", (3,))]
    schedule.end(Unit("train", (0, 1)), trained=[0, 1])
    assert take_all(schedule) == []
    schedule.end(Unit("base", (0, 1, 2, 3)))
    assert take_all(schedule) == [("evaluate", (0,)), ("evaluate", (1,)), ("evaluate", (3,))]
    assert not schedule.is_over
    for run in (0, 1, 3):
        schedule.end(Unit("evaluate", (run,)))
    schedule.end(Unit("train", (2,)))  # it has failed
    assert schedule.is_over


def test_each_base_is_waited_for_by_its_runs_only() -> None:
    """Scores of another base, and none, are no reason to wait."""
    schedule = Schedule(Work(groups=[], trained=(0, 1, 2), bases={0: "a", 1: "b"}))
    assert take_all(schedule) == [("base", (0,)), ("base", (1,)), ("evaluate", (2,))]
    schedule.end(Unit("base", (1,)))
    assert take_all(schedule) == [("evaluate", (1,))]


def test_a_worker_keeps_to_the_model_that_it_has_loaded() -> None:
    """Results come first all the same; a worker without any takes the first run."""
    work = Work(groups=[(0,), (1,), (2,)], trained=(3,), models={0: "a", 1: "b", 2: "b", 3: "a"})
    assert take(Schedule(work)) == Unit("evaluate", (3,))
    assert take_all(Schedule(work), "b") == [
        ("evaluate", (3,)), ("train", (1,)), ("train", (2,)), ("train", (0,))
    ]  # fmt: skip
    schedule = Schedule(work)
    assert schedule.model_of(take(schedule)) == "a"


def test_the_longest_run_is_trained_first() -> None:
    """No long one begins when the other workers are almost done; equal ones keep their order."""
    work = Work(groups=[(0,), (1, 2), (3,), (4,)], lengths={0: 1, 1: 1, 2: 9, 3: 5, 4: 1})
    trained = [places for _, places in take_all(Schedule(work))]
    assert trained == [(1, 2), (3,), (0,), (4,)]


def test_what_another_process_holds_is_passed_over() -> None:
    """It is taken once it is free."""
    schedule = Schedule(Work(groups=[(0,), (1,)]))
    held = schedule.take(None, partial(find_free, 0))
    assert held == Unit("train", (1,))
    assert schedule.take(None, partial(find_free, 0)) is None
    assert take(schedule) == Unit("train", (0,))


def test_a_unit_that_is_given_back_waits_again() -> None:
    """As it was, in parts, or counted as a retry."""
    schedule = Schedule(Work(groups=[(0, 1)]))
    schedule.give_back(take(schedule))
    assert schedule.waiting == [Unit("train", (0, 1))]
    schedule.retry(take(schedule))
    assert schedule.waiting == [Unit("train", (0, 1), retries=1)]
    schedule.give_back(take(schedule), [(0,), (1,)])
    assert schedule.waiting == [Unit("train", (0,), retries=1), Unit("train", (1,), retries=1)]
    assert not schedule.is_over


def test_runs_of_a_unit_may_have_several_ends() -> None:
    """One is trained, one has failed, one was taken over and waits for the other process."""
    schedule = Schedule(Work(groups=[(0, 1, 2)]))
    schedule.end(take(schedule), trained=[0], held=[2])
    assert schedule.waiting == [Unit("evaluate", (0,)), Unit("train", (2,))]


def test_nothing_begins_once_it_is_closed() -> None:
    """Under `sweep.fail_fast`; what is at work ends, and nothing is waited for without end."""
    schedule = Schedule(Work(groups=[(0,), (1,), (2,)], bases={0: "b", 1: "b"}))
    base, first, second = take(schedule), take(schedule), take(schedule)
    schedule.close()
    assert not schedule.is_over
    schedule.end(base)
    schedule.end(first, trained=[0])
    schedule.give_back(second)
    assert schedule.waiting == []
    assert schedule.is_over


def test_a_group_is_cut_where_another_process_works_on_a_part() -> None:
    """The rest is trained now; the part waits."""
    schedule = Schedule(Work(groups=[(0, 1, 2, 3)]))
    unit = schedule.take(None, lambda unit: [place for place in unit.places if place % 2])
    assert unit == Unit("train", (1, 3))
    assert schedule.waiting == [Unit("train", (0, 2))]
    schedule.give_back(unit)
    assert take_all(schedule) == [("train", (0, 2)), ("train", (1, 3))]


@dataclass
class Course:
    """A sweep in which workers end units in any order, or are disturbed."""

    work: Work
    at_work: list[Unit] = field(default_factory=list)
    trained: set[int] = field(default_factory=set)
    bases_over: set[str] = field(default_factory=set)
    scored: Counter[int] = field(default_factory=Counter)
    failed: set[int] = field(default_factory=set)

    def check(self, unit: Unit) -> None:
        """Assert that a unit may begin."""
        busy = [run for other in self.at_work if other.kind != "base" for run in other.places]
        if unit.kind == "base":
            base = self.work.bases[unit.places[0]]
            assert base not in self.bases_over
            assert all(self.work.bases[run] == base for run in unit.places)
            return
        assert not set(unit.places) & set(busy)
        assert not set(unit.places) & (self.failed | set(self.scored))
        if unit.kind == "train":
            assert not set(unit.places) & self.trained
        else:
            (run,) = unit.places
            assert run in self.trained
            assert self.work.bases.get(run) in self.bases_over | {None}

    def end(self, schedule: Schedule, unit: Unit, outcome: str) -> None:
        """Let a unit end, or be disturbed."""
        self.at_work.remove(unit)
        if outcome == "held":
            schedule.give_back(unit)
        elif outcome == "lost" and len(unit.places) > 1 and unit.kind == "train":
            schedule.give_back(unit, [(run,) for run in unit.places])
        elif outcome == "lost":
            schedule.retry(unit)
        elif unit.kind == "base":  # scored, or given up
            self.bases_over.add(self.work.bases[unit.places[0]])
            schedule.end(unit)
        elif outcome == "failed":
            self.failed.update(unit.places)
            schedule.end(unit)
        elif unit.kind == "train":
            self.trained.update(unit.places)
            schedule.end(unit, unit.places)
        else:
            self.scored.update(unit.places)
            schedule.end(unit)


@st.composite
def works(draw: st.DrawFn) -> Work:
    """Draw groups of runs, runs that are trained, bases that are missing, and models."""
    runs = list(range(draw(st.integers(1, 10))))
    number = draw(st.lists(st.integers(0, 4), min_size=len(runs), max_size=len(runs)))
    groups = [tuple(run for run in runs if number[run] == one) for one in range(4)]
    base = st.sampled_from(["a", "b", None])
    drawn = {run: draw(base) for run in runs}
    return Work(
        groups=[group for group in groups if group],
        trained=[run for run in runs if number[run] == 4],
        bases={run: name for run, name in drawn.items() if name is not None},
        models={run: draw(st.sampled_from(["m", "n"])) for run in runs},
    )


@given(work=works(), workers=st.integers(1, 4), disturbances=st.integers(0, 12), data=st.data())
def test_every_run_is_scored_once(
    work: Work, workers: int, disturbances: int, data: st.DataObject
) -> None:
    """Whatever the order of endings, losses, and claims of other processes; or it has failed."""
    schedule = Schedule(work)
    course = Course(work, trained=set(work.trained))
    loaded: str | None = None
    while not schedule.is_over:
        is_held = disturbances > 0 and data.draw(st.booleans())
        refused = data.draw(st.integers(0, 9)) if is_held else None
        disturbances -= is_held
        while len(course.at_work) < workers:
            unit = schedule.take(loaded, partial(find_free, refused))
            if unit is None:
                break
            course.check(unit)
            course.at_work.append(unit)
            loaded = schedule.model_of(unit)
        assert course.at_work or is_held, "nothing can begin and nothing is at work"
        if course.at_work:
            outcomes = ["done", "held", "lost", "failed"] if disturbances > 0 else ["done"]
            outcome = data.draw(st.sampled_from(outcomes))
            disturbances -= outcome != "done"
            course.end(schedule, data.draw(st.sampled_from(course.at_work)), outcome)
    runs = {run for group in work.groups for run in group} | set(work.trained)
    assert set(course.scored) | course.failed == runs
    assert not set(course.scored) & course.failed
    assert set(course.scored.values()) <= {1}


def find_free(refused: int | None, unit: Unit) -> Places:
    """Return a unit's places but the one that another process holds; of a base, all or none."""
    free = [place for place in unit.places if place != refused]
    return () if unit.kind == "base" and refused in unit.places else free


def nothing_lost(scored: Counter[int], runs: Collection[int]) -> bool:
    return scored == Counter(runs)


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("steps", [[600] * 500, [240 * (1 + run % 4) for run in range(500)]])
def test_a_cluster_that_loses_nodes_loses_no_run(workers: int, steps: list[int]) -> None:
    """64 workers, 500 runs, 5 % of the nodes lost an hour: within 10 % of the bound."""
    outcome = simulate(Cluster(nodes=64 // workers, workers=workers), Load(steps))
    assert nothing_lost(outcome.scored, range(500))
    assert outcome.lost_nodes > 0
    assert outcome.makespan <= 1.1 * outcome.bound
