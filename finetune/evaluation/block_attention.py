"""Block-sparse attention over a prefix tree of token sequences.

A model calls the function that its `attn_implementation` names, which is this one during a forward
pass. It needs no mask over all tokens, and computes nothing between blocks.

Axes: head, token = index in the tree, feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

from finetune.evaluation.prefix_tree import Block, Tree, build_blocks
from finetune.models.adapters import base_of
from finetune.models.attention import (
    attention_replaced,
    fits_varlen,
    has_varlen,
    refuse_arguments,
)
from finetune.models.compatibility import Sequences, attend_by_varlen
from finetune.models.kernels import FLASH_DTYPES

BLOCK_TOKENS = {"cpu": 64, "cuda": 512}  # smaller ones waste less, larger ones launch less
MOST_REPEATED = 8  # keys a token, up to which each chain gets its own copy of its path
NAME = "finetune_blocks"


class BlockAttention:
    """Attention by the blocks of a tree, which replaces a model's own while it is installed."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self._base = base_of(model)
        self._tree: Tree | None = None
        self._blocks: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
        self._hidden: torch.Tensor | None = None  # [token, key] of a step, in place of blocks
        self._chains: tuple[torch.Tensor, Sequences] | None = None  # keys, where one kernel fits

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the model's attention while the context lasts."""
        try:
            with attention_replaced(self._base, NAME, self._attend):
                yield
        finally:
            self._tree, self._blocks, self._hidden, self._chains = None, [], None, None

    def lay_out(self, tree: Tree) -> None:
        """Set the tree of the next forward pass."""
        device = self._base.device
        self._tree, self._blocks, self._hidden, self._chains = tree, [], None, None
        if has_varlen(device) and self._base.dtype in FLASH_DTYPES:
            self._chains = _find_chains(tree, device)

    def _find_blocks(self) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Return the tree's blocks, built once a forward pass: place, keys and mask of each."""
        if not self._blocks:
            assert self._tree is not None
            size = BLOCK_TOKENS[self._base.device.type]
            self._blocks = [self._lay_out_block(block) for block in build_blocks(self._tree, size)]
        return self._blocks

    def _lay_out_block(self, block: Block) -> tuple[slice, torch.Tensor, torch.Tensor]:
        device = self._base.device
        keys = torch.tensor([*block.path, *range(block.start, block.end)], device=device)
        hidden = self._mask(torch.from_numpy(block.visible).to(device))
        return slice(block.start, block.end), keys, hidden

    def lay_out_step(self, visible: torch.Tensor) -> None:
        """Set the cached keys that each token of the next pass sees, itself too: [token, key]."""
        self._hidden, self._chains = self._mask(visible), None

    def _mask(self, visible: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(visible.shape, dtype=self._base.dtype, device=visible.device)
        return hidden.masked_fill_(~visible, -torch.inf)

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend [1, head, token, feature] block by block; return [1, token, head, feature]."""
        refuse_arguments(more, ("s_aux", "position_bias"))
        repeats = query.shape[1] // key.shape[1]
        if self._chains is not None and softcap is None and fits_varlen(query, value):
            keys, sequences = self._chains
            q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
            return attend_by_varlen(q, k[keys], v[keys], sequences, scaling)[None], None
        if self._hidden is not None:
            return _attend_step(query, key, value, self._hidden, (scaling, softcap)), None
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        parts = []
        for place, keys, hidden in self._find_blocks():
            k, v = key.index_select(2, keys), value.index_select(2, keys)
            parts.append(_scaled_attention(query[:, :, place], k, v, hidden, (scaling, softcap)))
        return torch.cat(parts, dim=2).transpose(1, 2), None


def _find_chains(tree: Tree, device: torch.device) -> tuple[torch.Tensor, Sequences] | None:
    """Return each chain's keys, its path and itself, and their bounds; None for too many keys."""
    lengths = [chain.end - chain.start for chain in tree.chains]
    seen = [len(chain.path) + length for chain, length in zip(tree.chains, lengths, strict=True)]
    if sum(seen) > MOST_REPEATED * len(tree.tokens):
        return None
    keys = [at for chain in tree.chains for at in (*chain.path, *range(chain.start, chain.end))]
    queries, ends = (
        torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device)
        for each in (lengths, seen)
    )
    return torch.tensor(keys, device=device), Sequences(queries, ends, max(lengths), max(seen))


Scale = tuple[float | None, float | None]  # of the scores, and their cap


def _attend_step(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, scale: Scale
) -> torch.Tensor:
    """Attend to all keys of a cache; return [1, token, head, feature].

    Queries of the heads that share keys (GQA) are attended as more tokens: no key is repeated.
    """
    _, heads, tokens, width = query.shape
    repeats = heads // key.shape[1]
    packed = query.reshape(1, key.shape[1], repeats * tokens, width)
    part = _scaled_attention(packed, key, value, hidden.repeat(repeats, 1), scale)
    return part.reshape(1, heads, tokens, part.shape[-1]).transpose(1, 2)


def _scaled_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, scale: Scale
) -> torch.Tensor:
    scaling, softcap = scale
    if softcap is not None:
        return _capped_attention(query, key, value, hidden, scaling, softcap)
    mask = hidden.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attend with soft-capped scores (Gemma 2, arXiv:2408.00118), which SDPA has no name for."""
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap + hidden
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
