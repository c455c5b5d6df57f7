"""Join a sweep that another process conducts (`workers.join=true`), from any machine.

The sweep's command, with that setting, plans the grid on its own machine and takes runs that nobody
works on. It keeps no tracker and no claim of the sweep's folder, and ends when all runs have.
"""

from __future__ import annotations

import logging
import sys

from filelock import Timeout

from finetune import signals
from finetune.escaping import for_terminal
from finetune.problems import Refused
from finetune.reporting.pages import write_report
from finetune.sweeps.conduct import Conduct
from finetune.sweeps.live import live_table
from finetune.sweeps.planning import Point, Sweep, count_runs
from finetune.sweeps.pool import Pool
from finetune.tracking.claims import CLAIM_FILE, claimed
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.sweep_record import RunRecord, changed_record
from finetune.tracking.tracker import NullTracker

log = logging.getLogger("finetune")


def join(sweep: Sweep, pool: Pool, deadline: signals.Deadline | None) -> int:
    """Work on a recorded sweep until all its runs have ended; return the exit code.

    Raises:
        Refused: the sweep is not recorded, or its runs are other ones on this machine.
        KeyboardInterrupt: a second request to stop.
    """
    name_runs(sweep)
    log.info("joined sweep %s: %s", sweep.name, count_runs(len(sweep.points)))
    conduct = Conduct(sweep, NullTracker(), pool)
    runs = [(str(point), point.run) for point in sweep.points]
    try:
        with live_table(lambda: runs):
            for _ in conduct.states(deadline):
                pass
    except KeyboardInterrupt as stop:
        conduct.interrupt(stop)
        print(
            f"finetune: {signals.describe(stop)}; the sweep goes on without this process, the "
            "same command joins it again",
            file=sys.stderr,
        )
        return signals.exit_code(stop)
    _write_last_report(sweep)
    states = [status and status.state for status in (p.run.status() for p in sweep.points)]
    print(f"{states.count('finished')} of {len(states)} runs finished: {sweep.folder}")
    return int(any(state != "finished" for state in states))


def name_runs(sweep: Sweep) -> None:
    """Record the folders of runs that no worker has named yet, and compare the others.

    Raises:
        Refused: the sweep is not recorded, or has other runs than this machine would make.
    """
    try:
        with changed_record(sweep.folder) as record:
            pairs = list(zip(sweep.points, record.runs, strict=False))
            if len(pairs) != max(len(sweep.points), len(record.runs)):
                raise Refused([f"{sweep.folder} has {len(record.runs)} runs; {START_ANEW}"])
            own = sweep.record(record.command).runs
            problems = [_find_difference(*pair, sweep) for pair in pairs]
            if found := [problem for problem in problems if problem is not None]:
                raise Refused(found)
            record.runs[:] = own
    except (ValueError, OSError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(
            [f"{error}; workers.join=true joins a sweep that the same command has begun without it"]
        ) from None


START_ANEW = "the sweep has changed since: start its command again without workers.join"


def _find_difference(point: Point, run: RunRecord, sweep: Sweep) -> str | None:
    """Return why a recorded run is not the one that this machine would make."""
    assert point.job.inputs is not None
    inputs = point.job.inputs
    if run.swept != point.job.swept or (run.job and run.job != inputs.job):
        return f"{point} has other settings or inputs here than in {sweep.folder}; {START_ANEW}"
    if not run.is_named or (sweep.folder / run.folder).resolve() == point.run.path.resolve():
        return None
    conditions = _read_conditions(sweep, run)
    return (
        f"{for_terminal(str(point))} would be another run here, in {inputs.dtype}, than the one "
        f"that was begun ({conditions}); join from a machine with the same kind of GPU and the "
        "same versions of torch, transformers, peft, trl and accelerate"
    )


def _read_conditions(sweep: Sweep, run: RunRecord) -> str:
    """Return what a run was begun on, as far as its folder says."""
    found = RunFolder(sweep.folder / run.folder).read_json("environment.json")
    if not isinstance(found, dict):
        return run.folder
    named = (found.get("dtype"), found.get("gpu") or "CPU", found.get("host"))
    return ", ".join(str(one) for one in named if one)


def _write_last_report(sweep: Sweep) -> None:
    """Write the report, unless the sweep's own process does."""
    try:
        with claimed(sweep.folder / CLAIM_FILE, wait=False):
            write_report(sweep.folder)
    except Timeout:
        return
    except Exception as error:
        log.error("the report of %s is not complete: %s", sweep.folder, error)
