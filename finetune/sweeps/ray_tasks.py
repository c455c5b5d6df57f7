"""Workers as tasks of a Ray cluster (`workers=ray`): each joins the sweep from the node it is on.

Ray places the tasks, and starts one again when its node is lost. Ray itself is loaded by another
process (`ray_driver`), on whose end the tasks end.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from finetune.config.grammar import key_of
from finetune.config.schema import Config, WorkersConfig
from finetune.problems import Refused
from finetune.signals import STOPPED_BY_MACHINE, STOPPED_BY_PERSON
from finetune.sweeps.ray_driver import NEW_CLUSTER
from finetune.sweeps.ray_join import STOP_SECONDS, find_last_line
from finetune.sweeps.ray_messages import Ended, Failed, Join, Node, Share
from finetune.sweeps.slurm import join_arguments

log = logging.getLogger("finetune")

# Settings of a joining command that its task decides; the sweep's process keeps the time.
BY_TASK = ("workers.num", "workers.threads", "workers.stop_after")
# Variables that a joining command needs from the sweep's process; the rest are the node's.
NEEDED_VARIABLES = ("FINETUNE_", "HF_", "HUGGING_FACE_", "PYTHONPATH")
CLOSE_SECONDS = 20.0  # for Ray to end
REFUSED = 2  # exit code of a command that started nothing


class RayTasks:
    """The tasks of one sweep."""

    def __init__(self, pipe: Connection, nodes: Sequence[Node], noise: IO[bytes]) -> None:
        self.nodes = nodes
        self._pipe = pipe
        self._noise = noise
        self._running: set[int] = set()
        self._is_stopped = False
        self.grace_seconds = STOP_SECONDS + CLOSE_SECONDS  # for the tasks to end at the close

    def start(self, join: Join, share: Share) -> None:
        """Start the tasks; each appends its output to `ray-NUMBER.log` in the sweep's folder."""
        self._pipe.send((join, share))
        self._running = set(range(share.num))

    def alive(self) -> int:
        """Return how many tasks have not ended; those that Ray has not placed yet are among them.

        What ended a task before the sweep's end is logged.
        """
        try:
            while self._running and self._pipe.poll():
                self._note(self._pipe.recv())
        except (EOFError, OSError):
            self._running.clear()
            reason = find_last_line(_lines(self._noise))
            log.error("Ray has ended, and its tasks with it: %s", reason)
        return len(self._running)

    def interrupt(self, timeout_seconds: float) -> bool:
        """Let all tasks write their checkpoints and end; return whether they have in time.

        Raises:
            KeyboardInterrupt: a second request to stop; the tasks are ended without them.
        """
        self._is_stopped = True
        self.grace_seconds = 0.0
        with suppress(OSError):
            self._pipe.send("stop")
        deadline = time.monotonic() + timeout_seconds
        while self.alive() and time.monotonic() < deadline:
            self._pipe.poll(1.0)
        self.grace_seconds = CLOSE_SECONDS
        return not self._running

    def _note(self, ended: Ended) -> None:
        self._running.discard(ended.number)
        line = describe(ended, is_stopped=self._is_stopped)
        if line is not None:
            log.error("%s", line)


def find_problems(config: Config) -> list[str]:
    """Return why a sweep cannot have its workers from Ray, before any cluster is asked."""
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:  # a folder of that name is no package
        return [
            "workers.launch is ray, but the package ray is not installed; "
            "pip install 'finetune[ray]'"
        ]
    address = config.workers.address or os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        return [
            f"workers.address is {address}, an address of Ray's client; start the command on a "
            "machine of the cluster with workers.address=auto"
        ]
    return []


@contextmanager
def connected(config: Config) -> Iterator[RayTasks]:
    """Connect to the cluster of `workers.address`; at the end its tasks of this sweep are ended.

    Raises:
        Refused: the cluster cannot be reached.
    """
    address = config.workers.address or os.environ.get("RAY_ADDRESS") or NEW_CLUSTER
    ours, theirs = Pipe()
    with TemporaryFile() as noise, ours:
        with theirs:
            process = _start_driver(theirs, address, noise)
        grace_seconds = 0.0
        try:
            tasks = RayTasks(ours, _hear_nodes(ours, address, noise), noise)
            try:
                yield tasks
            finally:
                grace_seconds = tasks.grace_seconds
        finally:
            ours.close()  # at which the process cancels the tasks
            _end(process, grace_seconds)


