"""Token sequences that begin alike, laid out so that every shared token stands once.

Pure: no torch, no model. Sequences come in lexicographic order; then those that share the most
stand next to each other, and a tree of them is a row of chains, each hanging on an earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = tuple[int, ...]

REPEAT_COST = 0.1  # of leaving one token of a part's budget unused, in repeated tokens


@dataclass(frozen=True)
class Chain:
    """Tokens [start, end) of the row that follow one another."""

    start: int
    end: int
    path: list[int]  # the row's indices of all tokens before the chain, in order of position


@dataclass(frozen=True)
class Block:
    """A piece [start, end) of the row that is attended in one call.

    Its queries see themselves and `path`, the indices before the block; `visible` says which:
    [query, path + key], true where the key precedes the query in one of the sequences.
    """

    start: int
    end: int
    path: list[int]
    visible: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tree:
    """The row: each token with its position, and where each sequence's tokens stand in it."""

    tokens: list[int]
    positions: list[int]
    chains: list[Chain]
    paths: list[list[int]]  # one a sequence: the row's index of each of its tokens


def count_shared(one: Tokens | str, other: Tokens | str) -> int:
    """Return how many tokens, or characters, two sequences begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # bisection, because comparing slices is fast and comparing items is not
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def count_tokens(sequences: Sequence[Tokens] | Sequence[str]) -> int:
    """Return how many tokens, or characters, must at least be seen to have seen all sequences."""
    ordered: list[Any] = sorted(sequences)
    shared = (count_shared(one, other) for one, other in pairwise(ordered))
    return sum(map(len, ordered)) - sum(shared)


def split(sequences: Sequence[Tokens], budget: int) -> list[Sequence[Tokens]]:
    """Cut ordered sequences into parts whose trees hold about `budget` tokens, sharing kept.

    A sequence longer than the budget is a part of its own.
    """
    if not sequences:
        return []
    shared = [0, *(count_shared(one, other) for one, other in pairwise(sequences))]
    own = [len(sequence) - same for sequence, same in zip(sequences, shared, strict=True)]
    return [sequences[first:end] for first, end in _cut(own, shared, budget)]


def build_tree(sequences: Sequence[Tokens]) -> Tree:
    """Lay ordered sequences out as one row in which every shared beginning stands once."""
    tree = Tree([], [], [], [])
    previous: Tokens = ()
    path: list[int] = []
    for sequence in sequences:
        shared = count_shared(previous, sequence)
        path = path[:shared]
        start = len(tree.tokens)
        if len(sequence) > shared:
            end = start + len(sequence) - shared
            tree.chains.append(Chain(start, end, path))
            tree.tokens.extend(sequence[shared:])
            tree.positions.extend(range(shared, len(sequence)))
            path = [*path, *range(start, end)]
        tree.paths.append(path)
        previous = sequence
    return tree


def build_blocks(tree: Tree, budget: int) -> list[Block]:
    """Cut the row between chains into blocks of about `budget` tokens."""
    own = [chain.end - chain.start for chain in tree.chains]
    shared = [len(chain.path) for chain in tree.chains]
    return [_block(tree.chains[first:end]) for first, end in _cut(own, shared, budget)]


def _block(chains: Sequence[Chain]) -> Block:
    """Join neighbouring chains; what they hang on before the first hangs together in its path.

    In this order a later chain branches from the first one's path, or from within the block.
    """
    start, end, path = chains[0].start, chains[-1].end, chains[0].path
    visible = np.zeros((end - start, len(path) + end - start), dtype=np.bool_)
    column = {index: number for number, index in enumerate([*path, *range(start, end)])}
    for chain in chains:
        rows = slice(chain.start - start, chain.end - start)
        visible[rows, [column[index] for index in chain.path]] = True
        own = slice(column[chain.start], column[chain.start] + chain.end - chain.start)
        visible[rows, own] = np.tri(chain.end - chain.start, dtype=np.bool_)
    return Block(start, end, path, visible)


def _cut(own: Sequence[int], shared: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Cut items in order into parts [first, end) of at most `budget` own tokens each.

    Whoever begins a part needs its `shared` tokens again, so a part ends where few are shared.
    """
    filled = [0, *accumulate(own)]
    parts = []
    first = 0
    while first < len(own):
        end = first + 1
        while end < len(own) and filled[end + 1] - filled[first] <= budget:
            end += 1
        if end < len(own):
            full = filled[end]
            end = min(
                range(end, first, -1),
                key=lambda at: shared[at] + REPEAT_COST * (full - filled[at]),
            )
        parts.append((first, end))
        first = end
    return parts
