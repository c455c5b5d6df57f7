"""Run a sweep: check the grid, run each job in a worker process, report. One run is a sweep of one.

This process imports no torch. The worker writes its results into the runs' folders; if it dies, a
new one continues with the remaining jobs.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from filelock import Timeout

from finetune import distributed, signals
from finetune.config.schema import Config
from finetune.escaping import for_terminal
from finetune.files import is_obstructed
from finetune.home import find_cache_problem, find_folder_problem, find_foreign_problem
from finetune.pipeline.jobs import Job
from finetune.problems import Refused
from finetune.reporting.pages import write_report
from finetune.reporting.results import Results, read_results, write_csv
from finetune.reporting.score_tables import render_table
from finetune.reporting.tables import print_table
from finetune.reporting.verdict import verdict
from finetune.sweeps import launchers
from finetune.sweeps.live import is_watched, live_table
from finetune.sweeps.lost_runs import write_cut_off, write_failure
from finetune.sweeps.planning import (
    Point,
    Sweep,
    plan_sweep,
    render_groups,
    render_plan,
    sweep_name,
)
from finetune.sweeps.worker import AnyWorker, WorkerDied, build_worker
from finetune.tracking.claims import CLAIM_FILE, Watch, claimed
from finetune.tracking.events import State
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.store_check import store_checked
from finetune.tracking.tracker import Tracker, build_tracker

log = logging.getLogger("finetune")

INTERRUPT_SECONDS = 120.0  # for a worker to end its step and write a checkpoint


@dataclass(frozen=True)
class Ending:
    """The results of a sweep, and its end."""

    results: Results
    is_written: bool  # results.csv has them
    unsent: str | None  # a line if MLflow is missing data, with the remedy
    open_command: str  # command that opens MLflow; empty without tracking
    exit_code: int
    stopped: KeyboardInterrupt | None = None  # the request that stopped it


def run_sweep(jobs: Sequence[Job], arguments: Sequence[str]) -> int:
    """Run every job, print plan and results, and return the exit code.

    Args:
        jobs: the points of the grid, at least one.
        arguments: the overrides as typed, which name the sweep.

    Raises:
        Refused: something in the grid cannot run; nothing was started.
    """
    with build_worker(is_quiet=is_watched()) as worker:
        name = sweep_name(jobs, arguments)
        sweep = check_sweep(jobs, name, worker)
        if len(sweep.points) > 1 or sweep.config.sweep.dry_run:
            print_table(render_plan(sweep))
            for line in render_groups(sweep):
                print(for_terminal(line))
        if sweep.config.sweep.dry_run:
            return 0
        ending = conduct(sweep, arguments, worker)
        _print_ending(sweep.config, ending)
        return ending.exit_code


def check_sweep(jobs: Sequence[Job], name: str, worker: AnyWorker) -> Sweep:
    """Check and plan the grid.

    Raises:
        Refused: something in the grid cannot run.
    """
    found = [p for j in jobs for p in launchers.find_problems(j.config)]
    found += _folder_problems(jobs[0].config)
    if (problem := find_cache_problem()) is not None:  # planning itself needs it
        raise Refused([*found, problem])
    with store_checked(jobs[0].config.tracking):
        sweep = plan_sweep(jobs, name, worker, found)
        if (problem := find_foreign_problem(p.run.path for p in sweep.points)) is not None:
            raise Refused([problem])
        if is_obstructed(sweep.folder):
            raise Refused([f"{sweep.folder} is not a folder; move it away"])
    return sweep


def conduct(sweep: Sweep, arguments: Sequence[str], worker: AnyWorker) -> Ending:
    """Run the planned jobs, and report; at a request to stop checkpoints are written.

    Raises:
        Refused: the sweep runs in another process, or its folder cannot be written to.
        KeyboardInterrupt: a second request to stop.
    """
    with _claimed_folder(sweep.folder):
        return _conduct(sweep, arguments, worker)


def _conduct(sweep: Sweep, arguments: Sequence[str], worker: AnyWorker) -> Ending:
    """Run the planned jobs, write the results after each, and report."""
    log.info("sweep %s: %d runs", sweep.name, len(sweep.points))
    tracker = _begin(sweep, arguments)
    states: list[State] = []
    stopped: KeyboardInterrupt | None = None
    report: Future[object] = Future()
    # Reports are written while the next run trains, or while an interrupted one saves.
    with ThreadPoolExecutor(max_workers=1) as reporter:
        try:
            with live_table([(str(point), point.run) for point in sweep.points]):
                for state in _run_all(sweep, tracker, worker):
                    states.append(state)
                    report.cancel()  # one that has not begun; the next has more
                    report = reporter.submit(_write_report, sweep)
                if states:
                    wait([report])
        except KeyboardInterrupt as stop:
            report.cancel()
            _end_runs(sweep, worker, stop)
            stopped = stop
            states.append("interrupted")
    ending = _report(sweep, tracker, states)
    if stopped is None:
        return ending
    return replace(ending, stopped=stopped, exit_code=signals.exit_code(stopped))


def _begin(sweep: Sweep, arguments: Sequence[str]) -> Tracker:
    """Write `sweep.yaml`, and start the tracker.

    Raises:
        Refused: the sweep's folder cannot be written to.
    """
    tracking = sweep.config.tracking
    try:
        sweep.record(arguments).write(sweep.folder)
        return build_tracker(tracking, sweep.folder, sweep_name=sweep.name, swept=sweep.swept)
    except OSError as error:
        raise _unwritable(sweep.folder, error) from None


def _unwritable(folder: Path, error: OSError) -> Refused:
    fault = error.strerror or error
    return Refused([f"{folder} cannot be written to ({fault}); set sweep.name or report_dir"])


def _end_runs(sweep: Sweep, worker: AnyWorker, stop: KeyboardInterrupt) -> None:
    """Let running jobs write a checkpoint; a second request ends them at once.

    Raises:
        KeyboardInterrupt: the second request.
    """
    reason = signals.describe(stop)
    log.info("%s: waiting for a checkpoint; a second signal stops without one", reason)
    is_ended = False
    try:
        is_ended = worker.interrupt(stop, INTERRUPT_SECONDS)
    finally:
        if not is_ended:
            worker.stop(0)
        for point in sweep.points:
            write_cut_off(point.run, f"{reason}, without a checkpoint of its last steps")


def _run_all(sweep: Sweep, tracker: Tracker, worker: AnyWorker) -> Iterator[State]:
    """Run the planned groups one after another, and yield the state of each run.

    Ends early after a failure under `sweep.fail_fast`, and where other ranks are blocked.
    """
    took: list[float] = []
    begun = 0
    for number, group in enumerate(sweep.groups):
        points = [sweep.points[index] for index in group.indices]
        waiting = [sweep.points[index] for rest in sweep.groups[number:] for index in rest.indices]
        left = _time_left(took, waiting)
        for point in points:
            begun += 1
            log.info("[%d/%d] %s%s", begun, len(sweep.points), point, left)
            _follow(tracker, point.run)
        started = time.monotonic()
        settled = [point.left for point in points if point.left]
        states = settled or _run_group(points, worker)
        if states == ["finished"] * len(points) and points[0].action != "skip":
            took += [(time.monotonic() - started) / len(points)] * len(points)
        yield from states
        is_failed = not settled and states != ["finished"] * len(points)
        if (sweep.config.sweep.fail_fast and is_failed) or distributed.is_desynchronised():
            return


def _follow(tracker: Tracker, run: RunFolder) -> None:
    """Track a run; it is trained even if `mlflow.json` cannot be written."""
    try:
        tracker.follow(run)
    except OSError as error:
        log.error("%s: mlflow.json of its sweep cannot be written: %s", run.name, error)


def _time_left(took: Sequence[float], points: Sequence[Point]) -> str:
    """Estimate the remaining time from the runs so far."""
    if not took:
        return ""
    waiting = sum(point.is_waiting for point in points)
    return f" (about {waiting * fmean(took) / 60:.0f} min left)"


@contextmanager
def _claimed_folder(folder: Path) -> Iterator[None]:
    """Claim a sweep's folder, so that no other process runs the sweep."""
    with ExitStack() as stack:
        try:
            stack.enter_context(claimed(folder / CLAIM_FILE, wait=False))
        except Timeout:
            holder = Watch(folder / CLAIM_FILE).holder() or "another process"
            raise Refused(
                [
                    f"this sweep is already running in {holder}: {folder}; wait for it, or set "
                    "sweep.name=OTHER"
                ]
            ) from None
        except OSError as error:
            raise _unwritable(folder, error) from None
        yield


