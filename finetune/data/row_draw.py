"""The rows that a run takes: each source's share of them, and where a table has their examples."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.data.token_rows import Integers

HELDOUT_SEED = 0  # of no setting: whatever the seed, all runs hold out the same rows

Spans = np.ndarray[Any, np.dtype[np.int64]]  # [row, first and end]


def share_sizes(
    weights: Sequence[float], available: Sequence[int], num_examples: int | None
) -> list[int]:
    """Return how many rows each source should give, in proportion to the weights.

    Without `num_examples` it is as many as there can be without taking a row twice; with it, what
    rounding leaves over goes to the largest remainders.
    """
    shares = [weight / math.fsum(weights) for weight in weights]
    if num_examples is None:
        most = min(have / share for have, share in zip(available, shares, strict=True))
        return [
            min(have, round(most * share)) for have, share in zip(available, shares, strict=True)
        ]
    exact = [num_examples * share for share in shares]
    sizes = [math.floor(size) for size in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: sizes[i] - exact[i])
    for place in by_remainder[: num_examples - sum(sizes)]:
        sizes[place] += 1
    return sizes


def hold_out(numbers: Integers, share: float) -> tuple[Integers, Integers]:
    """Return a share of a source's rows, drawn without a run's seed, and the others."""
    places = random.Random(HELDOUT_SEED).sample(range(len(numbers)), round(share * len(numbers)))
    is_held_out = np.zeros(len(numbers), bool)
    is_held_out[places] = True
    return numbers[is_held_out], numbers[~is_held_out]


def find_spans(rows: Integers, numbers: Integers) -> Spans:
    """Return where each number is among the sorted numbers of a table's rows."""
    sides = [np.searchsorted(rows, numbers, side=side) for side in ("left", "right")]
    return np.stack(sides, axis=1).astype(np.int64)


def expand_spans(spans: Spans) -> Integers:
    """Return every place of spans, in their order."""
    sizes = spans[:, 1] - spans[:, 0]
    starts = np.repeat(spans[:, 0] - np.cumsum(sizes) + sizes, sizes)
    places: Integers = np.arange(len(starts)) + starts
    return places
