"""Who works on a sweep's runs: workers of this process, or tasks of Slurm or Ray elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from finetune.config.schema import Config
from finetune.problems import Refused
from finetune.sweeps import ray_tasks, slurm
from finetune.sweeps.conduct import Conduct
from finetune.sweeps.elsewhere import Follower
from finetune.sweeps.lost_runs import set_back
from finetune.sweeps.planning import Sweep
from finetune.sweeps.pool import Pool
from finetune.sweeps.slurm_queue import (
    Array,
    SlurmTasks,
    SlurmUnavailable,
    describe_end,
    find_array,
    list_states,
)
from finetune.tracking.tracker import Tracker

log = logging.getLogger("finetune")


@dataclass(frozen=True)
class Launch:
    """The means by which a sweep's workers are started."""

    pool: Pool  # the workers of this process
    again: Sequence[str]  # the arguments of the sweep's command, its flags among them
    array: Array | None = None  # of Slurm, where it is known to be in the queue


class Nobody:
    """The tasks of a sweep in which nothing is left to do."""

    def alive(self) -> int:
        """Return that there are none."""
        return 0

    def interrupt(self, timeout_seconds: float) -> bool:
        """Return that none is at work."""
        return True


def find_problems(config: Config) -> list[str]:
    """Return why no worker can be started as `workers` asks, before anything is asked of it."""
    if config.workers.launch == "slurm":
        return slurm.find_problems(config.workers)
    return ray_tasks.find_problems(config) if config.workers.launch == "ray" else []


@contextmanager
def assembled(sweep: Sweep, tracker: Tracker, launch: Launch) -> Iterator[Conduct | Follower]:
    """Yield who works on the runs, started where it is not yet; tasks of Ray end with the block.

    Args:
        sweep: as planned and recorded.
        tracker: told of each run.
        launch: starts the workers.

    Raises:
        Refused: tasks cannot be started.
    """
    config = sweep.config
    if not config.workers.is_elsewhere:
        yield Conduct(sweep, tracker, launch.pool)
    elif not sweep.num_waiting:
        yield Follower(sweep, tracker, Nobody())
    elif config.workers.launch == "slurm":
        array = launch.array or find_queued(sweep) or submit(sweep, launch.again)
        yield Follower(sweep, tracker, SlurmTasks(array, sweep.folder))
    else:
        with ray_tasks.connected(config) as tasks:
            share = ray_tasks.plan_share(config, tasks.nodes, sweep.num_waiting)
            _retry_failed(sweep)
            join = ray_tasks.build_join(launch.again, config.workers, sweep.folder, share)
            tasks.start(join, share)
            yield Follower(sweep, tracker, tasks)


def find_queued(sweep: Sweep) -> Array | None:
    """Return the array of Slurm that works on a sweep, if it is in the queue.

    Raises:
        Refused: Slurm does not answer.
    """
    array = find_array(sweep.folder)
    try:
        return array if array is not None and list_states(array) else None
    except SlurmUnavailable as error:
        raise Refused(
            [f"{error}; run the command where squeue works, once it does: {sweep.name} may be in "
             "its queue"]
        ) from None  # fmt: skip


def submit(sweep: Sweep, again: Sequence[str]) -> Array:
    """Submit workers to Slurm for what is left to do.

    Raises:
        Refused: Slurm does not take them.
    """
    config, before = sweep.config, find_array(sweep.folder)
    if before is not None:
        end = describe_end(before) or "its end is not known"
        logs = before.logs(sweep.folder)
        log.info("the last array, %s, has left runs: %s; its output: %s", before.job, end, logs)
    num = slurm.count_workers(config.workers, sweep.num_waiting)
    needs_gpu = config.training.device != "cpu"
    _retry_failed(sweep)
    return slurm.submit(config.workers, sweep.folder, again, num, needs_gpu=needs_gpu)


def _retry_failed(sweep: Sweep) -> None:
    """Let failed runs begin again: workers that join leave alone what has failed."""
    for point in sweep.points:
        if point.is_waiting and point.earlier == "failed":
            set_back(point.run)
