"""The queue of Slurm: an array of workers as recorded, its tasks' states, and its end."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.files import Damaged, read_json, set_aside

log = logging.getLogger("finetune")

RECORD = "slurm.json"  # of the array that was last submitted, in the sweep's folder
ANSWER_SECONDS = 60.0  # for a command of Slurm
TRIES, PAUSE_SECONDS = 4, 3.0  # of a query that Slurm does not answer


class SlurmUnavailable(RuntimeError):
    """Slurm's commands do not answer, so that the tasks' states are unknown."""


@dataclass(frozen=True)
class Array:
    """An array of workers as submitted."""

    job: str  # its number
    workers: int
    cluster: str | None = None  # of several that share one login node

    def logs(self, folder: Path) -> str:
        """Return the pattern of its tasks' output in a sweep's folder, as seen from here."""
        return os.path.relpath(folder / f"slurm-{self.job}_*.log")

    @property
    def options(self) -> list[str]:
        """Return the options that name it to squeue and scancel."""
        return [f"--clusters={self.cluster}"] if self.cluster else []


@dataclass(frozen=True)
class TaskState:
    """A task of an array that is in the queue."""

    task: str  # its index
    state: str  # as squeue names it: PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it waits; None or empty while it runs


def find_array(folder: Path) -> Array | None:
    """Return the array that was last submitted for a sweep; None if there is no record of it.

    A damaged record is set aside: a new array takes nothing that the lost one works on.
    """
    path = folder / RECORD
    try:
        stored = read_json(path, dict)
        return None if stored is None else _parse_array(stored)
    except Damaged as damage:
        set_aside(path, str(damage))
        return None


def _parse_array(stored: dict[str, Any]) -> Array:
    """Return a recorded array.

    Raises:
        Damaged: a field is missing, or of another kind.
    """
    job, workers, cluster = (stored.get(name) for name in ("job", "workers", "cluster"))
    if (
        not (isinstance(job, str) and job.isdecimal())
        or not isinstance(workers, int)
        or not isinstance(cluster, str | None)
    ):
        raise Damaged("it names no array of Slurm")
    return Array(job, workers, cluster)


def list_states(array: Array) -> list[TaskState]:
    """Return the tasks that are in the queue: waiting, at work, or ending.

    Raises:
        SlurmUnavailable: Slurm does not answer, also after several tries.
    """
    command = ["squeue", "--noheader", "--array", *array.options, f"--jobs={array.job}"]
    fault = ""
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE_SECONDS * number)
        try:
            done = call([*command, "--format=%K|%T|%r"])
        except (OSError, subprocess.TimeoutExpired) as error:
            fault = str(error)
            continue
        if done.returncode == 0:
            rows = [line.strip().split("|", 2) for line in done.stdout.splitlines()]
            return [TaskState(*row) for row in rows if len(row) == 3]
        fault = " ".join(done.stderr.split())
        if "Invalid job id" in fault:  # which Slurm says some minutes after an array's end
            return []
    raise SlurmUnavailable(f"squeue does not answer: {fault}")


def describe_states(states: Sequence[TaskState]) -> str:
    """Return a line on the tasks in the queue, e.g. `1 running, 2 pending (Resources)`."""
    counts = Counter(
        one.state.lower()
        + (f" ({one.reason})" if one.state == "PENDING" and one.reason != "None" else "")
        for one in states
    )
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or "none in the queue"


def describe_end(array: Array) -> str:
    """Return how an array's tasks ended, if Slurm still knows: `0: FAILED (exit code 2)`."""
    keys = "ArrayTaskId|JobState|ExitCode"
    try:
        asked = ["sacct", "-X", "-n", "-P", *array.options, "-j", array.job, "-o"]
        done = call([*asked, "JobID,State,ExitCode"])
        rows = [line.split("|") for line in done.stdout.splitlines() if done.returncode == 0]
        found = [(row[0].partition("_")[2], *row[1:]) for row in rows if len(row) == 3]
        if not found:  # without accounting
            done = call(["scontrol", "--oneliner", *array.options, "show", "job", array.job])
            jobs = [dict(re.findall(rf"({keys})=(\S+)", line)) for line in done.stdout.splitlines()]
            found = [tuple(job[key] for key in keys.split("|")) for job in jobs if len(job) == 3]
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(
        f"task {task} {state}" + ("" if code == "0:0" else f" (exit code {code.partition(':')[0]})")
        for task, state, code in sorted(found)
    )


class SlurmTasks:
    """The tasks of an array, which outlive the process that looks at them."""

    def __init__(self, array: Array, folder: Path) -> None:
        """Keep the array, and the sweep's folder, which has the tasks' output."""
        self._array = array
        self._logs = array.logs(folder)
        self._alive = array.workers  # when Slurm answered last
        self._shown = ""

    def alive(self) -> int:
        """Return how many tasks are in the queue; what changes is logged."""
        try:
            states = list_states(self._array)
        except SlurmUnavailable as error:
            log.warning("%s; the array is taken to be as before", error)
            return self._alive
        line = f"Slurm array {self._array.job}: {describe_states(states)}"
        if not states and (end := describe_end(self._array)):
            line += f"; {end}; output: {self._logs}"
        if line != self._shown:
            log.info("%s", line)
        self._shown, self._alive = line, len(states)
        return self._alive

    def interrupt(self, timeout_seconds: float) -> bool:
        """Leave the array at work, and say how to end it."""
        job = self._array.job
        log.info("Slurm array %s goes on; scancel %s ends it, checkpoints written", job, job)
        return True


def cancel(array: Array) -> None:
    """Cancel the tasks that are in the queue."""
    call(["scancel", *array.options, array.job])


def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm; variables of a job in which we run are not for the new one."""
    kept = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")
    environment = {
        name: value for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name in kept
    }  # fmt: skip
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=ANSWER_SECONDS,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