def _start_driver(pipe: Connection, address: str, noise: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the process that talks to Ray; a terminal's Ctrl-C does not reach it."""
    return subprocess.Popen(
        [sys.executable, "-m", "finetune.sweeps.ray_driver", str(pipe.fileno()), address],
        pass_fds=[pipe.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=noise,
        stderr=noise,
        start_new_session=True,
    )


def _hear_nodes(pipe: Connection, address: str, noise: IO[bytes]) -> list[Node]:
    """Return the nodes of the cluster.

    Raises:
        Refused: it cannot be reached.
    """
    try:
        heard: list[Node] | Failed = pipe.recv()
    except (EOFError, OSError):
        heard = Failed(find_last_line(_lines(noise)))
    if isinstance(heard, list):
        return heard
    where = "a new Ray cluster" if address == NEW_CLUSTER else f"the Ray cluster at {address}"
    verb = "started" if address == NEW_CLUSTER else "reached"
    raise Refused(
        [
            f"workers.launch is ray, but {where} cannot be {verb} ({heard.reason}); "
            "check workers.address with: ray status"
        ]
    )


def _end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    try:
        process.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        return
    finally:
        process.kill()  # Ray ends the tasks of a process that is gone
        process.wait()


def _lines(noise: IO[bytes]) -> list[bytes]:
    noise.seek(0)
    return noise.readlines()


def describe(ended: Ended, *, is_stopped: bool) -> str | None:
    """Return a line on a task that ended before the sweep did; None where nothing is to say."""
    number, outcome = ended.number, ended.outcome
    if isinstance(outcome, Failed):
        return None if is_stopped else f"Ray task {number} failed: {outcome.reason}"
    if outcome.exit_code in (0, 1):  # all runs are settled; reports say which failed
        return None
    if is_stopped and outcome.exit_code in (STOPPED_BY_MACHINE, STOPPED_BY_PERSON):
        return None
    what = "was refused" if outcome.exit_code == REFUSED else "ended"
    return (
        f"Ray task {number} on {outcome.host} {what} (exit code {outcome.exit_code}): "
        f"{outcome.last_line}; its output: ray-{number}.log"
    )


def build_join(again: Sequence[str], workers: WorkersConfig, folder: Path, share: Share) -> Join:
    """Return the command that joins the sweep of this command.

    Args:
        again: the arguments of this command, its flags among them.
        workers: their settings.
        folder: of the sweep.
        share: what a task takes of its node.
    """
    kept = [one for one in join_arguments(again, workers) if key_of(one).strip() not in BY_TASK]
    decided = ["workers.num=1", f"workers.threads={share.threads}"]
    if workers.stop_after is not None:  # a config file may set it
        decided.append("workers.stop_after=null")
    return Join(
        [*kept, *decided],
        os.getcwd(),
        str(folder.absolute()),
        select_variables(os.environ, again),
    )


def select_variables(environment: Mapping[str, str], arguments: Sequence[str]) -> dict[str, str]:
    """Return the variables that a joining command needs: ours, and those that arguments name."""
    named = {name for one in arguments for name in re.findall(r"\$\{oc\.env:\s*(\w+)", one)}
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(NEEDED_VARIABLES) or name in named
    }


def plan_share(config: Config, nodes: Sequence[Node], most: int) -> Share:
    """Return how many tasks to start, and the CPUs and GPUs of each.

    `workers.num` null is one a GPU (or `workers.gpus_per_worker` of them), without GPUs one a
    node. `workers.threads` null is the most with which all tasks fit at once.

    Args:
        config: of any job.
        nodes: of the cluster.
        most: tasks that have something to do.

    Raises:
        Refused: no node of the cluster has room for a task.
    """
    workers = config.workers
    num_gpus = _gpus_of_a_task(config, nodes)
    num = workers.num or count_places(nodes, workers.threads or 1, num_gpus, one_a_node=True)
    if num == 0:
        raise Refused([_no_room(workers.threads or 1, num_gpus)])
    num = min(num, most)
    threads = workers.threads or find_threads(nodes, num, num_gpus)
    if count_places(nodes, threads, num_gpus) == 0:
        log.warning("%s; the tasks wait for a node that has", _no_room(threads, num_gpus))
    return Share(num, threads, num_gpus)


def _gpus_of_a_task(config: Config, nodes: Sequence[Node]) -> int:
    device = config.training.device
    has_gpu = any(node.num_gpus for node in nodes)
    return (
        config.workers.gpus_per_worker if device == "cuda" or (device == "auto" and has_gpu) else 0
    )


def count_places(
    nodes: Sequence[Node], threads: int, num_gpus: int, *, one_a_node: bool = False
) -> int:
    """Return how many tasks run at once; `one_a_node` holds without GPUs only."""
    places = [
        min(node.num_cpus // threads, node.num_gpus // num_gpus if num_gpus else node.num_cpus)
        for node in nodes
    ]
    return sum(min(1, place) if one_a_node and not num_gpus else place for place in places)


def find_threads(nodes: Sequence[Node], num: int, num_gpus: int) -> int:
    """Return the most CPUs a task can take so that `num` tasks run at once; 1 if they cannot."""
    largest = max((node.num_cpus for node in nodes), default=1)
    fitting = (t for t in range(largest, 0, -1) if count_places(nodes, t, num_gpus) >= num)
    return next(fitting, 1)


def _no_room(threads: int, num_gpus: int) -> str:
    needed = f"{threads} CPUs" + (f" and {num_gpus} GPUs" if num_gpus else "")
    return f"no node of the Ray cluster has {needed} now; set workers.num, workers.threads"
