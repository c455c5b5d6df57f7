"""Several processes under a launcher: which one this is, and what they tell each other.

`accelerate launch` and `torchrun` start the command once for each GPU. The first process conducts
all as a single one does, and alone writes; the others take part in its trainings. A process by
itself pays nothing: torch is imported, and a group opened, under a launcher only.
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

LONGEST_WAIT = timedelta(days=30)  # the others wait while the first one evaluates


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_launched() -> bool:
    """Return whether this is one of several processes."""
    return num_processes() > 1


def rank() -> int:
    """Return the number of this process; the first one is 0."""
    return int(os.environ["RANK"]) if is_launched() else 0


def is_main() -> bool:
    return rank() == 0


def local_rank() -> int:
    """Return the number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_launched() else 0


def num_local_processes() -> int:
    """Return how many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1


def is_sharded() -> bool:
    """Return whether the processes deal the trained weights out among them (FSDP)."""
    return is_launched() and asks_for_fsdp()


def asks_for_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@lru_cache(maxsize=1)
def join() -> None:
    """Meet the other processes, once, before accelerate does: it takes a group that is there.

    What they tell each other goes by the CPU, so that waiting keeps no GPU busy.
    """
    import torch
    import torch.distributed as dist

    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else only the first one has weights
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)


def from_main(find: Callable[[], T]) -> T:
    """Return in every process what the first one finds."""
    if not is_launched():
        return find()
    import torch

    join()
    held: list[Any] = [find() if is_main() else None]
    torch.distributed.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    found: T = held[0]
    return found


def from_all(value: T) -> list[T]:
    """Return every process's value, in their order, in each of them."""
    if not is_launched():
        return [value]
    import torch.distributed as dist

    join()
    held: list[Any] = [None] * num_processes()
    dist.all_gather_object(held, value)
    return held


def hear() -> tuple[str, Any]:
    """Wait for what the first process says next: a verb and what belongs to it."""
    return from_main(lambda: ("", None))


def _tell(verb: str, given: Any) -> None:
    from_main(lambda: (verb, given))


_parted: list[BaseException] = []  # what took this process out of a training, others still in it


def has_parted() -> bool:
    """Return whether the others can no longer be reached; this process must end soon."""
    return bool(_parted)


@contextmanager
def training_together(config: Config, inputs: Inputs, alike: type[Exception]) -> Iterator[None]:
    """Let the other processes take part in a training.

    Args:
        config: what they are to train.
        inputs: and from what, as planned.
        alike: an error that comes in all processes at once. Any other one, in this process alone,
            leaves them waiting for its gradients; only the launcher can end them then. A stop
            that all have agreed on is as expected; a second request ends this process alone.
    """
    if is_launched():
        _tell("train", (config, inputs))
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        is_expected = isinstance(error, alike) or error is signals.first_stop()
        if is_launched() and not is_expected:
            _parted.append(error)
            log.error("the other processes cannot go on without this one; the same command resumes")
        raise


@contextmanager
def leading() -> Iterator[None]:
    """End the other processes with the exit code that this one ends with."""
    code: Any = 1
    try:
        yield
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not is_launched():
            raise
    finally:
        if is_launched() and not has_parted():
            with suppress(RuntimeError):  # those that died hear nothing
                _tell("end", code)
    if is_launched():
        leave(code)


def leave(code: int) -> NoReturn:
    """End this process of several at once.

    Threads of the process group may abort a run that is over while the interpreter is taken down.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
