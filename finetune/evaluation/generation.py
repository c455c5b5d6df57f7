"""Greedy generation in one row: the prompts are a prefix tree, each step adds a token to each.

A prefix of several prompts is computed and kept once. A prompt leaves as soon as its text holds a
stop string or ends, and with it its keys: the last ones to end go on without the others. There is
no padding.

Axes: prompt = still generating, key = token kept in the cache, head, feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, DynamicLayer

from finetune.evaluation.block_attention import BlockAttention
from finetune.evaluation.prefix_tree import Tokens, build_tree

SPARE_TOKENS = 512  # that a cache has room for when it grows
DEAD_SHARE = 0.25  # of the cache's keys, at which those of prompts that ended are removed


class Model(Protocol):
    """What is needed of a model: its passes, with this attention installed, and its tokenizer."""

    attention: BlockAttention

    def forward(
        self, tokens: list[int], positions: list[int], rows: Sequence[int], cache: Cache
    ) -> torch.Tensor: ...
    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True)
class Stop:
    """When a generation ends: at a token, with a text, or after a number of tokens."""

    eos: frozenset[int]
    texts: tuple[str, ...]
    most: int  # tokens

    def is_met(self, tokens: Sequence[int], model: Model) -> bool:
        """Return whether a generation has ended."""
        if len(tokens) >= self.most or tokens[-1] in self.eos:
            return True
        text = model.tok_decode(list(tokens), skip_special_tokens=False)  # one may be a stop string
        return any(stop in text for stop in self.texts)


@dataclass
class Generated:
    """The tokens after one prompt, their likelihood, and how near another one came to be chosen."""

    tokens: list[int] = field(default_factory=list)
    log_likelihood: float = 0.0  # of all tokens, in nats
    gap: float = torch.inf  # the smallest, in logits, between the best token and the second


class _Layer(DynamicLayer):
    """A cache layer that grows by more than it needs, so that a step copies no earlier key."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._size = 0
        self._kept = [states.new_empty((*states.shape[:2], 0, states.shape[3]))
                      for states in (key_states, value_states)]  # fmt: skip

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values [1, head, token, feature]; return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._size = self._size, self._size + key_states.shape[2]
        for place, states in enumerate((key_states, value_states)):
            if self._size > self._kept[place].shape[2]:
                self._kept[place] = self._grown(self._kept[place], start)
            self._kept[place][:, :, start : self._size] = states
        self.keys, self.values = (kept[:, :, : self._size] for kept in self._kept)
        return self.keys, self.values

    def _grown(self, kept: torch.Tensor, size: int) -> torch.Tensor:
        room = kept.new_empty((*kept.shape[:2], self._size + SPARE_TOKENS, kept.shape[3]))
        room[:, :, :size] = kept[:, :, :size]
        return room

    def select(self, places: torch.Tensor) -> None:
        """Keep the keys at some places only."""
        self._kept = [kept.index_select(2, places) for kept in self._kept]
        self._size = len(places)
        self.keys, self.values = self._kept


def generate(
    prompts: Sequence[Tokens],
    stop: Stop,
    model: Model,
    ended: Callable[[int], object] = lambda count: None,
) -> list[Generated]:
    """Generate greedily after each prompt.

    Args:
        prompts: different ones, in lexicographic order.
        stop: when each ends.
        model: computes and decodes.
        ended: called with how many have ended in a step.

    Raises:
        ValueError: the model has another kind of memory.
    """
    tree, cache = build_tree(prompts), Cache(layer_class_to_replicate=_Layer)
    found = [Generated() for _ in prompts]
    model.attention.lay_out(tree)
    logits = model.forward(tree.tokens, tree.positions, [path[-1] for path in tree.paths], cache)
    if cache.get_seq_length() != len(tree.tokens):
        raise ValueError("it does not keep the keys of all tokens")
    visible = torch.zeros(len(prompts), len(tree.tokens), dtype=torch.bool, device=logits.device)
    for number, path in enumerate(tree.paths):
        visible[number, path] = True
    alive = list(range(len(prompts)))
    while True:
        chosen = _choose(logits, [found[number] for number in alive])
        goes_on = [n for n, one in enumerate(alive) if not stop.is_met(found[one].tokens, model)]
        ended(len(alive) - len(goes_on))
        if not goes_on:
            return found
        if len(goes_on) < len(alive):
            alive, visible = [alive[n] for n in goes_on], visible[goes_on]
            visible = _without_dead(visible, cache)
        own = torch.eye(len(alive), dtype=torch.bool, device=visible.device)
        visible = torch.cat([visible, own], dim=1)
        model.attention.lay_out_step(visible)
        positions = [len(prompts[n]) + len(found[n].tokens) - 1 for n in alive]
        tokens = [chosen[n] for n in goes_on]
        logits = model.forward(tokens, positions, range(len(tokens)), cache)


def _choose(logits: torch.Tensor, found: Sequence[Generated]) -> list[int]:
    """Add the best token to each generation, the first of equal ones; return them."""
    values, _ = logits.topk(2, dim=-1)
    gaps = (values[:, 0] - values[:, 1]).tolist()
    chances = (values[:, 0].float() - logits.float().logsumexp(dim=-1)).tolist()
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    for one, token, chance, gap in zip(found, chosen, chances, gaps, strict=True):
        one.tokens.append(token)
        one.log_likelihood += chance
        one.gap = min(one.gap, gap)
    return chosen


def _without_dead(visible: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Remove the keys that no prompt sees any more, where they are many."""
    seen = visible.any(dim=0)
    if int((~seen).sum()) < DEAD_SHARE * len(seen):
        return visible
    places = seen.nonzero()[:, 0]
    for layer in cache.layers:
        assert isinstance(layer, _Layer), "it was made of such layers"
        layer.select(places)
    return visible[:, places]
