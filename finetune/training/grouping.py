"""Which runs of a grid can be trained together over one base, and why the others go alone.

It looks at the composed settings, and at the number of processes, only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from finetune import distributed
from finetune.config.methods import METHODS, changes_base
from finetune.config.optimizers import OPTIMIZERS
from finetune.config.schema import OWN, Config, marked

MOST_TOGETHER = 8


@dataclass(frozen=True)
class Group:
    """Places in the grid that are trained together; a group of one says why it is alone."""

    indices: list[int]
    reason: str | None = None


@dataclass(frozen=True)
class Limit:
    """How many runs may share a step, and what keeps it from being more."""

    most: int
    reason: str


NOT_TRAINED = Limit(1, "it has no step to take")


def find_obstacle(config: Config) -> str | None:
    """Return why a run cannot take part in a common step; None where it can.

    Its model's quantization is the setting, or, where it is known, the checkpoint's own.
    """
    if distributed.is_launched():
        return f"{distributed.num_processes()} processes train it"
    if not METHODS[config.peft.method].shares_step:
        return f"peft.method={config.peft.method} cannot be trained together; only LoRA can"
    if config.lora.use_dora:
        return "lora.use_dora=true takes the norm of the base's own weights"
    if changes_base(config.lora.init):
        return f"lora.init={config.lora.init} changes the base's own weights"
    if config.model.quantization == "int8":
        return "an int8 base rounds by all tokens that share a step"
    if config.model.quantization == "gptq":
        return "a GPTQ base computes by kernels of its own, which may go by the tokens of a step"
    if not OPTIMIZERS[config.optimizer.name].can_share_step:
        return f"optimizer.name={config.optimizer.name} asks for the whole model"
    return None


def find_limit(config: Config) -> Limit:
    """Return how many adapters to train in one step: as the sweep says, else as many as pay.

    Measured by benchmarks/training.py: small micro-batches leave a pass over the base short of
    work, large ones do not.
    """
    asked, training = config.sweep.max_concurrent_adapters, config.training
    if asked is not None:
        return Limit(asked, f"sweep.max_concurrent_adapters={asked}")
    if training.sequence_packing:
        return Limit(1, "packed rows leave nothing to gain by sharing a step")
    if training.batch_size > 1:
        size = training.batch_size
        return Limit(1, f"training.batch_size={size} leaves nothing to gain by sharing a step")
    return Limit(MOST_TOGETHER, f"more than {MOST_TOGETHER} gain no more")


def find_groups(configs: Sequence[Config], limits: Sequence[Limit]) -> list[Group]:
    """Put runs that differ in nothing but their adapters together, in the grid's order.

    Args:
        configs: the composed jobs.
        limits: for each, how many may share its step.
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


def _cut(indices: list[int], limit: Limit) -> list[Group]:
    """Cut indices into as few groups as can be, and those into sizes as even as can be."""
    if len(indices) == 1:
        return [Group(indices, "no other run shares its base, rows and batches")]
    count = -(-len(indices) // limit.most)
    bounds = [len(indices) * number // count for number in range(count + 1)]
    return [
        Group(indices[start:end], limit.reason if end - start == 1 else None)
        for start, end in pairwise(bounds)
    ]


def _shared_settings(config: Config) -> str:
    """Return all that runs of one group have in common, as text."""
    training = asdict(config.training)
    own = marked(config.training, OWN)
    return json.dumps(
        {
            "model": asdict(config.model),
            "data": asdict(config.data),
            "training": {name: training[name] for name in training if name not in own},
            "order": config.training.order_seed,
        },
        sort_keys=True,
    )
