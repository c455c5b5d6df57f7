"""A model's attention: its window, whether another can take its place, and one that has fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from finetune.models.adapters import base_of
from finetune.models.kernels import FLASH, FLASH_DTYPES

ATTENTIONS = ("sdpa", "eager", *FLASH)  # whose place another one can take for a while


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Return how many tokens back the shortest-sighted layer attends; None where all see all."""
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
    """Return why a model's attention cannot be cut into blocks; None leaves it to the check.

    Args:
        model: the model.
        longest: tokens of the longest sequence.
    """
    base = base_of(model)
    settings = base.config.get_text_config().to_dict()
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else []
    if any(adapter.is_prompt_learning for adapter in adapters):
        return "the adapter is learned prompts"
    if settings.get("alibi") or settings["model_type"] in ("bloom", "mpt"):
        return "its positions are ALiBi's, which follow the place in the row"
    layers = set(settings.get("layer_types") or ())
    unsuited = layers - {"full_attention", "sliding_attention", "chunked_attention"}
    if unsuited:
        return f"it has layers of {', '.join(sorted(unsuited))}"
    window = sliding_window(base.config)
    if window is not None and longest > window:
        return f"its attention window of {window} is shorter than the longest {longest} tokens"
    attention = base.config._attn_implementation
    return None if attention in ATTENTIONS else f"its attention is {attention}"


@contextmanager
def attention_in(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> Iterator[None]:
    """Let a model attend in another dtype: by sdpa where its own is flash, which has no fp32."""
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
