"""A sweep: check the whole grid, run each point in a worker, report; a single run is one too.

This process imports no torch. The worker is told what to do and leaves its results in the runs'
folders; if it dies, a fresh one goes on with the rest.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from jinja2 import TemplateError as JinjaError
from omegaconf import DictConfig, OmegaConf

from finetune import distributed
from finetune.checkpoints import newest_step
from finetune.config import Config, Refused, build_config
from finetune.grouping import Group, find_groups
from finetune.live import is_terminal, live_table
from finetune.overrides import first_line
from finetune.ranges import find_problems
from finetune.report import verdict, write_report
from finetune.results import (
    Results,
    RunRecord,
    SweepRecord,
    print_table,
    read_results,
    render_plan,
    render_table,
    write_csv,
)
from finetune.run_folder import EventLog, Job, RunFolder, State, Status, digest, slug
from finetune.tracking import Tracker, build_tracker
from finetune.worker import AnyWorker, WorkerDied, build_worker, quieten_libraries

log = logging.getLogger("finetune")

Launch = Callable[[Sequence[Sequence[str]]], object]  # another launcher, given jobs' overrides

FINISHED = "finished already"
INTERRUPT_SECONDS = 120.0  # that a worker has to end its step and write a checkpoint


@dataclass(frozen=True)
class Point:
    """One job of the grid, its run, and what is to be done about it."""

    job: Job
    run: RunFolder
    prospect: str  # in words, for the plan
    left: State | None = None  # the state in which the run is left alone; None runs it
    trains: bool = False  # whether it has steps to take

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.job.swept.items()) or self.run.name


@dataclass(frozen=True)
class Sweep:
    """A named set of runs, each with its place in the grid."""

    name: str
    points: list[Point]
    groups: list[Group]  # of points that run together, by their places

    @property
    def config(self) -> Config:
        """The settings that all jobs share: where to report, track and stop."""
        return self.points[0].job.config

    @property
    def folder(self) -> Path:
        return Path(self.config.report_dir) / self.name

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(t for p in self.points for t in p.job.config.evaluation.tasks))

    @property
    def swept(self) -> list[str]:
        return list(self.points[0].job.swept)

    def record(self, arguments: Sequence[str]) -> SweepRecord:
        """Return what the report needs; paths hold wherever both folders are moved together."""
        here = self.folder.resolve()
        runs = [
            RunRecord(os.path.relpath(p.run.path.resolve(), here), p.job.swept) for p in self.points
        ]
        return SweepRecord(self.name, list(arguments), self.swept, self.tasks, runs)


def build_job(composed: DictConfig, swept: Sequence[str]) -> Job:
    """Freeze what Hydra composed, while its own HydraConfig is the one in force."""
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    hydra: Any = HydraConfig.instance().cfg
    assert hydra is not None, "a job is composed under its own HydraConfig"
    # Unresolved: reading them one by one would put the value of ${oc.env:...} into files.
    told = OmegaConf.to_container(hydra.hydra.overrides.task, resolve=False)
    overrides = [str(override) for override in cast(list[Any], told)]
    values = dict(override.lstrip("+").split("=", 1) for override in overrides)
    return Job(
        config=build_config(ours),
        yaml=OmegaConf.to_yaml(ours),
        overrides=overrides,
        swept={key: values[key] for key in swept},
    )


def sweep_name(jobs: Sequence[Job], arguments: Sequence[str]) -> str:
    """Name a sweep by what it is about and a digest of its overrides, so that it can be continued.

    What only tracks or conducts the sweep is left out of the digest.
    """
    if jobs[0].config.sweep.name:
        return slug(jobs[0].config.sweep.name)
    choices = HydraConfig.get().runtime.choices
    about = choices.get("experiment") or f"{choices['model']}-{choices['data']}"
    neutral = ("tracking", "sweep.", "hydra")
    told = sorted(a for a in arguments if not a.lstrip("+").startswith(neutral))
    return slug(f"{about}-{digest(told)[:8]}")


def run_sweep(jobs: Sequence[Job], arguments: Sequence[str], launch: Launch | None = None) -> int:
    """Run every job and report; return the exit code.

    Args:
        jobs: the points of the grid, at least one.
        arguments: the overrides as typed, which name the sweep.
        launch: runs jobs by their overrides, in processes of its own; None is our worker.

    Raises:
        Refused: something in the grid cannot run; nothing was started.
    """
    _refuse([problem for job in jobs for problem in find_problems(job.config)])
    _refuse(distributed.find_problems(jobs[0].config, has_launcher=launch is not None))
    _refuse(_folder_problems(jobs[0].config))
    with build_worker(is_quiet=is_terminal()) as worker, _termination_interrupts():
        sweep = _plan(jobs, sweep_name(jobs, arguments), worker)
        if len(sweep.points) > 1 or sweep.config.sweep.dry_run:
            print_table(render_plan([(p.job.swept, p.run.name, p.prospect) for p in sweep.points]))
            for line in _render_groups(sweep):
                print(line)
        if sweep.config.sweep.dry_run:
            return 0
        with _conducted_alone(sweep.folder):
            return _conduct(sweep, arguments, worker, launch)


def _render_groups(sweep: Sweep) -> Iterator[str]:
    """Say which runs are trained together, and why others are not, if any are."""
    if any(len(group.places) > 1 for group in sweep.groups):
        for group in sweep.groups:
            names = "; ".join(str(sweep.points[place]) for place in group.places)
            if len(group.places) > 1:
                yield f"in one step: {names}"
            elif group.reason is not None:
                yield f"alone: {names}, since {group.reason}"


def _conduct(
    sweep: Sweep, arguments: Sequence[str], worker: AnyWorker, launch: Launch | None
) -> int:
    """Run what is to be run, write the results after each, and report; return the exit code."""
    log.info("sweep %s: %d runs", sweep.name, len(sweep.points))
    sweep.record(arguments).write(sweep.folder)
    tracker = build_tracker(
        sweep.config.tracking, sweep.folder, sweep_name=sweep.name, swept=sweep.swept
    )
    states: list[State] = []
    try:
        with live_table([(str(point), point.run) for point in sweep.points]):
            if launch is not None:
                worker.stop()  # its memory is the launched jobs' now
                sweep = replace(sweep, points=_launch_elsewhere(sweep.points, tracker, launch))
            for state in _run_all(sweep, tracker, worker):
                states.append(state)
                _write_report(sweep)
                if sweep.config.sweep.fail_fast and state != "finished":
                    break
                if distributed.has_parted():
                    break
    except KeyboardInterrupt:
        log.info("interrupted: waiting for a checkpoint; once more ends at once")
        with suppress(KeyboardInterrupt):
            worker.interrupt(INTERRUPT_SECONDS)
        states.append("interrupted")
    return _report(sweep, tracker, states)


def _run_all(sweep: Sweep, tracker: Tracker, worker: AnyWorker) -> Iterator[State]:
    """Run what is to be run, one after another, and say how each came out."""
    took: list[float] = []
    begun = 0
    for number, group in enumerate(sweep.groups):
        points = [sweep.points[place] for place in group.places]
        waiting = [sweep.points[place] for rest in sweep.groups[number:] for place in rest.places]
        left = _time_left(took, waiting)
        for point in points:
            begun += 1
            log.info("[%d/%d] %s%s", begun, len(sweep.points), point, left)
            tracker.follow(point.run)
        started = time.monotonic()
        states = [point.left for point in points if point.left] or _run_group(points, worker)
        if states == ["finished"] * len(points) and points[0].prospect != FINISHED:
            took += [(time.monotonic() - started) / len(points)] * len(points)
        yield from states


def _launch_elsewhere(points: Sequence[Point], tracker: Tracker, launch: Launch) -> list[Point]:
    """Let another launcher run what is to be run; return the points as it left them."""
    waiting = [p for p in points if p.left is None and p.prospect != FINISHED]
    before = [point.run.status() for point in waiting]
    for point in waiting:
        tracker.follow(point.run)
    started, lost = time.time(), "the launcher ended without it"
    try:
        launch([point.job.overrides for point in waiting])
    except Exception as error:  # whatever a launcher may raise, its jobs are accounted for
        lost = f"the launcher failed: {type(error).__name__}: {first_line(error)}"
        log.error(lost)
    states: dict[Path, State] = {}
    for point, old in zip(waiting, before, strict=True):
        status = point.run.status()
        if status is None or status == old or status.state == "running":
            states[point.run.path] = _write_failure(point.run, lost, started)
        else:
            states[point.run.path] = status.state
    return [replace(point, left=states.get(point.run.path, point.left)) for point in points]


def run_alone(composed: DictConfig) -> State:
    """Run one job in the process that another launcher gave it."""
    from finetune import pipeline  # loads torch, which the sweep's own process never does

    quieten_libraries()
    return pipeline.run([build_job(composed, swept=[])])[0]


def _time_left(took: Sequence[float], points: Sequence[Point]) -> str:
    """Estimate the rest from the runs so far."""
    if not took:
        return ""
    waiting = sum(point.left is None and point.prospect != FINISHED for point in points)
    return f" (about {waiting * fmean(took) / 60:.0f} min left)"


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that a stopped sweep still leaves checkpoint and report."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _conducted_alone(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder; the kernel frees the lock of a process that died."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise Refused(
            [f"another process conducts the sweep {folder}; wait for it, or set sweep.name=OTHER"]
        ) from None
    try:
        yield
    finally:
        lock.release()


def _plan(jobs: Sequence[Job], name: str, worker: AnyWorker) -> Sweep:
    """Let the worker check every job, refuse all problems at once, drop repeated points."""
    plans = [worker.prepare(job) for job in jobs]
    _refuse([problem for plan in plans for problem in plan.problems])
    points: dict[Path, Point] = {}
    for job, plan in zip(jobs, plans, strict=True):
        assert plan.folder is not None, "a plan without problems has a folder"
        if plan.folder in points:
            log.info("%s stands in the grid twice; it is run once", plan.folder.name)
        else:
            points[plan.folder] = _point(job, RunFolder(plan.folder), finished=plan.finished)
    most = {plan.folder: plan.most_together for plan in plans}
    for line in dict.fromkeys(line for plan in plans for line in plan.forecasts):
        log.info("to score: %s", line)
    found = list(points.values())
    return Sweep(name, found, _grouped(found, [most[point.run.path] for point in found]))


def _grouped(points: Sequence[Point], most: Sequence[int]) -> list[Group]:
    """Put the points that are still to be trained together where they can be."""
    training = [place for place, point in enumerate(points) if point.trains]
    found = find_groups(
        [points[place].job.config for place in training], [most[place] for place in training]
    )
    groups = [Group([training[place] for place in one.places], one.reason) for one in found]
    groups += [Group([place]) for place, point in enumerate(points) if not point.trains]
    return sorted(groups, key=lambda group: group.places[0])


def _point(job: Job, run: RunFolder, *, finished: bool) -> Point:
    """Decide what becomes of a run from what an earlier sweep left of it."""
    status = run.status()
    if finished:
        return Point(job, run, FINISHED)
    if status is not None and status.state == "diverged":
        return Point(job, run, "diverged, left as it is", left="diverged")
    if status is not None and status.state == "failed" and not job.config.sweep.retry_failed:
        return Point(job, run, "failed, left as it is", left="failed")
    if job.config.training.is_skipped:
        return Point(job, run, "to be evaluated")
    if run.read_json("training.json") is not None:
        return Point(job, run, "trained, to be evaluated")
    step = newest_step(run.checkpoints)
    if step is not None:
        return Point(job, run, f"resumed at step {step}", trains=True)
    if status is not None:
        again = "failed, tried again" if status.state == "failed" else "begun again"
        return Point(job, run, again, trains=True)
    return Point(job, run, "new", trains=True)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise Refused(list(dict.fromkeys(problems)))


def _folder_problems(config: Config) -> list[str]:
    """Return the folders that cannot be written to."""
    problems = []
    for key, folder in (("output_dir", config.output_dir), ("report_dir", config.report_dir)):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problems.append(f"{key}={folder} cannot be written to ({error.strerror}); set another")
    return problems


def _run_group(points: Sequence[Point], worker: AnyWorker) -> list[State]:
    """Run jobs together; a worker's death or refusal is one run's failure and nobody else's."""
    started, timeout = time.time(), points[0].job.config.sweep.job_timeout
    try:
        jobs = [point.job for point in points]
        return worker.run(jobs, None if timeout is None else timeout * len(points))
    except (WorkerDied, ValueError, OSError) as error:
        if len(points) > 1:
            log.warning("%s; its %d runs go on one by one", error, len(points))
            return [state for point in points for state in _run_group([point], worker)]
        log.error("%s failed: %s", points[0].run.name, error)
        return [_write_failure(points[0].run, str(error), started)]


