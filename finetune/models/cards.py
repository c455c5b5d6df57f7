"""GPUs by name, their memory and compute capability: for estimates where the GPU is not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune.config.schema import Config
from finetune.models.devices import (
    OLDEST_BF16,
    OLDEST_CUDA_13,
    OLDEST_FLASH,
    OLDEST_INT8,
    OLDEST_TRITON,
    Capability,
    render,
)
from finetune.models.kernels import FLASH


@dataclass(frozen=True)
class Card:
    """A GPU, by the name that people know it by."""

    name: str
    gib: float  # as torch sees it, which is less than the name says
    capability: Capability

    def dtype(self, config: Config) -> str:
        """Return what the base computes in: auto is bf16 where the card has it, else fp16."""
        if config.model.dtype != "auto":
            return config.model.dtype
        return "bf16" if self.capability >= OLDEST_BF16 else "fp16"

    @property
    def build(self) -> str:
        """The builds of torch that have kernels for it."""
        return "CUDA 13 or 12" if self.capability >= OLDEST_CUDA_13 else "CUDA 12.6"


CARDS = (
    Card("P100 16 GB", 15.9, (6, 0)),
    Card("T4 16 GB", 14.7, (7, 5)),
    Card("L4 24 GB", 22.0, (8, 9)),
    Card("A10 24 GB", 22.0, (8, 6)),
    Card("RTX 4090 24 GB", 23.5, (8, 9)),
    Card("A100 40 GB", 39.4, (8, 0)),
    Card("A100 80 GB", 79.1, (8, 0)),
    Card("H100 80 GB", 79.1, (9, 0)),
)


def find_card_problems(config: Config, card: Card) -> Iterator[str]:
    """Yield the settings that need a newer card, with the remedy."""
    precision = config.training.precision
    if card.capability < OLDEST_BF16 and "bf16" in (config.model.dtype, precision):
        key = "model.dtype" if config.model.dtype == "bf16" else "training.precision"
        yield f"{key} is bf16, which needs an Ampere GPU or newer; set {key}=fp16"
    if config.model.quantization == "int8" and card.capability < OLDEST_INT8:
        yield (
            f"model.quantization is int8, which needs compute capability {render(OLDEST_INT8)}; "
            "use an unquantised checkpoint and model.quantization=nf4"
        )
    attention = config.model.attn_implementation
    if attention in FLASH and card.capability < OLDEST_FLASH:
        yield (
            f"model.attn_implementation={attention} needs an Ampere GPU or newer; "
            "set model.attn_implementation=sdpa"
        )
    if config.training.use_liger_kernel and card.capability < OLDEST_TRITON:
        yield (
            f"training.use_liger_kernel=true needs compute capability {render(OLDEST_TRITON)} "
            "(Triton); set training.use_liger_kernel=false"
        )
