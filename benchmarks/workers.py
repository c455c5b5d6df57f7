"""Measure workers: training on two cores, the work lost between runs, many short jobs, a cluster.

    python benchmarks/workers.py [--quick] [--only TEXT]

Trains four ranks on 64 rows of the demo (135M, no evaluation) by one worker of one thread, by one
of two threads and by two of one thread; measures what two workers lose from the end of one training
to the begin of the next; runs 200 jobs of one step over four workers, and the same command again;
simulates 500 runs on 64 workers, where 5 % of the nodes are lost an hour. Prints one JSON object a
line; one with a target says in `reached` whether it is met. Training wants two cores and nothing
beside it. TEXT runs only the parts whose name contains it. --quick trains the tiny model, and runs
12 jobs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.simulated_cluster import Cluster, Load, simulate
from finetune.tracking.run_folder import RunFolder

Line = dict[str, Any]

# Name -> processes and threads of each.
WAYS = {
    "one worker of one thread": (1, 1),
    "one worker of two threads": (1, 2),
    "two workers of one thread": (2, 1),
}
PLAIN = ("tracking=none", "evaluation=none")
SECONDS_A_JOB = 0.1
LARGEST_LOSS = 0.02  # of the work, beyond the start
LONGER_THAN_BOUND = 1.1


@dataclass(frozen=True)
class Run:
    """A finished run; times in seconds."""

    worker: str  # that trained it
    started: float  # once it was claimed
    trained: float  # once its weights were saved
    ended: float
    training: float


def run_command(overrides: list[str], folder: Path, cache: Path) -> float:
    """Run a sweep; return its seconds, or exit with its error where it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "FINETUNE_CACHE": str(cache)}
    command = [sys.executable, "-m", "finetune", *PLAIN, *overrides, "--multirun"]
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - started


def read_runs(folder: Path) -> list[Run]:
    """Return the finished runs of a folder, in the order of their beginnings."""
    found = []
    for path in (folder / "outputs").iterdir():
        run = RunFolder(path)
        status, environment = run.status(), run.read_json("environment.json") or {}
        assert status is not None
        assert status.started is not None
        assert status.ended is not None
        result = run.read_json("training.json") or {}
        found.append(
            Run(
                str(environment.get("worker")),
                status.started,
                (path / "training.json").stat().st_mtime,
                status.ended,
                result["train_seconds"],
            )
        )
    return sorted(found, key=lambda run: run.started)


def busy_seconds(runs: list[Run]) -> float:
    """Return the training seconds of the worker that trains longest."""
    seconds: dict[str, float] = defaultdict(float)
    for run in runs:
        seconds[run.worker] += run.training
    return max(seconds.values())


def measure_training(folder: Path, *, quick: bool) -> Iterator[Line]:
    """Train the same runs in three ways, separately and without evaluation."""
    grid = (
        ["model=tiny", "data.num_examples=24", "lora.r=2,4"]
        if quick
        else ["data.num_examples=64", "lora.r=4,8,16,32"]
    )
    grid.append("sweep.max_concurrent_adapters=1")
    cache = folder / "cache"
    busy: dict[str, float] = {}
    for name, (num, threads) in WAYS.items():
        here = folder / name.replace(" ", "-")
        here.mkdir()
        workers = [f"workers.num={num}", f"workers.threads={threads}"]
        if not busy:  # tokens and what else is made once
            run_command([*grid, "sweep.dry_run=true", *workers], here, cache)
        seconds = run_command([*grid, *workers], here, cache)
        runs = read_runs(here)
        busy[name] = busy_seconds(runs)
        yield {
            "what": f"{len(runs)} runs by {name}",
            "seconds": round(seconds, 1),
            "training": round(busy[name], 1),
        }
    one, two_threads, two_workers = busy.values()
    for name, other, target in (
        ("one worker of one thread", one, 1.9),
        ("one worker of two threads", two_threads, 1.2),
    ):
        ratio = other / two_workers
        yield {
            "what": f"training, two workers of one thread against {name}",
            "ratio": round(ratio, 2),
            "target": target,
            "reached": ratio >= target,
        }


