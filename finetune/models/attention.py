"""Attention implementations: sliding windows, whether one can be replaced, and flash in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune.models.adapters import base_of
from finetune.models.devices import OLDEST_FLASH
from finetune.models.kernels import FLASH, FLASH_DTYPES

Attend = Callable[..., tuple[torch.Tensor, None]]  # as transformers calls it

WIDEST_HEAD = 256  # features, of flash attention
ATTENTIONS = ("sdpa", "eager", *FLASH)  # that can be replaced during a forward pass


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Return the smallest sliding window of the layers, in tokens; None for full attention."""
    settings = config.get_text_config().to_dict()
    layers = settings.get("layer_types")
    windows = []
    if settings.get("use_sliding_window", True) and (
        layers is None or "sliding_attention" in layers
    ):
        windows.append(settings.get("sliding_window"))
    if layers and "chunked_attention" in layers:
        windows.append(settings.get("attention_chunk_size"))
    return min((window for window in windows if window), default=None)


def find_obstacle(model: PreTrainedModel | PeftModel, longest: int) -> str | None:
    """Return why per-sequence attention cannot replace a model's own, as its config shows.

    None where it may: its logits are then compared.

    Args:
        model: the model.
        longest: tokens of the longest sequence.
    """
    base = base_of(model)
    settings = base.config.get_text_config().to_dict()
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else []
    if any(adapter.is_prompt_learning for adapter in adapters):
        return "the adapter prepends virtual tokens to each sequence"
    if settings.get("alibi") or settings["model_type"] in ("bloom", "mpt"):
        return "the model uses ALiBi, whose bias depends on the place in the row"
    layers = set(settings.get("layer_types") or ())
    unsuited = layers - {"full_attention", "sliding_attention", "chunked_attention"}
    if unsuited:
        return f"the model has layers of type {', '.join(sorted(unsuited))}"
    window = sliding_window(base.config)
    if window is not None and longest > window:
        return (
            f"the model's attention window of {window} tokens is shorter than the longest sequence "
            f"of {longest}"
        )
    attention = base.config._attn_implementation
    if attention in ATTENTIONS:
        return None
    return f"model.attn_implementation is {attention}, which cannot be replaced"


@contextmanager
def attention_replaced(base: PreTrainedModel, name: str, attend: Attend) -> Iterator[None]:
    """Let a model attend by a function, registered with transformers under a name meanwhile."""
    before = base.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[name] = attend
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[name]  # it would keep the base in memory


def refuse_arguments(arguments: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError where a model's attention uses an argument that a replacement has not."""
    for name in names:
        if arguments.get(name) is not None:
            raise ValueError(f"its attention uses {name}")


@contextmanager
def attention_in(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> Iterator[None]:
    """Attend by sdpa where a model of flash attention computes in fp32, which flash lacks."""
    base = base_of(model)
    before = base.config._attn_implementation
    if before not in FLASH or dtype in FLASH_DTYPES:
        yield
        return
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def has_varlen(device: torch.device) -> bool:
    """Return whether the device has PyTorch's flash attention, Ampere and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_FLASH


def fits_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether flash attention takes the dtype and the widths of a head."""
    width = query.shape[-1]
    is_even = width == value.shape[-1] and width % 8 == 0
    return query.dtype in FLASH_DTYPES and width <= WIDEST_HEAD and is_even
