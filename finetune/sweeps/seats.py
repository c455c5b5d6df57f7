"""Where each worker computes: on GPUs by their UUIDs, or on its share of the CPU's cores."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from finetune.config.schema import Config
from finetune.home import WORKER
from finetune.models.devices import VISIBLE, Gpu, find_gpu_files, list_gpus
from finetune.problems import Refused


@dataclass(frozen=True)
class Seat:
    """The part of a machine that one worker has."""

    environment: dict[str, str] = field(default_factory=dict)  # set before torch is imported
    processes: int = 1  # that train one run


def find_seats(
    config: Config,
    environment: Mapping[str, str] = os.environ,
    find: Callable[[], Sequence[Gpu]] = list_gpus,
) -> list[Seat]:
    """Return the seats of a sweep's workers on this machine: one a GPU, or one on the CPU.

    Where its runs are for other machines, there is one worker here, without a GPU.

    Args:
        config: of any job of the sweep.
        environment: of this process; GPUs that it hides are nobody's.
        find: lists the machine's GPUs.

    Raises:
        Refused: more workers are asked for than there are GPUs.
    """
    workers = config.workers
    if workers.is_elsewhere:  # it checks jobs, and leaves the GPUs to others
        return [Seat({VISIBLE: ""})]
    each = max(1, workers.gpus_per_worker)
    gpus = [] if config.training.device == "cpu" else visible_gpus(environment, find)
    if not gpus:
        return _cpu_seats(max(1, workers.num or 1), workers.threads, each, environment)
    count = workers.num or len(gpus) // each
    if count * each > len(gpus) or count == 0:
        there = f"{len(gpus)} visible GPU{'s' * (len(gpus) != 1)} of one kind"
        fewer = f" workers.gpus_per_worker={len(gpus)}" * (each > len(gpus))
        raise Refused(
            [
                f"workers.num is {max(count, 1)} and workers.gpus_per_worker is {each}, but there "
                f"are only {there} here; set workers.num={max(1, len(gpus) // each)}{fewer}"
            ]
        )
    if count == each == 1:
        return [_single_seat(workers.threads)]
    return [
        _gpu_seat(range(number * each, (number + 1) * each), gpus, workers.threads, environment)
        for number in range(count)
    ]


def visible_gpus(
    environment: Mapping[str, str], find: Callable[[], Sequence[Gpu]] = list_gpus
) -> list[str]:
    """Return the GPUs that a process sees, by UUID, or as its environment names them.

    Of several kinds, those of the most frequent one: one dtype and one speed for all runs.
    """
    gpus = find()
    if VISIBLE in environment:
        named = [name for part in environment[VISIBLE].split(",") if (name := part.strip())]
        return named if gpus or find_gpu_files() else []
    kinds = Counter(gpu.name for gpu in gpus)
    return [gpu.uuid for gpu in gpus if gpu.name == kinds.most_common(1)[0][0]]


def _gpu_seat(
    numbers: range, gpus: Sequence[str], threads: int | None, environment: Mapping[str, str]
) -> Seat:
    name = f"GPU {'+'.join(map(str, numbers))}"
    told = {VISIBLE: ",".join(gpus[number] for number in numbers), **_named(name, environment)}
    return Seat(told | _threads(threads), len(numbers))


def _single_seat(threads: int | None, processes: int = 1) -> Seat:
    """Return the seat of the only worker: all that the process sees."""
    return Seat(_threads(threads), processes)


def _cpu_seats(
    count: int, threads: int | None, processes: int, environment: Mapping[str, str]
) -> list[Seat]:
    """Share the cores; a single worker keeps torch's own number of threads, which changes bits."""
    if count == processes == 1:
        return [_single_seat(threads)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    each = threads or max(1, (cores or 1) // (count * processes))
    if count == 1:
        return [_single_seat(each, processes)]
    return [
        Seat(_named(f"CPU {number}", environment) | _threads(each), processes)
        for number in range(count)
    ]


def _threads(threads: int | None) -> dict[str, str]:
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}


def _named(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Name a worker; one of a machine that has a name in the sweep, such as `task 3`, after it."""
    return {WORKER: f"{environment.get(WORKER, '')} {name}".strip()}
