"""Record the end of runs whose process died, from the sweep's process."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from filelock import Timeout

from finetune.tracking.claims import Claim
from finetune.tracking.events import EventLog, State
from finetune.tracking.run_folder import RunFolder, Status

log = logging.getLogger("finetune")


def write_cut_off(run: RunFolder, reason: str) -> None:
    """Record that a run was interrupted by the end of its process, unless another one runs it."""
    status = run.status()
    if status is None or status.state != "running":
        return
    try:
        with run.claimed(wait=False) as claim:
            ended = replace(status, state="interrupted", reason=reason, ended=time.time())
            _write_end(run, ended, claim)
    except Timeout:  # another process works on it
        return
    except OSError as error:
        log.error("%s: its end cannot be recorded: %s", run.name, error)


def set_back(run: RunFolder) -> None:
    """Record that a failed run is to be tried again, by whoever takes it."""
    status = run.status()
    if status is None or status.state != "failed":
        return
    try:
        with run.claimed(wait=False):
            reason = f"to be tried again after: {status.reason}"
            run.write_status(replace(status, state="interrupted", reason=reason))
    except (Timeout, OSError) as error:
        log.error("%s cannot be tried again: %s", run.name, error)


def write_failure(run: RunFolder, reason: str, before: Status | None) -> State | None:
    """Record the failure of a run whose process died.

    Args:
        run: the run.
        reason: its recorded reason.
        before: its status at the start; another process may have finished it since.

    Returns:
        The run's state; None where another process works on it.
    """
    try:
        with run.claimed(wait=False) as claim:
            now = run.status()
            if now is not None and now.state != "running" and now != before:
                return now.state
            started = now.started if now is not None and now.state == "running" else None
            ended = Status("failed", reason, started, time.time(), run.last_lines())
            _write_end(run, ended, claim)
    except Timeout:
        return None
    except OSError as error:  # such as a full disk; the other runs go on
        log.error("%s: its end cannot be recorded: %s", run.name, error)
    return "failed"


def _write_end(run: RunFolder, ended: Status, claim: Claim) -> None:
    run.write_status(ended)
    events = EventLog(run.events, claim)
    events.status(ended.state, ended.reason)
    events.close()
