"""Groups of runs to be trained together over one base, and why others are trained separately.

Only the composed settings and the number of processes decide.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from finetune import distributed
from finetune.config.methods import METHODS, changes_base
from finetune.config.optimizers import OPTIMIZERS
from finetune.config.schema import PER_RUN, Config, marked

MOST_TOGETHER = 8


@dataclass(frozen=True)
class Group:
    """Indices of jobs that are trained together; of one that is not, the reason."""

    indices: list[int]
    reason: str | None = None


@dataclass(frozen=True)
class Limit:
    """The most runs that may be trained together, and the reason for this limit."""

    most: int
    reason: str


NOT_TRAINED = Limit(1, "training=none takes no step")


def find_obstacle(config: Config) -> str | None:
    """Return why a run cannot be trained together with others; None where it can.

    Its `model.quantization` is the setting, or, where it is known, the checkpoint's own.
    """
    if distributed.is_launched():
        return f"{distributed.num_processes()} processes train each run"
    if not METHODS[config.peft.method].shares_step:
        return f"peft.method={config.peft.method}: only plain LoRA adapters can be trained together"
    if config.lora.use_dora:
        return "lora.use_dora=true: only plain LoRA adapters can be trained together"
    if changes_base(config.lora.init):
        return f"lora.init={config.lora.init} changes the base's weights, which the runs share"
    if config.model.quantization == "int8":
        return (
            "model.quantization is int8, which scales activations per batch, so that results would "
            "depend on the other runs"
        )
    if config.model.quantization == "gptq":
        return (
            "model.quantization is gptq, whose kernels may give different results for different "
            "batch sizes"
        )
    if not OPTIMIZERS[config.optimizer.name].can_share_step:
        return f"optimizer.name={config.optimizer.name} is not supported for runs trained together"
    return None


def find_limit(config: Config) -> Limit:
    """Return how many adapters to train together: as the sweep says, else as long as it is faster.

    Measured by benchmarks/training.py: small micro-batches leave a pass over the base short of
    work, large ones do not.
    """
    limit, training = config.sweep.max_concurrent_adapters, config.training
    if limit is not None:
        return Limit(limit, f"sweep.max_concurrent_adapters={limit}")
    if training.sequence_packing:
        return Limit(1, "training.sequence_packing=true: training together is not faster")
    if training.batch_size > 1:
        size = training.batch_size
        return Limit(1, f"training.batch_size={size}: training together is not faster")
    return Limit(MOST_TOGETHER, f"more than {MOST_TOGETHER} runs together are not faster")


def find_groups(configs: Sequence[Config], limits: Sequence[Limit]) -> list[Group]:
    """Group runs that differ in nothing but their adapters, in the grid's order.

    Args:
        configs: the composed jobs.
        limits: of each, how many may be trained together.
    """
    shared: dict[str, list[int]] = {}
    groups: list[Group] = []
    for index, config in enumerate(configs):
        obstacle = find_obstacle(config)
        if obstacle is not None:
            groups.append(Group([index], obstacle))
        elif limits[index].most < 2:
            groups.append(Group([index], limits[index].reason))
        else:
            shared.setdefault(_shared_settings(config), []).append(index)
    for indices in shared.values():
        groups += _cut(indices, min((limits[index] for index in indices), key=lambda one: one.most))
    return sorted(groups, key=lambda group: group.indices[0])


def share_groups(groups: Sequence[Group], num_workers: int) -> list[Group]:
    """Halve the largest groups until there is work for all workers to the end.

    Args:
        groups: as `find_groups` returns them.
        num_workers: that take a group each.
    """
    shared = list(groups)
    while len(shared) % num_workers:
        largest = max(shared, key=lambda group: len(group.indices))
        size = len(largest.indices)
        if size == 1:
            break
        shared.remove(largest)
        for part in (largest.indices[: size // 2], largest.indices[size // 2 :]):
            alone = f"divided among {num_workers} workers" if len(part) == 1 else None
            shared.append(Group(part, alone))
    return sorted(shared, key=lambda group: group.indices[0])


def _cut(indices: list[int], limit: Limit) -> list[Group]:
    """Cut indices into as few groups as can be, and those into sizes as even as can be."""
    if len(indices) == 1:
        return [Group(indices, "no other run has the same base, data and batches")]
    count = -(-len(indices) // limit.most)
    bounds = [len(indices) * number // count for number in range(count + 1)]
    return [
        Group(indices[start:end], limit.reason if end - start == 1 else None)
        for start, end in pairwise(bounds)
    ]


def _shared_settings(config: Config) -> str:
    """Return the settings that runs of one group share, as JSON."""
    training = asdict(config.training)
    own = marked(config.training, PER_RUN)
    return json.dumps(
        {
            "model": asdict(config.model),
            "data": asdict(config.data),
            "training": {name: training[name] for name in training if name not in own},
            "order": config.training.order_seed,
        },
        sort_keys=True,
    )
