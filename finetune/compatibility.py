"""Where releases of a library differ within the ranges of pyproject.toml, bridged in one place.

transformers 5.22 renamed gradient checkpointing to activation checkpointing; huggingface_hub 2
moved from httpx to its successor httpx2.
"""

from __future__ import annotations

import sys
from dataclasses import fields

from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel, TrainingArguments

_RENAMED = any(one.name == "activation_checkpointing" for one in fields(TrainingArguments))

# The option of TrainingArguments that computes activations anew in the backward pass.
CHECKPOINTING = "activation_checkpointing" if _RENAMED else "gradient_checkpointing"

# What the hub's requests raise when no answer comes: the base of its own error, httpx's HTTPError.
HTTPError: type[Exception] = next(
    one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError"
)
InvalidURL: type[Exception] = sys.modules[HTTPError.__module__.partition(".")[0]].InvalidURL


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
