"""Plan a sweep: its name, the action for each run, and the groups that are trained together."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from finetune.config.inputs import Inputs
from finetune.config.schema import Config, freeze, without_hydra
from finetune.files import digest, distinct_slug, resolved, slug
from finetune.pipeline.jobs import CheckedJob, Job
from finetune.problems import Refused
from finetune.sweeps.pool import Pool
from finetune.sweeps.worker_process import WorkerDied
from finetune.tracking.events import State
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.sweep_record import (
    UNNAMED,
    RunRecord,
    SweepRecord,
    find_names,
    render_swept,
)
from finetune.training.checkpoints import newest_step
from finetune.training.grouping import Group, Limit, find_groups, share_groups

log = logging.getLogger("finetune")

# skip: it is finished; leave: it failed or diverged, and is not retried; evaluate: it is trained;
# resume: train from its newest checkpoint; train: from the first step.
Action = Literal["skip", "leave", "evaluate", "resume", "train"]


@dataclass(frozen=True)
class Point:
    """One job of the grid, its run, and the action for it."""

    job: Job
    run: RunFolder
    action: Action
    left: State | None = None  # the state of a run that is not retried; None: it is run
    earlier: State | None = None  # state that an earlier sweep left
    step: int | None = None  # of the checkpoint to resume from
    base: str = ""  # tells one base that a worker loads from another
    base_scores: tuple[str, ...] = ()  # files of the base's scores that are not there yet
    rows: float = 0.0  # that it trains on, about
    row_seconds: float | None = None  # to train on one, of earlier runs; None: not known

    @property
    def trains(self) -> bool:
        """True if it has optimizer steps to take."""
        return self.action in ("resume", "train")

    @property
    def train_seconds(self) -> float | None:
        """About how long its training takes, from its checkpoint on; None: not known."""
        if not self.trains:
            return 0.0
        training = self.job.config.training
        done = (self.step or 0) * training.batch_size * training.gradient_accumulation_steps
        is_known = self.row_seconds is not None
        return max(0.0, self.rows - done) * (self.row_seconds or 0.0) if is_known else None

    @property
    def is_waiting(self) -> bool:
        """True if this sweep has to train or score it."""
        return self.left is None and self.action != "skip"

    @property
    def run_name(self) -> str:
        """The name of its folder, which a worker elsewhere may have to find."""
        is_named = self.run.path.parent.name != UNNAMED
        return self.run.name if is_named else "named by its first worker"

    def describe_action(self) -> str:
        """Return the action in the words of the plan's table."""
        match self.action:
            case "skip":
                return "finished already"
            case "leave":
                return f"{self.earlier}, not retried"
            case "evaluate":
                return "to be evaluated" if self.skips_training else "trained, to be evaluated"
            case "resume":
                return f"resumed at step {self.step}"
            case "train" if self.earlier is None:
                return "new"
            case "train":
                return "failed, retried" if self.earlier == "failed" else "restarted"

    @property
    def skips_training(self) -> bool:
        return self.job.config.training.is_skipped

    def __str__(self) -> str:
        return render_swept(self.job.swept) or self.run.name


@dataclass(frozen=True)
class Sweep:
    """A named set of runs, each with its place in the grid."""

    name: str
    points: list[Point]
    groups: list[Group]  # indices of points that are trained together

    @property
    def config(self) -> Config:
        """The settings that all jobs share: folders, tracking, `sweep`."""
        return self.points[0].job.config

    @property
    def num_waiting(self) -> int:
        """The number of runs that are left to do."""
        return sum(point.is_waiting for point in self.points)

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
        """Return what the report needs; its paths are relative, so both folders can be moved."""
        here = resolved(self.folder)
        runs = [
            RunRecord(
                os.path.relpath(resolved(p.run.path), here),
                p.job.swept,
                p.job.inputs.job if p.job.inputs else "",
            )
            for p in self.points
        ]
        objective = list(self.config.evaluation.objective)
        return SweepRecord(self.name, list(arguments), self.swept, self.tasks, runs, objective)


