"""torch.distributed under a launcher: the rank of this process, and messages between ranks.

`accelerate launch` and `torchrun` start the command once for each GPU. Rank 0 runs the sweep as a
single process does, and only it writes files; the other ranks take part in its trainings. Without
a launcher torch is not imported and no process group is opened.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

from finetune import signals
from finetune.config.inputs import Inputs
from finetune.config.schema import Config

log = logging.getLogger("finetune")

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=30)  # the other ranks wait while rank 0 evaluates


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_launched() -> bool:
    """Return whether this is one of several processes."""
    return num_processes() > 1


def rank() -> int:
    """Return the rank of this process."""
    return int(os.environ["RANK"]) if is_launched() else 0


def is_main() -> bool:
    return rank() == 0


def local_rank() -> int:
    """Return the rank on this machine, which is the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_launched() else 0


def num_local_processes() -> int:
    """Return the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1


def is_sharded() -> bool:
    """Return whether the trained parameters are sharded across the ranks (FSDP)."""
    return is_launched() and asks_for_fsdp()


def asks_for_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@lru_cache(maxsize=1)
def join() -> None:
    """Open the process group, once; accelerate takes one that is open.

    Python objects are sent over gloo on the CPU, so that waiting ranks keep no GPU busy.
    """
    import torch
    import torch.distributed as dist

    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else only rank 0 has weights
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)


def from_main(compute: Callable[[], T]) -> T:
    """Return on every rank what rank 0 computes."""
    if not is_launched():
        return compute()
    import torch

    join()
    values: list[Any] = [compute() if is_main() else None]
    torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    value: T = values[0]
    return value


def from_all(value: T) -> list[T]:
    """Return the values of all ranks, by rank, on every rank."""
    if not is_launched():
        return [value]
    import torch.distributed as dist

    join()
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def receive() -> tuple[str, Any]:
    """Wait for the next message of rank 0: a verb and its payload."""
    return from_main(lambda: ("", None))


def _broadcast(verb: str, payload: Any) -> None:
    from_main(lambda: (verb, payload))


# Errors that took this rank out of a training while the other ranks are still in it.
_desynchronised: list[BaseException] = []


def is_desynchronised() -> bool:
    """Return whether the other ranks are blocked in a collective; this process must end soon."""
    return bool(_desynchronised)


@contextmanager
def training_together(config: Config, inputs: Inputs, expected: type[Exception]) -> Iterator[None]:
    """Let the other ranks take part in a training.

    Args:
        config: the settings to train with.
        inputs: the planned inputs of the run.
        expected: exception type raised on all ranks at once. Any other exception on this rank
            leaves the others blocked in a collective; only the launcher can stop them. The first
            request to stop is agreed on by all ranks; a second one ends only this rank.
    """
    if is_launched():
        _broadcast("train", (config, inputs))
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        is_expected = isinstance(error, expected) or error is signals.first_stop()
        if is_launched() and not is_expected:
            _desynchronised.append(error)
            log.error(
                "the other ranks are blocked in a collective without this one; once the launcher "
                "has stopped them, the same command resumes"
            )
        raise


@contextmanager
def leading() -> Iterator[None]:
    """End the other ranks with the exit code of this one."""
    code: Any = 1
    try:
        yield
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not is_launched():
            raise
    finally:
        end_ranks(code)
    if is_launched():
        exit_now(code)


def end_ranks(code: int) -> None:
    """Let the other ranks end with an exit code, unless they are blocked in a collective."""
    if is_launched() and not is_desynchronised():
        with suppress(RuntimeError):  # ranks that died receive nothing
            _broadcast("end", code)


def exit_now(code: int) -> NoReturn:
    """Exit this rank without the interpreter's teardown.

    Threads of the process group may abort a finished run during it.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
