"""The end of a run whose process was lost, written down by the process that conducts the sweep."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from filelock import FileLock, Timeout

from finetune.tracking.events import EventLog, State
from finetune.tracking.run_folder import RunFolder, Status

log = logging.getLogger("finetune")


def write_cut_off(run: RunFolder, reason: str) -> None:
    """Record the end of a run whose process was ended at work; one of another sweep goes on."""
    status = run.status()
    if status is None or status.state != "running":
        return
    try:
        with FileLock(run.path / ".lock", timeout=0):
            run.write_status(replace(status, state="interrupted", reason=reason, ended=time.time()))
            events = EventLog(run.events)
            events.status("interrupted", reason)
            events.close()
    except Timeout:  # another process works on it
        return
    except OSError as error:
        log.error("%s: its end cannot be recorded: %s", run.name, error)


def write_failure(run: RunFolder, reason: str, started: float) -> State:
    """Record the end of a run whose process could not do so itself; return how it ended.

    Another process may have worked on it, and ended it, since `started`.
    """
    try:
        with run.locked():
            now = run.status()
            if now is not None and now.state != "running" and (now.ended or 0) >= started:
                return now.state
            run.write_status(Status("failed", reason, started, time.time(), run.last_lines()))
            events = EventLog(run.events)
            events.status("failed", reason)
            events.close()
    except OSError as error:  # such as a full disk; the other runs go on
        log.error("%s: its end cannot be recorded: %s", run.name, error)
    return "failed"
