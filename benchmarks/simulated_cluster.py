"""Simulate a sweep on a cluster that loses nodes: the real schedule, recorded step times, no clock.

Each node runs the command that joins the sweep, as under Slurm: it has a schedule of the runs that
are not finished, and workers of its own. Nodes share what the runs' folders hold: claims,
checkpoints, scores. A lost node leaves its claims until their leases lapse.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, cycle, islice

from finetune.sweeps.schedule import Places, Schedule, Unit, Work

# Seconds of the steps of a 135M model on two cores beside other work, 8 demo rows a step.
STEP_SECONDS = (
    3.9, 4.89, 5.44, 5.02, 4.84, 5.0, 4.5, 3.14, 2.91, 3.23, 4.34, 3.99, 5.77, 5.32, 4.45,
    3.85, 3.44, 4.71, 4.57, 4.97, 4.89, 5.33, 7.08, 4.92, 5.74, 4.38, 5.26, 2.05, 4.34, 6.36,
    4.97, 4.66, 3.67, 4.91, 5.41, 6.51, 5.02, 5.44, 5.67, 5.47, 5.62, 5.0, 5.24, 4.03, 3.47,
    4.27, 3.25, 4.42, 4.82, 5.45, 4.65, 4.89, 5.12, 5.12, 4.06, 4.76, 4.63, 3.82, 3.82, 4.27,
    4.44, 3.9, 3.16, 3.15, 3.24, 4.42, 4.13, 4.12, 4.35, 5.2, 4.58, 6.43, 3.65, 2.85, 3.21,
    3.81, 2.79, 3.33, 3.17, 4.66, 4.59, 4.81, 5.22, 4.78, 4.93, 4.5, 4.7, 6.2, 4.88, 5.73,
    4.03, 3.25, 2.62, 4.55, 4.45, 3.97, 3.67, 3.57, 2.13, 2.47, 2.07, 2.27, 2.48, 2.01, 2.3,
    2.31, 2.72, 7.17, 8.69, 8.38, 9.42, 11.43, 11.4, 9.41, 7.95, 9.98, 10.29, 6.86, 7.63,
)  # fmt: skip
BASE = "base"  # of all runs


@dataclass(frozen=True)
class Cluster:
    """Nodes and what becomes of them; times in seconds."""

    nodes: int = 64
    workers: int = 1  # of each node
    lost_an_hour: float = 0.05  # share of the nodes
    replaced_after: float = 300.0  # until another node stands in for a lost one
    start: float = 60.0  # of a node: until its workers take runs
    lease: float = 60.0  # until a lost worker's run may be taken
    handover: float = 2.0  # of every unit: it is polled for, claimed and begun
    seed: int = 0


@dataclass(frozen=True)
class Load:
    """What there is to do: runs by their steps."""

    steps: Sequence[int]
    checkpoint_every: int = 50  # steps
    scoring: float = 120.0  # seconds, of the base and of each run

    def step_ends(self, run: int) -> list[float]:
        """Return when each step of a run ends, in seconds of training; every run has its own."""
        recorded = islice(cycle(STEP_SECONDS), run, run + self.steps[run])
        return list(accumulate(recorded, initial=0.0))


@dataclass
class Node:
    """A machine that has joined."""

    schedule: Schedule
    at_work: list[tuple[Unit, float]] = field(default_factory=list)  # with its beginning
    is_lost: bool = False


@dataclass(frozen=True)
class Outcome:
    """A simulated sweep; times in seconds."""

    makespan: float
    bound: float  # no schedule without losses is shorter: the work over all workers, the longest
    lost_nodes: int
    repeated_steps: int  # lost with a node since a checkpoint
    scored: Counter[int]  # how often each run was


class Simulation:
    """The shared state of a sweep, and the events of its nodes in the order of time."""

    def __init__(self, cluster: Cluster, load: Load) -> None:
        self._cluster, self._load = cluster, load
        self._ends = [load.step_ends(run) for run in range(len(load.steps))]
        self._progress = [0] * len(load.steps)  # steps of the last checkpoint
        self._claims: set[int] = set()
        self._base = "missing"
        self._scored: Counter[int] = Counter()
        self._nodes: list[Node] = []
        self._lost_nodes = self._repeated = 0
        self._random = random.Random(cluster.seed)
        self._now = 0.0
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def run(self) -> Outcome:
        """Simulate until every run is scored, or nothing can happen any more."""
        for _ in range(self._cluster.nodes):
            self._after(self._cluster.start, self._join)
        while self._events and len(self._scored) < len(self._ends):
            self._now, _, event = heapq.heappop(self._events)
            event()
            for node in self._nodes:
                self._hand_out(node)
        busy = [ends[-1] + self._load.scoring for ends in self._ends]
        workers = self._cluster.nodes * self._cluster.workers
        bound = max((sum(busy) + self._load.scoring) / workers, *busy)
        return Outcome(self._now, bound, self._lost_nodes, self._repeated, self._scored)

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._order), event))

    def _join(self) -> None:
        """Add a node with a schedule of what its command finds unfinished."""
        left = [run for run in range(len(self._ends)) if run not in self._scored]
        trained = [run for run in left if self._progress[run] == self._load.steps[run]]
        bases = dict.fromkeys(left, BASE) if self._base != "scored" else {}
        work = Work(
            groups=[(run,) for run in left if run not in trained],
            trained=trained,
            bases=bases,
            models=dict.fromkeys(left, BASE),
            lengths={run: self._load.steps[run] - self._progress[run] for run in left},
        )
        node = Node(Schedule(work))
        self._nodes.append(node)
        if self._cluster.lost_an_hour:
            life = self._random.expovariate(self._cluster.lost_an_hour / 3600)
            self._after(life, lambda: self._lose(node))

    def _find_free(self, unit: Unit) -> Places:
        if unit.kind == "base":
            return () if self._base == "claimed" else unit.places
        return [run for run in unit.places if run not in self._claims and run not in self._scored]

    def _hand_out(self, node: Node) -> None:
        while len(node.at_work) < self._cluster.workers and not node.is_lost:
            unit = node.schedule.take(BASE, self._find_free)
            if unit is None:
                return
            node.at_work.append((unit, self._now))
            seconds = self._begin(unit)
            self._after(seconds, lambda unit=unit: self._end(node, unit))  # type: ignore[misc]

    def _begin(self, unit: Unit) -> float:
        """Claim what a unit is about; return the seconds that it takes."""
        if unit.kind == "base":
            is_scored, self._base = self._base == "scored", "claimed"
            return self._cluster.handover + (0.0 if is_scored else self._load.scoring)
        (run,) = unit.places
        self._claims.add(run)
        left = self._ends[run][-1] - self._ends[run][self._progress[run]]
        return self._cluster.handover + (left if unit.kind == "train" else self._load.scoring)

    def _end(self, node: Node, unit: Unit) -> None:
        if node.is_lost:
            return
        node.at_work = [one for one in node.at_work if one[0] != unit]
        trained: list[int] = []
        if unit.kind == "base":
            self._base = "scored"
        else:
            (run,) = unit.places
            self._claims.discard(run)
            if unit.kind == "train":
                self._progress[run] = self._load.steps[run]
                trained = [run]
            else:
                self._scored[run] += 1
        node.schedule.end(unit, trained)

    def _lose(self, node: Node) -> None:
        """Lose a node with the steps since its runs' checkpoints; another takes its place."""
        node.is_lost = True
        self._lost_nodes += 1
        self._nodes.remove(node)
        for unit, began in node.at_work:
            if unit.kind == "train":
                self._keep_checkpoint(unit.places[0], self._now - began)
            self._after(self._cluster.lease, lambda unit=unit: self._lapse(unit))  # type: ignore[misc]
        self._after(self._cluster.replaced_after + self._cluster.start, self._join)

    def _keep_checkpoint(self, run: int, seconds: float) -> None:
        ends, before = self._ends[run], self._progress[run]
        trained = seconds - self._cluster.handover + ends[before]
        steps = max(before, bisect_right(ends, trained) - 1)
        self._progress[run] = max(before, steps - steps % self._load.checkpoint_every)
        self._repeated += steps - self._progress[run]

    def _lapse(self, unit: Unit) -> None:
        if unit.kind == "base":
            self._base = "missing"
        else:
            self._claims.difference_update(unit.places)


def simulate(cluster: Cluster, load: Load) -> Outcome:
    """Return the course of a sweep on a cluster."""
    return Simulation(cluster, load).run()
