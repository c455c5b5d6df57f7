"""Per-sequence causal attention over concatenated sequences (padding-free batches).

No padding and no mask over the batch: attention is computed within each sequence. Flash attention
does so by itself, where position ids restart at 0.

Axes: head, token = index in the concatenated batch, feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

from finetune.models.adapters import base_of
from finetune.models.attention import (
    attention_replaced,
    find_obstacle,
    fits_varlen,
    has_varlen,
    refuse_arguments,
)
from finetune.models.compatibility import Sequences, attend_by_varlen
from finetune.models.kernels import FLASH

NAME = "finetune_sequences"
CHECKED_TOKENS = 64  # of each sequence that is used to check a model
# Relative difference of logits; attention to another sequence's tokens makes it some tenths.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


class SequenceAttention:
    """Per-sequence attention, which replaces a model's own while it is installed."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._bounds: list[int] = []
        self._longest = 0
        self._on_device: torch.Tensor | None = None  # the bounds, where one kernel takes them all
        self._is_recorded = False  # as a CUDA graph, which only that one kernel can be

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the model's attention while the context lasts."""
        if self._base.config._attn_implementation in FLASH:
            yield  # transformers finds the sequences by their positions
            return
        try:
            with attention_replaced(self._base, NAME, self._attend):
                yield
        finally:
            torch.use_deterministic_algorithms(False)  # where a backward pass broke off

    def lay_out(self, bounds: Sequence[int]) -> None:
        """Set the sequences of the next batch by their cumulative lengths, from 0 on."""
        self._bounds, self._is_recorded = list(bounds), False
        self._longest = max(end - start for start, end in pairwise(bounds))
        self._on_device = (
            torch.tensor(self._bounds, dtype=torch.int32, device=self._base.device)
            if has_varlen(self._base.device)
            else None
        )

    def lay_out_on_device(self, bounds: torch.Tensor, longest: int) -> None:
        """Set the sequences of passes that are recorded: their bounds may change between replays.

        Args:
            bounds: the cumulative lengths, int32 on the device; equal ones hold no token.
            longest: tokens that no sequence exceeds.
        """
        self._on_device, self._longest, self._is_recorded = bounds, longest, True

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend [1, head, token, feature] in each sequence; return [1, token, head, feature]."""
        refuse_arguments(more, ("s_aux", "position_bias", "softcap"))
        attend = partial(self._each, scaling=scaling, dropout=dropout)
        if self._on_device is not None and dropout == 0.0 and fits_varlen(query, value):
            attend = partial(self._at_once, scaling=scaling)
        elif self._is_recorded:
            raise ValueError("the attention is not PyTorch's flash attention")
        return attend(query, key, value), None

    def _at_once(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
    ) -> torch.Tensor:
        """Attend by one kernel for all sequences."""
        assert self._on_device is not None
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        bounds, longest = self._on_device, self._longest
        attended = attend_by_varlen(q, k, v, Sequences(bounds, bounds, longest, longest), scaling)
        return _make_deterministic(attended)[None]

    def _each(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """Attend in one sequence after the other."""
        parts = [
            _make_deterministic(
                F.scaled_dot_product_attention(
                    query[:, :, start:end],
                    key[:, :, start:end],
                    value[:, :, start:end],
                    dropout_p=dropout,
                    is_causal=True,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
            for start, end in pairwise(self._bounds)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _make_deterministic(attended: torch.Tensor) -> torch.Tensor:
    """Make the backward pass of an attention deterministic.

    PyTorch's flash and memory-efficient attention have deterministic kernels, which they use under
    `use_deterministic_algorithms`. Under it other operations of some models would fail, so it is
    enabled for this backward pass only.
    """
    node = attended.grad_fn
    is_wanted = attended.is_cuda and not torch.are_deterministic_algorithms_enabled()
    if node is not None and is_wanted:
        node.register_prehook(lambda _: torch.use_deterministic_algorithms(True))
        node.register_hook(lambda *_: torch.use_deterministic_algorithms(False))
    return attended


def positions(bounds: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the position of each token in its own sequence, [1, token]."""
    return torch.cat([torch.arange(b - a, device=device) for a, b in pairwise(bounds)])[None]


def find_layout_problem(
    model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]]
) -> str | None:
    """Return why batches must be padded; None where sequences can be concatenated.

    The logits of the longest row after the shortest are compared with those of the longest alone.

    Args:
        model: the model, in evaluation mode.
        rows: the tokens of all sequences that it will see; at least one.
    """
    obstacle, base = find_obstacle(model, max(map(len, rows))), base_of(model)
    if obstacle is not None:
        return obstacle
    ordered = sorted(rows, key=len)
    first, last = list(ordered[0][:CHECKED_TOKENS]), list(ordered[-1][:CHECKED_TOKENS])
    attention, bounds = SequenceAttention(base), [0, len(first), len(first) + len(last)]
    ids = torch.tensor([first + last], device=base.device)
    attention.lay_out(bounds)
    with torch.no_grad():
        alone = base(input_ids=ids[:, bounds[1] :], use_cache=False).logits[0].float()
        try:
            with attention.installed():
                together = base(
                    input_ids=ids, position_ids=positions(bounds, base.device), use_cache=False
                ).logits[0, bounds[1] :]
        except (ValueError, RuntimeError, TypeError) as error:
            return f"the model cannot take concatenated sequences ({str(error).splitlines()[0]})"
    difference = ((together.float() - alone).norm() / alone.norm()).item()
    if not difference <= TOLERANCE[base.dtype]:
        return f"the model's logits differ by {difference:.2g} when sequences are concatenated"
    return None
