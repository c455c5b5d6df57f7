"""Run a sweep: check the grid, run each job in a worker process, report. One run is a sweep of one.

This process imports no torch. The worker writes its results into the runs' folders; if it dies, a
new one continues with the remaining jobs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import Timeout

from finetune import signals
from finetune.config.durations import read_duration
from finetune.config.schema import Config
from finetune.files import is_obstructed
from finetune.home import find_cache_problem, find_folder_problem, find_foreign_problem
from finetune.pipeline.jobs import Job
from finetune.problems import Refused
from finetune.reporting.end_tables import render_end
from finetune.reporting.pages import write_report
from finetune.reporting.results import Results, read_results, write_csv
from finetune.reporting.sweep_summaries import summarise
from finetune.reporting.tables import output_width, print_table, print_text
from finetune.reporting.verdict import verdict
from finetune.sweeps import crew, launchers
from finetune.sweeps.conduct import Conduct
from finetune.sweeps.elsewhere import Follower
from finetune.sweeps.joining import join
from finetune.sweeps.live import is_watched, live_table
from finetune.sweeps.plan_tables import render_groups, render_plan, render_time
from finetune.sweeps.planning import Sweep, count_runs, plan_sweep, sweep_name
from finetune.sweeps.pool import Pool, build_pool
from finetune.sweeps.slurm_queue import Array
from finetune.sweeps.watching import runs_of_sweep
from finetune.tracking.claims import CLAIM_FILE, Watch, claimed
from finetune.tracking.events import State
from finetune.tracking.store_check import store_checked
from finetune.tracking.tracker import Tracker, build_tracker

log = logging.getLogger("finetune")


@dataclass(frozen=True)
class Ending:
    """The results of a sweep, and its end."""

    results: Results
    is_written: bool  # results.csv has them
    unsent: str | None  # a line if MLflow is missing data, with the remedy
    open_command: str  # command that opens MLflow; empty without tracking
    exit_code: int
    stopped: KeyboardInterrupt | None = None  # the request that stopped it


def run_sweep(
    jobs: Sequence[Job],
    arguments: Sequence[str],
    again: Sequence[str] = (),
    *,
    resumes: str = signals.RESUMES,
) -> int:
    """Run every job, print plan and results, and return the exit code.

    Args:
        jobs: the points of the grid, at least one.
        arguments: the overrides as typed, which name the sweep.
        again: all arguments of the command, by which workers elsewhere join the sweep.
        resumes: what resumes the sweep once it was stopped, as a clause.

    Raises:
        Refused: something in the grid cannot run; nothing was started.
    """
    deadline = build_deadline(jobs[0].config)
    with build_pool(jobs, is_quiet=is_watched()) as pool:
        name = sweep_name(jobs, arguments)
        sweep = check_sweep(jobs, name, pool)
        _print_plan(sweep, len(pool))
        if sweep.config.sweep.dry_run:
            return 0
        if sweep.config.workers.join:
            return join(sweep, pool, deadline)
        array = None
        if sweep.config.workers.launch == "slurm" and sweep.num_waiting:
            array = crew.find_queued(sweep)
            if array is None:
                _print_submitted(sweep, _submit(sweep, arguments, again))
                return 0
        launch = crew.Launch(pool, again, array)
        ending = conduct(sweep, arguments, launch, deadline)
        _print_ending(sweep.config, ending)
        if ending.stopped is None:
            return ending.exit_code
        return signals.end_stopped(ending.stopped, resumes)


def _print_plan(sweep: Sweep, num_workers: int) -> None:
    """Print the plan, of a single run only how long it takes."""
    if len(sweep.points) > 1 or sweep.config.sweep.dry_run:
        print_table(render_plan(sweep, output_width()))
        for line in render_groups(sweep):
            print_text(line)
    if (time := render_time(sweep, num_workers)) is not None:
        print_text(time)


def _submit(sweep: Sweep, arguments: Sequence[str], again: Sequence[str]) -> Array:
    """Submit workers to Slurm.

    Raises:
        Refused: the sweep runs in another process, or Slurm does not take them.
    """
    with _claimed_folder(sweep.folder):
        _record(sweep, arguments)
        return crew.submit(sweep, again)


def _print_submitted(sweep: Sweep, array: Array) -> None:
    print(f"\nsubmitted: Slurm array {array.job} of {array.workers} workers, which take the runs")
    print(f"watch: python -m finetune.runs --watch {sweep.name}    queue: squeue -j {array.job}")
    print(f"output: {array.logs(sweep.folder)}    end: scancel {array.job}")
    print("the same command again shows the runs, feeds MLflow, and writes the report")


def build_deadline(config: Config) -> signals.Deadline | None:
    """Return the end of `workers.stop_after`, which begins to count now."""
    stop_after = config.workers.stop_after
    seconds = None if stop_after is None else read_duration(stop_after)
    return None if stop_after is None or seconds is None else signals.Deadline(stop_after, seconds)


def check_sweep(jobs: Sequence[Job], name: str, pool: Pool) -> Sweep:
    """Check and plan the grid.

    Raises:
        Refused: something in the grid cannot run.
    """
    found = [p for j in jobs for p in launchers.find_problems(j.config)]
    found += [*_folder_problems(jobs[0].config), *crew.find_problems(jobs[0].config)]
    if (problem := find_cache_problem()) is not None:  # planning itself needs it
        raise Refused([*found, problem])
    is_conducted = not jobs[0].config.workers.join  # only the sweep's own process feeds MLflow
    with store_checked(jobs[0].config.tracking) if is_conducted else nullcontext():
        sweep = plan_sweep(jobs, name, pool, found)
        if (problem := find_foreign_problem(p.run.path for p in sweep.points)) is not None:
            raise Refused([problem])
        if is_obstructed(sweep.folder):
            raise Refused([f"{sweep.folder} is not a folder; move it away"])
    return sweep


def conduct(
    sweep: Sweep,
    arguments: Sequence[str],
    launch: crew.Launch,
    deadline: signals.Deadline | None = None,
) -> Ending:
    """Run the planned jobs, and report; at a request to stop checkpoints are written.

    Args:
        sweep: as planned.
        arguments: the overrides as typed.
        launch: starts the workers.
        deadline: at which all is to stop.

    Raises:
        Refused: the sweep runs in another process, its folder cannot be written to, or workers
            elsewhere cannot be started.
        KeyboardInterrupt: a second request to stop.
    """
    with _claimed_folder(sweep.folder):
        log.info("sweep %s: %s", sweep.name, count_runs(len(sweep.points)))
        tracker = _begin(sweep, arguments)
        with crew.assembled(sweep, tracker, launch) as workers:
            states, stopped = _run(sweep, workers, tracker, deadline)
        ending = _report(sweep, tracker, states)
    if stopped is None:
        return ending
    return replace(ending, stopped=stopped, exit_code=signals.exit_code(stopped))


def _run(
    sweep: Sweep,
    workers: Conduct | Follower,
    tracker: Tracker,
    deadline: signals.Deadline | None,
) -> tuple[list[State], KeyboardInterrupt | None]:
    """Let the planned jobs run, and write the results after each.

    Returns:
        The states of runs that have ended, and the request that stopped the sweep.
    """
    states: list[State] = []
    stopped: KeyboardInterrupt | None = None
    report: Future[object] = Future()
    # Reports are written while the next run trains, or while an interrupted one saves.
    with ThreadPoolExecutor(max_workers=1) as reporter:
        try:
            with live_table(runs_of_sweep(sweep.folder)):
                for state in workers.states(deadline):
                    states.append(state)
                    report.cancel()  # one that has not begun; the next has more
                    report = reporter.submit(_report_so_far, sweep, tracker)
                if states:
                    wait([report])
        except KeyboardInterrupt as stop:
            report.cancel()
            workers.interrupt(stop)
            stopped = stop
            states.append("interrupted")
    return states, stopped


def _begin(sweep: Sweep, arguments: Sequence[str]) -> Tracker:
    """Write `sweep.yaml`, and start the tracker.

    Raises:
        Refused: the sweep's folder cannot be written to.
    """
    tracking = sweep.config.tracking
    _record(sweep, arguments)
    try:
        return build_tracker(tracking, sweep.folder, sweep_name=sweep.name, swept=sweep.swept)
    except OSError as error:
        raise _unwritable(sweep.folder, error) from None


def _record(sweep: Sweep, arguments: Sequence[str]) -> None:
    try:
        sweep.record(arguments).write(sweep.folder)
    except OSError as error:
        raise _unwritable(sweep.folder, error) from None


def _unwritable(folder: Path, error: OSError) -> Refused:
    fault = error.strerror or error
    return Refused([f"{folder} cannot be written to ({fault}); set sweep.name or report_dir"])


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


def _report_so_far(sweep: Sweep, tracker: Tracker) -> None:
    """Write the report, and let MLflow show the best score by now; the champion comes last."""
    results, _ = _write_report(sweep)
    tracker.describe(replace(summarise(results), champion=None))


def _report(sweep: Sweep, tracker: Tracker, states: Sequence[State]) -> Ending:
    """Write the final results, and end the sweep in MLflow."""
    interrupted = "interrupted" in states
    so_far = read_results(sweep.folder)
    unfinished = any(row["status"] != "finished" for row in so_far.rows)
    failed = unfinished or any(state in ("failed", "diverged") for state in states)
    state: State = "interrupted" if interrupted else "failed" if failed else "finished"
    tracker.describe(summarise(so_far))
    tracker.flush()  # the results have the ids of the runs in MLflow
    results, is_written = _write_report(sweep)
    unsent = tracker.close(state=state)
    code = int(failed or not is_written)
    command = tracker.open_command if sweep.config.tracking.enabled else ""
    return Ending(results, is_written, unsent, command, code)


def _print_ending(config: Config, ending: Ending) -> None:
    """Print the results, and where to find report, runs and MLflow."""
    results = ending.results
    print_table(render_end(results, output_width()))
    for row in results.rows:
        if row["reason"]:
            is_named = str(row["reason"]).startswith(row["status"])
            state = "" if is_named else f"{row['status']}: "
            print_text(f"{results.label(row)}: {state}{row['reason']}", sys.stderr)
    if results.best_run() is not None or results.metrics:
        print_text(f"\n{verdict(results)}")
    if ending.is_written:
        print_text(f"\nreport: {results.folder / 'report.html'}    runs: {config.output_dir}/")
    else:
        again = f"python -m finetune.report {results.folder}"
        print(
            f"the runs are kept; free disk space, then write the report: {again}", file=sys.stderr
        )
    if ending.unsent:
        print(ending.unsent, file=sys.stderr)
    elif ending.open_command:
        print_text(f"compare: {ending.open_command}")
