"""Slurm: submit an array of identical workers that take a sweep's runs, by sbatch.

Each task runs the sweep's command with `workers.join=true` on its node. Slurm requeues a task that
is preempted or loses its node; one that stopped by itself with checkpoints written (exit code 75:
its wall clock was near, it was preempted with a time of grace) asks Slurm to requeue it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from finetune import signals
from finetune.config.grammar import key_of
from finetune.config.schema import WorkersConfig, changed_settings
from finetune.files import write_atomic
from finetune.problems import Refused
from finetune.signals import STOPPED_BY_MACHINE
from finetune.sweeps.slurm_queue import RECORD, Array, call, cancel

SCRIPT_FILE = "slurm.sh"  # as submitted, to be read
DEFAULT_TASKS = 8  # of an array, where workers.num is null and at least as many runs wait
# Before the wall clock ends, workers are signalled to write checkpoints; Slurm rounds this time up
# by as much as a minute.
SAVE_SECONDS = 180
SHORTEST_SECONDS = 180  # of a wall clock: less than that leaves no time between start and signal
NO_GRES = ("", "none")

# The trap lets bash outlive scancel and preemption, of which Slurm itself decides what follows:
# only a task that was signalled alone is requeued here.
SCRIPT = """\
#!/bin/bash
export PYTHONUNBUFFERED=1 FINETUNE_WORKER="task $SLURM_ARRAY_TASK_ID"
[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
cd {folder} || exit 1
trap 'is_ended=true' TERM
srun --ntasks=1 --kill-on-bad-exit=0 {command}
code=$?
if [ $code = {again} ] && [ -z "$is_ended" ]; then
  echo "requeued: the runs continue from their checkpoints"
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" && sleep 60
fi
exit $code
"""

# Options of sbatch that a sweep sets itself, and the setting to use instead.
OURS = {
    "array": "workers.num", "job-name": "sweep.name", "output": None, "error": None,
    "open-mode": None, "signal": None, "requeue": None, "no-requeue": None, "nodes": None,
    "ntasks": None, "chdir": None, "wrap": None, "parsable": None, "wait": None, "test-only": None,
    "partition": "workers.partition", "account": "workers.account", "time": "workers.time",
    "gres": "workers.gres",
}  # fmt: skip

# Words of sbatch's refusals, and what to change.
REMEDIES = {
    "account": "set workers.account; `sacctmgr show associations user=$USER` lists yours",
    "partition": "set workers.partition; `sinfo` lists them",
    "generic resource": "set workers.gres (`sinfo -o %G` lists them), or training.device=cpu",
    "gres": "set workers.gres (`sinfo -o %G` lists them), or training.device=cpu",
    "job array": "set a lower workers.num",
    "node configuration": "set workers.gres or workers.extra to what one node has",
    "time limit": "set workers.time; `sinfo -o '%P %l'` lists the limits",
    "time": "set workers.time, such as 4:00:00",
    "qos": "set workers.extra=[--qos=NAME], or fewer workers by workers.num",
    "option": "see workers.extra",
    "controller": "run the command where `sinfo` works",
    "configuration source": "run the command where `sinfo` works",
    "configuration file": "run the command where `sinfo` works",
}


def find_problems(workers: WorkersConfig) -> list[str]:
    """Return why a sweep cannot be submitted by these settings, one line each with its remedy."""
    problems = list(_find_option_problems(workers.extra))
    if workers.time is not None and (problem := _find_time_problem(workers.time)) is not None:
        problems.append(problem)
    for name in ("partition", "account", "gres"):
        value = getattr(workers, name)
        if value is not None and not (value.isprintable() and value == value.strip()):
            problems.append(f"workers.{name} is {value!r}; write it without spaces around it")
    if shutil.which("sbatch") is None:
        problems.append(
            "workers=slurm needs sbatch, which is not in PATH; run the command on the cluster's "
            "login node, or set workers=local"
        )
    return problems


def _find_option_problems(extra: Sequence[str]) -> Iterator[str]:
    for option in extra:
        name = re.match(r"--([a-z][a-z0-9-]*)(=|$)", option)
        if name is None or not option.isprintable():
            yield (
                f"workers.extra has {option!r}; write options of sbatch in their long form, such "
                "as [--mem=32G,--constraint=a100]"
            )
        elif name[1] in OURS:
            setting = OURS[name[1]]
            remedy = f"; set {setting}" if setting else ", which the sweep sets itself; remove it"
            yield f"workers.extra has --{name[1]}{remedy}"


def _find_time_problem(text: str) -> str | None:
    seconds = read_time(text)
    if seconds is None:
        return (
            f"workers.time is {text!r}; write it as Slurm does: minutes, 4:00:00 (hours), or "
            "2-00:00:00 (days)"
        )
    if seconds < SHORTEST_SECONDS:
        return (
            f"workers.time is {text!r}, which leaves no time to train before checkpoints are "
            "written; set at least 3 minutes, better an hour"
        )
    return None


def read_time(text: str) -> float | None:
    """Return the seconds of a time limit as Slurm reads it; None for anything else."""
    if text.lower() in ("unlimited", "infinite"):
        return float("inf")
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d\d?))?(?::(\d\d?))?", text)
    if found is None:
        return None
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is not None or found[4] is not None:  # hours:minutes:seconds
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second  # minutes:seconds


def count_workers(workers: WorkersConfig, waiting: int) -> int:
    """Return the number of tasks for this many waiting runs."""
    return workers.num or max(1, min(waiting, DEFAULT_TASKS))


def submit(
    workers: WorkersConfig, folder: Path, again: Sequence[str], num: int, *, needs_gpu: bool
) -> Array:
    """Submit an array of workers and record it in the sweep's folder.

    Args:
        workers: where they run, and further options of sbatch.
        folder: of the sweep, whose name is the job's; takes the tasks' output, too.
        again: the arguments of the sweep's command as typed.
        num: of tasks.
        needs_gpu: whether GPUs are asked for where `workers.gres` is null.

    Raises:
        Refused: sbatch does not take it; nothing was submitted.
    """
    script = write_script(Path.cwd(), join_arguments(again, workers))
    options = list_options(workers, folder, num, needs_gpu=needs_gpu)
    with signals.held_back():  # an array that is submitted is also recorded
        try:
            write_atomic(folder / SCRIPT_FILE, script)
            done = call(["sbatch", "--parsable", *options, str(folder / SCRIPT_FILE)])
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Refused([f"sbatch could not be run: {error}; nothing was submitted"]) from None
        found = re.search(r"^(\d+)(?:;(\S+))?$", done.stdout, re.MULTILINE)
        if done.returncode != 0 or found is None:
            raise Refused([explain_refusal(done.stderr or done.stdout)])
        array = Array(found[1], num, found[2])
        try:
            write_atomic(folder / RECORD, json.dumps(asdict(array)) + "\n")
        except OSError as error:
            cancel(array)
            raise Refused(
                [f"{folder / RECORD} cannot be written ({error.strerror}); array {array.job} was "
                 "cancelled again"]
            ) from None  # fmt: skip
    return array


def list_options(workers: WorkersConfig, folder: Path, num: int, *, needs_gpu: bool) -> list[str]:
    """Return the options of sbatch; on the command line they go before variables SBATCH_*."""
    seconds = read_time(workers.time) if workers.time is not None else None
    save = SAVE_SECONDS if seconds is None else int(min(SAVE_SECONDS, seconds / 3))
    gres = workers.gres
    if gres is None and needs_gpu:
        gres = f"gpu:{workers.gpus_per_worker}"
    output = str(Path(os.path.abspath(folder))).replace("%", "%%") + "/slurm-%A_%a.log"
    asked = {
        "job-name": f"finetune-{folder.name}",
        "array": f"0-{num - 1}",
        "nodes": 1,
        "ntasks": 1,
        "output": output,
        "open-mode": "append",
        "signal": f"TERM@{save}",
        "partition": workers.partition,
        "account": workers.account,
        "time": workers.time,
        "gres": None if gres in NO_GRES else gres,
        "cpus-per-task": _count_cpus(workers),
    }
    options = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    return [*options, "--requeue", *workers.extra]


def _count_cpus(workers: WorkersConfig) -> int | None:
    """Return the cores of a task by `workers.threads`, unless `workers.extra` asks for some."""
    if workers.threads is None or any(o.startswith("--cpus-per-") for o in workers.extra):
        return None
    return workers.threads * workers.gpus_per_worker


def write_script(here: Path, arguments: Sequence[str]) -> str:
    """Return the batch script of a worker.

    Args:
        here: the folder in which the sweep's command was typed.
        arguments: of the command that joins the sweep.
    """
    command = [sys.executable, "-m", "finetune", *arguments]
    return SCRIPT.format(
        folder=quote(str(here)),
        command=" ".join(map(quote, command)),
        again=STOPPED_BY_MACHINE,
    )


def quote(text: str) -> str:
    """Return a word of bash on one line: sbatch refuses carriage returns in a script."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(f"\\x{byte:02x}" for byte in os.fsencode(text)) + "'"


def join_arguments(again: Sequence[str], workers: WorkersConfig) -> list[str]:
    """Return the arguments of the command that joins a sweep on another machine.

    What only concerns the start elsewhere is left out, and reset where a config file sets it.
    """
    reset = {
        "workers": "local", "workers.launch": "local", "workers.join": "true",
        "workers.num": "null", "workers.partition": "null", "workers.account": "null",
        "workers.time": "null", "workers.gres": "null", "workers.extra": "[]",
        "workers.address": "null",
    }  # fmt: skip
    kept = [a for a in again if a.startswith("-") or key_of(a).strip() not in reset]
    changed = changed_settings(workers)
    needed = [
        f"{key}={value}"
        for key, value in reset.items()
        if key in ("workers", "workers.join") or key.partition(".")[2] in changed
    ]
    return [*kept, *needed]


def explain_refusal(printed: str) -> str:
    """Return sbatch's refusal in one line with its remedy."""
    lines = [re.sub(r"^sbatch: (error|fatal): ", "", line) for line in printed.splitlines()]
    lines = [line.strip() for line in lines if line.strip()] or ["no reason was printed"]
    text = "; ".join(dict.fromkeys(lines))
    asked = [remedy for word, remedy in REMEDIES.items() if word in text.lower()]
    remedy = asked[0] if asked else "see workers.extra, workers.partition and workers.time"
    return f"sbatch refused the workers: {text}; {remedy}"
