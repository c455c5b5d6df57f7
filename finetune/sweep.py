"""A sweep: check the whole grid, run each point in a worker, report; a single run is one too.

This process imports no torch. The worker is told what to do and leaves its results in the runs'
folders; if it dies, a fresh one goes on with the rest.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from finetune.config import Config, Refused, build_config, find_problems
from finetune.report import Entry, print_table, read_result, render_table, write_results
from finetune.runs import EventLog, Job, RunFolder, State, Status, digest, slug
from finetune.tracking import Tracker, build_tracker
from finetune.worker import Worker, WorkerDied

log = logging.getLogger("finetune")

INTERRUPT_SECONDS = 20.0  # that a worker has to write down where Ctrl-C stopped it


@dataclass(frozen=True)
class Sweep:
    """A named set of runs, each with its place in the grid."""

    name: str
    jobs: list[Job]
    runs: list[RunFolder]

    @property
    def config(self) -> Config:
        """The settings that all jobs share: where to report, track and stop."""
        return self.jobs[0].config

    @property
    def folder(self) -> Path:
        return Path(self.config.report_dir) / self.name

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(t for job in self.jobs for t in job.config.evaluation.tasks))

    @property
    def swept(self) -> list[str]:
        return list(self.jobs[0].swept)


def build_job(composed: DictConfig, swept: Sequence[str]) -> Job:
    """Freeze what Hydra composed, while its own HydraConfig is the one in force."""
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    overrides = list(HydraConfig.get().overrides.task)
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


def run_sweep(jobs: Sequence[Job], arguments: Sequence[str]) -> int:
    """Run every job and report; return the exit code.

    Args:
        jobs: the points of the grid, at least one.
        arguments: the overrides as typed, which name the sweep.

    Raises:
        Refused: something in the grid cannot run; nothing was started.
    """
    _refuse([problem for job in jobs for problem in find_problems(job.config)])
    _refuse(_folder_problems(jobs[0].config))
    with Worker() as worker:
        sweep = _plan(jobs, sweep_name(jobs, arguments), worker)
        sweep.folder.mkdir(parents=True, exist_ok=True)
        log.info("sweep %s: %d runs", sweep.name, len(sweep.runs))
        tracker = build_tracker(
            sweep.config.tracking, sweep.folder, sweep_name=sweep.name, swept=sweep.swept
        )
        states: list[State] = []
        try:
            for number, (job, run) in enumerate(zip(sweep.jobs, sweep.runs, strict=True), start=1):
                log.info("[%d/%d] %s", number, len(sweep.runs), _point(job, run))
                tracker.follow(run)
                states.append(_run_one(job, run, worker))
                _write_results(sweep, tracker)
                if sweep.config.sweep.fail_fast and states[-1] != "finished":
                    break
        except KeyboardInterrupt:
            worker.wait_for_interrupted(INTERRUPT_SECONDS)
            states.append("interrupted")
        return _report(sweep, tracker, states)


def _plan(jobs: Sequence[Job], name: str, worker: Worker) -> Sweep:
    """Let the worker check every job, refuse all problems at once, drop repeated points."""
    plans = [worker.prepare(job) for job in jobs]
    _refuse([problem for plan in plans for problem in plan.problems])
    unique = {plan.folder: job for plan, job in reversed(list(zip(plans, jobs, strict=True)))}
    folders = [folder for folder in reversed(unique) if folder is not None]
    return Sweep(name, [unique[f] for f in folders], [RunFolder(f) for f in folders])


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


def _run_one(job: Job, run: RunFolder, worker: Worker) -> State:
    """Run one job; a worker's death or refusal is this run's failure and nobody else's."""
    started = time.time()
    try:
        return worker.run(job)
    except (WorkerDied, ValueError, OSError) as error:
        log.error("%s failed: %s", run.name, error)
        run.write_status(Status("failed", str(error), started, time.time()))
        events = EventLog(run.events)
        events.status("failed", str(error))
        events.close()
        return "failed"


def _write_results(sweep: Sweep, tracker: Tracker) -> list[dict[str, object]]:
    rows = [
        read_result(Entry(run, job.swept, tracker.run_id(run)), sweep.tasks)
        for job, run in zip(sweep.jobs, sweep.runs, strict=True)
    ]
    write_results(sweep.folder / "results.csv", rows)
    return rows


def _report(sweep: Sweep, tracker: Tracker, states: Sequence[State]) -> int:
    """Write and print the results, say where to look next, and return the exit code."""
    interrupted = "interrupted" in states
    failed = any(state in ("failed", "diverged") for state in states)
    state: State = "interrupted" if interrupted else "failed" if failed else "finished"
    behind = tracker.close(state=state)
    rows = _write_results(sweep, tracker)
    print_table(render_table(rows, sweep.swept, sweep.tasks))
    for row in rows:
        if row["reason"]:
            print(f"{row['run']}: {row['status']}: {row['reason']}", file=sys.stderr)
    print(f"\nresults: {sweep.folder / 'results.csv'}    runs: {sweep.config.output_dir}/")
    if behind:
        print(behind, file=sys.stderr)
    elif sweep.config.tracking.enabled:
        print(f"compare: {tracker.ui_command}")
    return 130 if interrupted else int(failed)


def _point(job: Job, run: RunFolder) -> str:
    return " ".join(f"{key}={value}" for key, value in job.swept.items()) or run.name
