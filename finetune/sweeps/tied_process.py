"""Start a command that is stopped when the process that started it dies, by whatever signal.

The command is in a session of its own, so that Ctrl-C in a terminal does not reach it, and handles
signals as if it were typed: what its parent ignores or blocks is not inherited.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from finetune.signals import STOP_SIGNALS, STOPPED_BY_MACHINE

PR_SET_PDEATHSIG = 1  # prctl(2); it outlasts exec


def start_tied(
    command: Sequence[str],
    folder: str,
    environment: Mapping[str, str],
    output: IO[bytes],
    *,
    at_death: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a command that is signalled when this process, or its main thread, dies.

    Args:
        command: the program and its arguments.
        folder: in which it runs.
        environment: its variables.
        output: takes what it prints.
        at_death: the signal.
    """
    tied = [sys.executable, "-m", "finetune.sweeps.tied_process", str(os.getpid())]
    return subprocess.Popen(
        [*tied, str(int(at_death)), *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def main() -> None:
    """Tie this process to its parent, and become the command."""
    parent, at_death, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    with suppress(AttributeError, OSError):  # a system without prctl: the parent ends it at least
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, at_death)
    if os.getppid() != parent:  # it died before
        sys.exit(STOPPED_BY_MACHINE)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execv(command[0], command)  # noqa: S606  # a list of arguments, as in Popen


if __name__ == "__main__":
    main()
