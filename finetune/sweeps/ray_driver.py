"""The process that talks to Ray: it connects, starts the tasks and cancels them.

It stands between the sweep's process and Ray, which replaces signal handlers, prints, and may end
the process that it is loaded into. It cancels the tasks when the sweep's process is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from finetune.problems import first_line
from finetune.signals import STOP_SIGNALS
from finetune.sweeps.ray_join import STOP_SECONDS, JoinLost, join_sweep
from finetune.sweeps.ray_messages import Ended, Failed, Join, Joined, Node, Share

NEW_CLUSTER = "local"
POLL_SECONDS = 0.5  # between two looks at the tasks
MOST_RETRIES = 100  # of a task; each lost node costs one
STORE_BYTES = 100 * 2**20  # of a new cluster: no task's result is above a line


def main() -> None:
    """Serve the sweep's process, whose pipe is the file descriptor in the first argument."""
    _ignore_signals()
    with Connection(int(sys.argv[1])) as pipe:
        try:
            nodes = connect(sys.argv[2])
        except Exception as error:  # whatever Ray raises where it cannot be reached
            pipe.send(Failed(first_line(error)))
            return
        _ignore_signals()  # Ray has set its own handler
        pipe.send(nodes)
        try:
            join, share = pipe.recv()
        except EOFError:
            return
        _run(pipe, start_tasks(join, share))


def connect(address: str) -> list[Node]:
    """Connect to a cluster, or start one on this machine; return its nodes."""
    import ray

    starts = address == NEW_CLUSTER
    ray.init(
        address=address,
        log_to_driver=False,
        configure_logging=False,
        logging_level=logging.CRITICAL,
        **({"include_dashboard": False, "object_store_memory": STORE_BYTES} if starts else {}),
    )
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in resources]


def start_tasks(join: Join, share: Share) -> dict[Any, int]:
    """Start the tasks, placed by Ray; return their references with their numbers."""
    import ray

    task = ray.remote(join_sweep).options(
        name="finetune",
        num_cpus=share.threads,
        num_gpus=share.num_gpus,
        max_retries=MOST_RETRIES,
        retry_exceptions=[JoinLost],
        scheduling_strategy="SPREAD",
    )
    return {task.remote(join, number): number for number in range(share.num)}


def _run(pipe: Connection, tasks: dict[Any, int]) -> None:
    """Send each task's end, until all have ended; cancel them at a message, or at the pipe's end.

    A cancelled task ends when its command has written its checkpoint.
    """
    import ray

    deadline: float | None = None
    while tasks and (deadline is None or time.monotonic() < deadline):
        ended, _ = ray.wait(list(tasks), timeout=POLL_SECONDS)
        for task in ended:
            _send(pipe, Ended(tasks.pop(task), _outcome(task)))
        if deadline is None and pipe.poll():
            deadline = time.monotonic() + STOP_SECONDS
            for task in tasks:
                ray.cancel(task, recursive=False)


def _outcome(task: Any) -> Joined | Failed:
    import ray

    try:
        joined: Joined = ray.get(task)
    except Exception as error:  # of the task, its process or its node
        cause = getattr(error, "cause", None) or error
        return Failed(first_line(cause))
    return joined


def _send(pipe: Connection, message: Ended) -> None:
    try:
        pipe.send(message)
    except OSError:  # the sweep's process is gone; the loop sees that
        return


def _ignore_signals() -> None:
    """Leave stop signals to the sweep's process; a handler, unlike SIG_IGN, is not inherited."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that it starts


if __name__ == "__main__":
    main()
