"""Which runs of a grid can be trained together over one base, and why the others go alone.

It looks at the composed settings, and at the number of processes, only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from finetune import distributed
from finetune.config import Config

MOST_TOGETHER = 8
CHANGE_THE_BASE = ("pissa", "olora")  # initialisations that take their part out of the base
NEUTRAL = ("seed", "data_seed", "checkpoint_every", "keep_checkpoints")
# Those that know nothing of a model but the parameters that they are given.
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit",
    "paged_adamw_32bit", "sgd",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Places in the grid that are trained together; a group of one says why it is alone."""

    places: list[int]
    reason: str | None = None


def find_obstacle(config: Config) -> str | None:
    """Return why a run cannot take part in a common step; None where it can.

    Its model's quantization is the setting, or, where it is known, the checkpoint's own.
    """
    if distributed.is_launched():
        return f"{distributed.num_processes()} processes train it"
    if config.peft.method != "lora":
        return f"peft.method={config.peft.method} is no matrix pair on a layer's output"
    if config.lora.use_dora:
        return "lora.use_dora=true takes the norm of the base's own weights"
    if config.lora.init.startswith(CHANGE_THE_BASE):
        return f"lora.init={config.lora.init} changes the base's own weights"
    if config.model.quantization == "int8":
        return "an int8 base rounds by all tokens that share a step"
    if config.model.quantization == "gptq":
        return "a GPTQ base computes by kernels of its own, which may go by the tokens of a step"
    if config.optimizer.name not in OPTIMIZERS:
        return f"optimizer.name={config.optimizer.name} asks for the whole model"
    return None


def most_that_pay(config: Config) -> int:
    """Return how many adapters to train in one step where nobody says.

    Measured by benchmarks/training.py: small micro-batches leave a pass over the base short of
    work, large ones do not.
    """
    is_small = config.training.batch_size == 1 and not config.training.sequence_packing
    return MOST_TOGETHER if is_small else 1


def find_groups(configs: Sequence[Config], most: Sequence[int]) -> list[Group]:
    """Put runs that differ in nothing but their adapters together, in the grid's order.

    Args:
        configs: the composed jobs.
        most: for each, how many may share its step (by memory, setting, or what pays).
    """
    shared: dict[str, list[int]] = {}
    groups: list[Group] = []
    for place, config in enumerate(configs):
        obstacle = find_obstacle(config)
        if obstacle is not None:
            groups.append(Group([place], obstacle))
        elif most[place] < 2:
            groups.append(Group([place]))
        else:
            shared.setdefault(_shared_settings(config), []).append(place)
    for places in shared.values():
        size = min(most[place] for place in places)
        groups += [
            Group(part, None if len(part) > 1 else "no other run shares its base, rows and batches")
            for part in (places[start : start + size] for start in range(0, len(places), size))
        ]
    return sorted(groups, key=lambda group: group.places[0])


def _shared_settings(config: Config) -> str:
    """Return all that runs of one group have in common, as text."""
    training = asdict(config.training)
    data_seed = config.training.data_seed
    order = config.training.seed if data_seed is None else data_seed
    return json.dumps(
        {
            "model": asdict(config.model),
            "data": asdict(config.data),
            "training": {name: training[name] for name in training if name not in NEUTRAL},
            "order": order,
        },
        sort_keys=True,
    )
