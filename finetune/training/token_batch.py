"""A micro-batch as lists: the tokens of its sequences one after the other, and what they predict.

Axes: token = place in the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.token_rows import IGNORED, Example, row_lengths


@dataclass(frozen=True)
class TokenBatch:
    """Concatenated sequences with the label that each position predicts, and its weight."""

    tokens: list[int]
    targets: list[int]  # IGNORED where a position predicts none
    weights: list[float]  # of the label; 0 where there is none
    bounds: list[int]  # the sequences' cumulative lengths, from 0 on

    @classmethod
    def of(cls, examples: Sequence[Example], weight: float) -> TokenBatch:
        """Concatenate examples whose labels all have one weight."""
        tokens: list[int] = []
        targets: list[int] = []
        bounds = [0]
        for example in examples:
            tokens += example["input_ids"]
            targets += [*example["labels"][1:], IGNORED]
            for length in row_lengths(example):
                bounds.append(bounds[-1] + length)
        weights = [0.0 if target == IGNORED else weight for target in targets]
        return cls(tokens, targets, weights, bounds)

    @classmethod
    def joined(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """Concatenate the micro-batches of several runs."""
        tokens: list[int] = []
        targets: list[int] = []
        weights: list[float] = []
        bounds = [0]
        for batch in batches:
            bounds += [len(tokens) + bound for bound in batch.bounds[1:]]
            tokens += batch.tokens
            targets += batch.targets
            weights += batch.weights
        return cls(tokens, targets, weights, bounds)

    def filled_up(self, width: int) -> TokenBatch:
        """Return it with a last sequence that predicts nothing, `width` tokens in all."""
        missing = width - len(self.tokens)
        if missing == 0:
            return self
        return TokenBatch(
            self.tokens + [0] * missing,
            self.targets + [IGNORED] * missing,
            self.weights + [0.0] * missing,
            [*self.bounds, width],
        )

    @property
    def num_labels(self) -> int:
        return sum(target != IGNORED for target in self.targets)
