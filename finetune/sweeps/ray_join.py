"""A Ray task: the command that joins the sweep, in a process that ends with the task."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from finetune.signals import STOPPED_BY_MACHINE
from finetune.sweeps.ray_messages import Join, Joined
from finetune.sweeps.tied_process import start_tied

POLL_SECONDS = 0.3  # between two looks at the process; Ray cancels a task between them
STOP_SECONDS = 120.0  # for the process to write its checkpoint


class JoinLost(RuntimeError):
    """The command was ended by its machine; Ray starts the task again."""


def join_sweep(join: Join, number: int) -> Joined:
    """Run the command to its end, its output appended to `ray-NUMBER.log`.

    Raises:
        FileNotFoundError: this node does not see the sweep's folders.
        JoinLost: the machine ended the command; nobody asked for it.
    """
    host = socket.gethostname()
    for folder in (join.folder, join.logs):
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"{host} has no folder {folder}; all nodes of the Ray cluster need it, on a "
                "shared file system"
            )
    with (Path(join.logs) / f"ray-{number}.log").open("ab+") as log:
        log.write(f"-- task {number} on {host}, {time.strftime('%F %T')}\n".encode())
        log.flush()
        begun = log.tell()
        command = [sys.executable, "-m", "finetune", *join.arguments]
        process = start_tied(command, join.folder, _complete(join.environment), log)
        is_cancelled = _wait(process)
        log.seek(begun)
        code, last_line = process.returncode, find_last_line(log)
    if not is_cancelled and (code < 0 or code == STOPPED_BY_MACHINE):
        raise JoinLost(f"the command on {host} was stopped by its machine (exit code {code})")
    return Joined(host, code, last_line)


def _wait(process: subprocess.Popen[bytes]) -> bool:
    """Wait for the process; return whether the task was cancelled, and the process stopped."""
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:  # so Ray cancels
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        return True
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    return False


def find_last_line(lines: Iterable[bytes]) -> str:
    """Return the last line that is not empty, without the list's dash of a refusal."""
    texts = [line.decode(errors="replace").strip() for line in lines]
    return next((text.removeprefix("- ") for text in reversed(texts) if text), "")


def _complete(variables: Mapping[str, str]) -> dict[str, str]:
    """Return this node's environment with variables of the sweep's process."""
    return {**os.environ, **variables}