def _folder_problems(config: Config) -> list[str]:
    """Return a problem for each folder that cannot be written to."""
    folders = {"output_dir": config.output_dir, "report_dir": config.report_dir}
    problems = [
        find_folder_problem(f"{key}={folder}", Path(folder), "set another")
        for key, folder in folders.items()
    ]
    return [problem for problem in problems if problem is not None]


def _run_group(points: Sequence[Point], worker: AnyWorker) -> list[State]:
    """Run jobs together; if the worker dies or refuses, each is run separately."""
    before, timeout = points[0].run.status(), points[0].job.config.sweep.job_timeout
    try:
        jobs = [point.job for point in points]
        return worker.run(jobs, None if timeout is None else timeout * len(points))
    except (WorkerDied, ValueError, OSError) as error:
        if len(points) > 1:
            log.warning("%s; its %d runs are run separately", error, len(points))
            return [state for point in points for state in _run_group([point], worker)]
        log.error("%s failed: %s", points[0].run.name, error)
        return [write_failure(points[0].run, str(error), before)]


def _write_report(sweep: Sweep) -> tuple[Results, bool]:
    """Write the report; return the results, and whether `results.csv` has them.

    Failing figures and pages are logged; the results are written anyway.
    """
    try:
        return write_report(sweep.folder), True
    except Exception as error:
        log.error("the report of %s is not complete: %s", sweep.folder, error)
        log.debug("where it failed", exc_info=error)
    results = read_results(sweep.folder)
    try:
        write_csv(results)
    except OSError as error:
        log.error("%s cannot be written: %s", sweep.folder / "results.csv", error)
        return results, False
    return results, True