def announce(num_jobs: int) -> None:
    """Print at once that the checks begin, which take some seconds; imports too."""
    print(f"checking {count_runs(num_jobs)} ...", flush=True)


def count_runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def build_job(composed: DictConfig, swept: Sequence[str]) -> Job:
    """Return a job from what Hydra composed, while its HydraConfig is set."""
    ours = without_hydra(composed)
    hydra: Any = HydraConfig.instance().cfg
    assert hydra is not None, "a job is composed under its own HydraConfig"
    # Unresolved: reading them one by one would put the value of ${oc.env:...} into files.
    typed = OmegaConf.to_container(hydra.hydra.overrides.task, resolve=False)
    overrides = [str(override) for override in cast(list[Any], typed)]
    values = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o)  # not ~key
    return Job(
        config=freeze(ours),
        yaml=OmegaConf.to_yaml(ours),
        overrides=overrides,
        swept={key: _shown(values.get(key, "null"), ours, key) for key in swept},
    )


def _shown(typed: str, composed: DictConfig, key: str) -> str:
    """Return a swept value as typed, or the number that an interpolation resolves to."""
    if "${" not in typed:
        return typed
    value = OmegaConf.select(composed, key)
    return str(value) if isinstance(value, int | float) else typed  # text may be a secret


def sweep_name(jobs: Sequence[Job], arguments: Sequence[str]) -> str:
    """Name a sweep by model, data and a digest of its overrides: the same command continues it.

    Overrides of tracking, sweep, workers and Hydra are left out of the digest.
    """
    if jobs[0].config.sweep.name:
        return distinct_slug(jobs[0].config.sweep.name)
    neutral = ("tracking", "sweep.", "workers", "hydra")
    named = sorted(a for a in arguments if not a.lstrip("+").startswith(neutral))
    return f"{slug(_subject(jobs))[:71].rstrip('-.')}-{digest(named)[:8]}"


def _subject(jobs: Sequence[Job]) -> str:
    """Return the experiment, or model and data, the model by `model.path` if it is typed."""
    choices = HydraConfig.get().runtime.choices
    typed = any(o.lstrip("+").startswith("model.path=") for job in jobs for o in job.overrides)
    paths = dict.fromkeys(Path(job.config.model.path).name or "model" for job in jobs)
    model = "-".join(paths) if typed else choices["model"]
    experiment = choices.get("experiment")
    if experiment:
        return f"{experiment}-{model}" if typed else str(experiment)
    return f"{model}-{choices['data']}"


def plan_sweep(jobs: Sequence[Job], name: str, pool: Pool, problems: Sequence[str] = ()) -> Sweep:
    """Let a worker check every job, refuse all problems at once, drop repeated points.

    Args:
        jobs: the points of the grid.
        name: the sweep's name.
        pool: checks the jobs, and will run them.
        problems: those found before.

    Raises:
        Refused: there is a problem.
    """
    all_problems, plans = list(problems), []
    if len({tuple(job.config.evaluation.objective) for job in jobs}) > 1:
        all_problems.append(
            "evaluation.objective differs between jobs, but it chooses among them; give all the "
            "same: evaluation.objective=[TASK/METRIC,...]"
        )
    for job in jobs:
        try:
            plans.append(pool.prepare(job))
            all_problems += plans[-1].problems
        except (OSError, ValueError) as error:
            all_problems.append(str(error))
        except WorkerDied as error:
            all_problems.append(f"checking the jobs failed: {error}")
            break
    found_inputs = _named(jobs[0].config, name, [plan.inputs for plan in plans if plan.inputs])
    folders = [RunFolder(inputs.folder) for inputs in found_inputs]
    all_problems += [
        problem for run in folders if (problem := run.find_place_problem()) is not None
    ]
    refuse(all_problems)
    points: dict[Path, Point] = {}
    limits: dict[Path, Limit] = {}
    for job, plan, inputs in zip(jobs, plans, found_inputs, strict=True):
        folder = inputs.folder
        if folder in points:
            refuse(_find_evaluation_problems(points[folder].job, job))
            log.info("%s is in the grid twice; it is run once", folder.name)
        else:
            planned = replace(job, inputs=inputs)
            points[folder] = _point(planned, RunFolder(folder), plan)
            limits[folder] = plan.limit
    for line in dict.fromkeys(line for plan in plans for line in plan.forecasts):
        log.info("to score: %s", line)
    found = list(points.values())
    if jobs[0].config.workers.is_elsewhere:  # its workers group the runs
        return Sweep(name, found, [])
    groups = _grouped(found, [limits[point.run.path] for point in found], len(pool))
    return Sweep(name, found, groups)