def _write_failure(run: RunFolder, reason: str, started: float) -> State:
    """Record the end of a run whose process could not do so itself."""
    with run.locked():
        run.write_status(Status("failed", reason, started, time.time(), run.last_lines()))
        events = EventLog(run.events)
        events.status("failed", reason)
        events.close()
    return "failed"


def _write_report(sweep: Sweep) -> Results:
    """Write the report; pictures and pages that fail are said, and cost no run its result."""
    try:
        return write_report(sweep.folder)
    except (OSError, ValueError, KeyError, TypeError, JinjaError) as error:
        log.error("the report of %s is not whole: %s", sweep.folder, error)
        results = read_results(sweep.folder)
        write_csv(results)
        return results


def _report(sweep: Sweep, tracker: Tracker, states: Sequence[State]) -> int:
    """Write and print the results, say where to look next, and return the exit code."""
    interrupted = "interrupted" in states
    failed = any(state in ("failed", "diverged") for state in states)
    state: State = "interrupted" if interrupted else "failed" if failed else "finished"
    so_far = read_results(sweep.folder)
    behind = tracker.close(
        state=state, champion=so_far.best_run(), metrics=list(so_far.comparisons)
    )
    results = _write_report(sweep)
    print_table(render_table(results))
    for row in results.rows:
        if row["reason"]:
            print(f"{row['run']}: {row['status']}: {row['reason']}", file=sys.stderr)
    if results.comparisons:
        print(f"\n{verdict(results)}")
    print(f"\nreport: {sweep.folder / 'report.html'}    runs: {sweep.config.output_dir}/")
    if behind:
        print(behind, file=sys.stderr)
    elif sweep.config.tracking.enabled:
        print(f"compare: {tracker.ui_command}")
    return 130 if interrupted else int(failed)
