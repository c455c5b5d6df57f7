"""Optional CUDA kernels: flash attention, and Liger's norms, rotary positions and MLPs.

What is missing for them is refused before a weight is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from finetune.config.schema import ModelConfig
from finetune.models.devices import OLDEST_FLASH, OLDEST_TRITON, Capability, render

# Implementation -> the module that it is imported as, the package that brings it.
FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
FLASH_DTYPES = (torch.float16, torch.bfloat16)


def find_flash_problems(
    model: ModelConfig, meta: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Return why flash attention cannot be used, with the remedy."""
    if model.attn_implementation not in FLASH:
        return []
    module, package = FLASH[model.attn_implementation]
    if device.type != "cuda":
        why = "needs a CUDA device"
    elif find_spec(module) is None:
        why = f"needs the package {package} (pip install {package} --no-build-isolation)"
    elif torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST_FLASH:
        why = f"needs an Ampere GPU or newer, which {torch.cuda.get_device_name(device)} is not"
    elif dtype not in FLASH_DTYPES:
        why = "computes in bf16 or fp16 only, and model.dtype is fp32"
    elif not meta._supports_flash_attn:
        why = f"is not supported by transformers' {type(meta).__name__}"
    else:
        return []
    return [
        f"model.attn_implementation={model.attn_implementation} {why}; "
        "or set model.attn_implementation=sdpa"
    ]


def find_liger_problems(meta: PreTrainedModel, device: torch.device) -> list[str]:
    """Return why Liger's kernels cannot be used, with the remedy."""
    kind = meta.config.model_type
    if device.type != "cuda":
        why = "needs a CUDA device"
    elif find_spec("liger_kernel") is None:
        why = "needs the package liger-kernel (pip install liger-kernel)"
    elif torch.cuda.is_available() and (old := _capability_before(OLDEST_TRITON, device)):
        why = f"needs compute capability {render(OLDEST_TRITON)} (Triton), and the GPU has {old}"
    elif torch.cuda.is_available() and kind not in _liger_models():
        why = f"has no kernels for {kind} models"
    else:
        return []
    return [f"training.use_liger_kernel=true {why}; or set training.use_liger_kernel=false"]


def _capability_before(oldest: Capability, device: torch.device) -> str | None:
    """Return the GPU's compute capability where it is older."""
    found = torch.cuda.get_device_capability(device)
    return render(found) if found < oldest else None


def _liger_models() -> dict[str, object]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    known: dict[str, object] = MODEL_TYPE_TO_APPLY_LIGER_FN
    return known


@contextmanager
def liger_kernels(base: PreTrainedModel, *, wanted: bool) -> Iterator[None]:
    """Patch the base with Liger's kernels while the context lasts.

    Liger alters methods of the model's modules and, for the rotary positions, names in the module
    that defines it, which other models of this process share. Its cross-entropies are not used: our
    loss computes logits at label positions only, in chunks. TRL's own switch would leave the model
    patched, and is deprecated.
    """
    if not wanted:
        yield
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    altered = [vars(sys.modules[type(base).__module__]), *map(vars, base.modules())]
    before = [dict(names) for names in altered]
    with ExitStack() as stack:
        try:
            _apply_liger_kernel_to_instance(
                model=base, cross_entropy=False, fused_linear_cross_entropy=False
            )
        finally:
            for names, old in zip(altered, before, strict=True):
                changed = [n for n in names if n not in old or names[n] is not old[n]]
                stack.callback(_put_back, names, {n: old[n] for n in changed if n in old}, changed)
        yield


def _put_back(names: dict[str, Any], old: dict[str, Any], changed: list[str]) -> None:
    for name in changed:
        names.pop(name, None)
    names.update(old)
