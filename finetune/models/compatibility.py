"""Where releases of a library differ within the ranges of pyproject.toml, bridged in one place.

transformers 5.22 renamed gradient checkpointing to activation checkpointing, and 5.24
`past_key_values` to `cache`; huggingface_hub 2 moved from httpx to its successor httpx2.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from functools import partial
from inspect import signature
from typing import NamedTuple

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel, TrainingArguments

_RENAMED = any(one.name == "activation_checkpointing" for one in fields(TrainingArguments))

# The option of TrainingArguments that recomputes activations in the backward pass.
CHECKPOINTING = "activation_checkpointing" if _RENAMED else "gradient_checkpointing"

# What the hub's requests raise when no answer comes: the base of its own error, httpx's HTTPError.
HTTPError: type[Exception] = next(
    one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError"
)
InvalidURL: type[Exception] = sys.modules[HTTPError.__module__.partition(".")[0]].InvalidURL

# Grouped-query attention: torch 2.11 and 2.12 detect it, later releases need `enable_gqa`.
_varlen = (
    partial(varlen_attn, enable_gqa=True)
    if "enable_gqa" in signature(varlen_attn).parameters
    else varlen_attn
)


class Sequences(NamedTuple):
    """Concatenated sequences: their cumulative lengths from 0 on (`cu_seqlens`), int32."""

    queries: torch.Tensor
    keys: torch.Tensor
    most_queries: int  # tokens that no sequence exceeds
    most_keys: int


def attend_by_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    scale: float | None,
) -> torch.Tensor:
    """Attend causally within each of several concatenated sequences, by one kernel.

    Args:
        query: [token, head, feature]; key and value may have fewer heads.
        key: as the query, or with more tokens: a sequence's queries are its last ones.
        value: as the key.
        sequences: where each begins and ends.
        scale: of the scores; None takes the usual one.
    """
    attended = _varlen(query, key, value, *sequences, scale=scale, window_size=(-1, 0))
    assert isinstance(attended, torch.Tensor)
    return attended


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name under which a model takes its cache: `past_key_values` before 5.24."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Return whether gradient checkpointing is enabled."""
    return bool(getattr(model, f"is_{CHECKPOINTING}"))


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing, non-reentrant as PyTorch recommends.

    The base has no dropout of its own: no random state needs to be kept for the second pass.
    """
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False, "preserve_rng_state": False})


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Disable gradient checkpointing, and remove its hook from the embedding."""
    getattr(model, f"{CHECKPOINTING}_disable")()
    model.disable_input_require_grads()