def _named(config: Config, name: str, found: Sequence[Inputs]) -> list[Inputs]:
    """Return inputs with the runs' folders: for other machines, as far as their workers named them.

    The identity of a run has its device's dtype and versions, which only its worker knows.
    """
    if not config.workers.is_elsewhere:
        return list(found)
    folder = Path(config.report_dir) / name
    names = find_names(folder)
    paths = [names.get(one.job, f"{UNNAMED}/{one.job[:12]}") for one in found]
    return [
        replace(one, folder=resolved(folder / path)) for one, path in zip(found, paths, strict=True)
    ]


def _find_evaluation_problems(job: Job, other: Job) -> list[str]:
    """Return why two jobs cannot share a run: its folder holds one evaluation."""
    sections = [asdict(one.config.evaluation) for one in (job, other)]
    return [
        f"evaluation.{name} differs between jobs that train the same run, which has one "
        "evaluation; name all tasks in evaluation.tasks=[...], or start one command for each value"
        for name, value in sections[0].items()
        if sections[1][name] != value
    ]


def _grouped(points: Sequence[Point], limits: Sequence[Limit], num_workers: int) -> list[Group]:
    """Group the points that can be trained together, into work for all workers."""
    training = [index for index, point in enumerate(points) if point.trains]
    found = find_groups(
        [points[index].job.config for index in training], [limits[index] for index in training]
    )
    found = share_groups(found, num_workers)
    groups = [Group([training[index] for index in one.indices], one.reason) for one in found]
    groups += [Group([index]) for index, point in enumerate(points) if not point.trains]
    return sorted(groups, key=lambda group: group.indices[0])


def _point(job: Job, run: RunFolder, plan: CheckedJob) -> Point:
    """Return a job with its run and the action for it."""
    status = run.status()
    is_elsewhere = job.config.workers.is_elsewhere  # what finished is its worker's to judge
    if plan.finished or (is_elsewhere and status is not None and status.state == "finished"):
        return Point(job, run, "skip")
    for name, problem in run.find_damage().items():
        log.warning("%s: %s is damaged, and is recreated: %s", run.name, name, problem)
    earlier = status.state if status else None
    action = decide(job, run, earlier)
    return Point(
        job, run, action,
        left=earlier if action == "leave" else None,
        earlier=earlier,
        step=newest_step(run.checkpoints) if action == "resume" else None,
        base=plan.base,
        base_scores=plan.base_scores,
        rows=plan.rows,
        row_seconds=plan.row_seconds,
    )  # fmt: skip


def decide(job: Job, run: RunFolder, earlier: State | None) -> Action:
    """Return the action for an unfinished run, from the state that an earlier sweep left."""
    # One that joins would retry what has just failed; only the sweep's own process retries.
    is_retried = job.config.sweep.retry_failed and not job.config.workers.join
    if earlier == "diverged" or (earlier == "failed" and not is_retried):
        return "leave"
    if job.config.training.is_skipped or run.is_trained:
        return "evaluate"
    return "train" if newest_step(run.checkpoints) is None else "resume"


def refuse(problems: Sequence[str]) -> None:
    if problems:
        raise Refused(list(dict.fromkeys(problems)))
