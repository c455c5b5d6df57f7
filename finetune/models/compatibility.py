"""Where releases of a library differ within the ranges of pyproject.toml, bridged in one place.

transformers 5.22 renamed gradient checkpointing to activation checkpointing; huggingface_hub 2
moved from httpx to its successor httpx2.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from functools import partial
from inspect import signature

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel, TrainingArguments

_RENAMED = any(one.name == "activation_checkpointing" for one in fields(TrainingArguments))

# The option of TrainingArguments that computes activations anew in the backward pass.
CHECKPOINTING = "activation_checkpointing" if _RENAMED else "gradient_checkpointing"

# What the hub's requests raise when no answer comes: the base of its own error, httpx's HTTPError.
HTTPError: type[Exception] = next(
    one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError"
)
InvalidURL: type[Exception] = sys.modules[HTTPError.__module__.partition(".")[0]].InvalidURL

# Heads that share keys: torch 2.11 and 2.12 see them, later ones want to be told.
_varlen = (
    partial(varlen_attn, enable_gqa=True)
    if "enable_gqa" in signature(varlen_attn).parameters
    else varlen_attn
)


def attend_by_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float | None,
) -> torch.Tensor:
    """Attend causally in each of the sequences that lie end to end, by one kernel.

    Args:
        query: [token, head, feature]; key and value may have fewer heads.
        key: as the query.
        value: as the query.
        bounds: where each sequence begins, and where the last ends, int32.
        longest: tokens of the longest sequence.
        scale: of the scores; None takes the usual one.
    """
    attended = _varlen(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0)
    )
    assert isinstance(attended, torch.Tensor)
    return attended


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Return whether the model computes activations anew in the backward pass."""
    return bool(getattr(model, f"is_{CHECKPOINTING}"))


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Compute activations anew in the backward pass, in the way that PyTorch recommends."""
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Keep activations again, and leave the embedding's output as it was."""
    getattr(model, f"{CHECKPOINTING}_disable")()
    model.disable_input_require_grads()
