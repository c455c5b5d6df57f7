"""Messages between the sweep's process, the process that talks to Ray, and Ray's tasks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Join:
    """The command that joins a sweep, the same on all nodes."""

    arguments: list[str]
    folder: str  # where the sweep's command was typed
    logs: str  # the sweep's folder
    environment: dict[str, str]  # variables of the sweep's process that the command needs


@dataclass(frozen=True)
class Joined:
    """The end of a task's command."""

    host: str
    exit_code: int
    last_line: str  # of its output


@dataclass(frozen=True)
class Node:
    """The resources of one node of the cluster."""

    num_cpus: int
    num_gpus: int


@dataclass(frozen=True)
class Share:
    """The tasks of a sweep, and what each takes of a node."""

    num: int
    threads: int
    num_gpus: int


@dataclass(frozen=True)
class Failed:
    """A connection or a task that ended in an error of Ray's, or of the node's."""

    reason: str


@dataclass(frozen=True)
class Ended:
    """The end of one task."""

    number: int
    outcome: Joined | Failed