def measure_loss(folder: Path, *, quick: bool) -> Iterator[Line]:
    """Train four runs on two workers: the time of each worker in which it trains none.

    Without evaluation all that lies between two trainings is lost: a run's end is recorded, the
    next is handed out and claimed, its settings are written. The start is counted separately.
    """
    grid = (
        ["model=tiny", "data.num_examples=64", "training.epochs=8", "lora.r=2,4,8,16"]
        if quick
        else ["data.num_examples=64", "lora.r=4,8,16,32"]
    )
    grid += ["sweep.max_concurrent_adapters=1", "workers.num=2", "workers.threads=1"]
    run_command([*grid, "sweep.dry_run=true"], folder, folder / "cache")
    begun = time.time()
    run_command(grid, folder, folder / "cache")
    by_worker: dict[str, list[Run]] = defaultdict(list)
    for run in read_runs(folder):
        by_worker[run.worker].append(run)
    starts = [runs[0].started - begun for runs in by_worker.values()]
    work = sum(run.trained - run.started for runs in by_worker.values() for run in runs)
    lost = sum(find_loss(runs) for runs in by_worker.values())
    yield {
        "what": f"lost by {len(by_worker)} workers between trainings, of the work",
        "start": round(max(starts), 1),
        "work": round(work, 1),
        "lost": round(lost, 2),
        "share": round(lost / work, 4),
        "target": LARGEST_LOSS,
        "reached": lost / work <= LARGEST_LOSS,
    }


def find_loss(runs: Sequence[Run]) -> float:
    """Return a worker's seconds between its trainings, and to the end of its last run."""
    between = sum(after.started - before.trained for before, after in pairwise(runs))
    return between + runs[-1].ended - runs[-1].trained


def measure_jobs(folder: Path, *, quick: bool) -> Iterator[Line]:
    """Run jobs of one step over four workers, and the same command again."""
    jobs = 12 if quick else 200
    rates = ",".join(f"{number}e-5" for number in range(1, jobs + 1))
    small = ["model=tiny", "data.num_examples=8", "training.max_steps=1", "workers.num=4"]
    command = [*small, "workers.threads=1", f"optimizer.lr={rates}"]
    first = run_command(command, folder, folder / "cache")
    again = run_command(command, folder, folder / "cache")
    yield {"what": f"{jobs} jobs of one step, four workers", "seconds": round(first, 1)}
    yield {
        "what": f"the same command again: {jobs} jobs that are finished at once",
        "seconds": round(again, 1),
        "seconds_a_job": round(again / jobs, 3),
        "target": SECONDS_A_JOB,
        "reached": again / jobs <= SECONDS_A_JOB,
    }


def measure_cluster(folder: Path, *, quick: bool) -> Iterator[Line]:
    """Simulate 500 runs on 64 workers: on a node each, and eight on a node."""
    loads = {
        "of 600 steps": [600] * 500,
        "of 240 to 960 steps": [240 * (1 + run % 4) for run in range(500)],
    }
    for workers in (1, 8):
        for name, steps in loads.items():
            outcome = simulate(Cluster(nodes=64 // workers, workers=workers), Load(steps))
            ratio = outcome.makespan / outcome.bound
            is_complete = outcome.scored == Counter(range(500))
            yield {
                "what": f"500 runs {name} on {64 // workers} nodes of {workers} workers, simulated",
                "hours": round(outcome.makespan / 3600, 2),
                "bound": round(outcome.bound / 3600, 2),
                "ratio": round(ratio, 3),
                "lost_nodes": outcome.lost_nodes,
                "repeated_steps": outcome.repeated_steps,
                "complete": is_complete,
                "target": LONGER_THAN_BOUND,
                "reached": is_complete and ratio <= LONGER_THAN_BOUND,
            }


PARTS: dict[str, Callable[..., Iterator[Line]]] = {
    "cluster": measure_cluster,
    "jobs": measure_jobs,
    "loss": measure_loss,
    "training": measure_training,
}


def main() -> None:
    """Measure each part and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model, and fewer jobs")
    parser.add_argument("--only", default="", help=f"parts by name: {', '.join(PARTS)}")
    given = parser.parse_args()
    for name, measure in PARTS.items():
        if given.only in name:
            with tempfile.TemporaryDirectory() as folder:
                for line in measure(Path(folder), quick=given.quick):
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
