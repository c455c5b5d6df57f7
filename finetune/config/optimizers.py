"""Optimizers by transformers' names: a table row each (state size, package, restrictions).

torch is only imported to check for a GPU. The Trainer
builds an optimizer by its name (`Trainer.get_optimizer_cls_and_kwargs`), also for our own loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from finetune.config.schema import OptimizerConfig
from finetune.problems import nearest

REMEDY = "use optimizer.name=adamw_torch"
PROJECTED = "needs optim_target_modules, for which there is no setting"


@dataclass(frozen=True)
class Package:
    """The package of an optimizer: its module, and its name on PyPI."""

    module: str
    name: str


BITSANDBYTES = Package("bitsandbytes", "bitsandbytes")
TORCHAO = Package("torchao", "torchao")
LOMO = Package("lomo_optim", "lomo-optim")
SCHEDULE_FREE = Package("schedulefree", "schedulefree")


@dataclass(frozen=True)
class Optimizer:
    """A row: an optimizer's state size, package, and where it can be used.

    `can_shard` is for those that work on FSDP2's DTensors: they neither read a parameter's memory
    nor mix its shards with full tensors. `can_share_step` is for those that use nothing of a model
    but its trained parameters, so that each adapter can have one.
    """

    name: str
    state_bytes: float  # for each parameter, beside its gradient
    package: Package | None = None  # None: torch's or transformers' own
    is_paged: bool = False  # its state is paged to host memory on a GPU
    can_share_step: bool = False  # for several adapters trained together, one each
    can_shard: bool = False  # works under FSDP
    needs_cuda: bool = False
    problem: str | None = None  # why it cannot be used here

    def resident_bytes(self, device: str) -> float:
        """Return the state's bytes for each parameter in the memory of a device, cpu or cuda."""
        return 0.0 if self.is_paged and device == "cuda" else self.state_bytes


def _bitsandbytes(
    name: str, state_bytes: float, *, is_paged: bool = False, can_share_step: bool = False
) -> Optimizer:
    return Optimizer(
        name, state_bytes, BITSANDBYTES, is_paged=is_paged, can_share_step=can_share_step
    )


def _unsupported(name: str, problem: str) -> Optimizer:
    return Optimizer(name, 8.0, problem=problem)


OPTIMIZERS = {
    row.name: row
    for row in (
        Optimizer("adamw_torch", 8.0, can_share_step=True, can_shard=True),
        Optimizer("adamw_torch_fused", 8.0, can_share_step=True, can_shard=True),
        Optimizer("sgd", 0.0, can_share_step=True, can_shard=True),
        Optimizer("adafactor", 0.1),  # rows and columns of a matrix
        Optimizer("adagrad", 4.0),
        Optimizer("rmsprop", 4.0),
        _bitsandbytes("adamw_8bit", 2.0, can_share_step=True),
        _bitsandbytes("adamw_bnb_8bit", 2.0, can_share_step=True),
        _bitsandbytes("paged_adamw_8bit", 2.0, is_paged=True, can_share_step=True),
        _bitsandbytes("paged_adamw_32bit", 8.0, is_paged=True, can_share_step=True),
        _bitsandbytes("ademamix", 12.0),
        _bitsandbytes("ademamix_8bit", 3.0),
        _bitsandbytes("paged_ademamix_32bit", 12.0, is_paged=True),
        _bitsandbytes("paged_ademamix_8bit", 3.0, is_paged=True),
        _bitsandbytes("lion_32bit", 4.0),
        _bitsandbytes("lion_8bit", 1.0),
        _bitsandbytes("paged_lion_32bit", 4.0, is_paged=True),
        _bitsandbytes("paged_lion_8bit", 1.0, is_paged=True),
        _bitsandbytes("rmsprop_bnb", 4.0),
        _bitsandbytes("rmsprop_bnb_32bit", 4.0),
        _bitsandbytes("rmsprop_bnb_8bit", 1.0),
        Optimizer("adamw_torch_8bit", 2.0, TORCHAO),
        Optimizer("adamw_torch_4bit", 1.0, TORCHAO),
        Optimizer("lomo", 0.0, LOMO),
        Optimizer("adalomo", 0.1, LOMO, needs_cuda=True),  # its package allocates on the GPU
        Optimizer("grokadamw", 12.0, Package("grokadamw", "grokadamw")),
        Optimizer("schedule_free_radam", 8.0, SCHEDULE_FREE),
        Optimizer("schedule_free_adamw", 8.0, SCHEDULE_FREE),
        Optimizer("schedule_free_sgd", 4.0, SCHEDULE_FREE),
        Optimizer("stable_adamw", 8.0, Package("optimi", "torch-optimi")),
        *(
            _unsupported(name, PROJECTED)
            for name in (
                "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
                "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
                "apollo_adamw", "apollo_adamw_layerwise",
            )
        ),
        _unsupported(
            "adamw_anyprecision", "needs torchdistx, which is neither on PyPI nor maintained"
        ),
        _unsupported("adamw_torch_xla", "is for TPUs, and training.device is cuda or cpu"),
        _unsupported(
            "adamw_torch_npu_fused", "is for Ascend NPUs, and training.device is cuda or cpu"
        ),
    )
}  # fmt: skip


def find_optimizer_problems(optimizer: OptimizerConfig) -> list[str]:
    """Return why the optimizer cannot be used on this machine, with the remedy."""
    row = OPTIMIZERS.get(optimizer.name)
    if row is None:
        return [f"optimizer.name is {optimizer.name!r}; {nearest(optimizer.name, supported())}"]
    if row.problem is not None:
        return [f"optimizer.name={row.name} {row.problem}; {REMEDY}"]
    if row.package is not None and find_spec(row.package.module) is None:
        package = row.package.name
        return [
            f"optimizer.name={row.name} needs the package {package}; pip install {package}, or "
            f"{REMEDY}"
        ]
    if row.needs_cuda and not _has_cuda():
        return [f"optimizer.name={row.name} needs a CUDA device; {REMEDY}"]
    return []


def supported() -> list[str]:
    """Return the names of the optimizers that can be used."""
    return [name for name, row in OPTIMIZERS.items() if row.problem is None]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