def _report(sweep: Sweep, tracker: Tracker, states: Sequence[State]) -> Ending:
    """Write the final results, and end the sweep in MLflow."""
    interrupted = "interrupted" in states
    so_far = read_results(sweep.folder)
    unfinished = any(row["status"] != "finished" for row in so_far.rows)
    failed = unfinished or any(state in ("failed", "diverged") for state in states)
    state: State = "interrupted" if interrupted else "failed" if failed else "finished"
    unsent = tracker.close(
        state=state,
        champion=so_far.best_run(),
        metrics=so_far.drawn_metrics(),
        lowest_first=so_far.lowest_first,
    )
    results, is_written = _write_report(sweep)
    code = int(failed or not is_written)
    command = tracker.open_command if sweep.config.tracking.enabled else ""
    return Ending(results, is_written, unsent, command, code)


def _print_ending(config: Config, ending: Ending) -> None:
    """Print the results, and where to find report, runs and MLflow."""
    results = ending.results
    print_table(render_table(results))
    for row in results.rows:
        if row["reason"]:
            reason = for_terminal(str(row["reason"]))
            print(f"{row['run']}: {row['status']}: {reason}", file=sys.stderr)
    if results.best_run() is not None or results.metrics:
        print(f"\n{for_terminal(verdict(results))}")
    if ending.is_written:
        print(f"\nreport: {results.folder / 'report.html'}    runs: {config.output_dir}/")
    else:
        again = f"python -m finetune.report {results.folder}"
        print(
            f"the runs are kept; free disk space, then write the report: {again}", file=sys.stderr
        )
    if ending.unsent:
        print(ending.unsent, file=sys.stderr)
    elif ending.open_command:
        print(f"compare: {ending.open_command}")
