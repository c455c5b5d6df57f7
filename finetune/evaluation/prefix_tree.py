"""Prefix trees of token sequences, in which every shared prefix is stored once.

Pure: no torch, no model. Sequences come in lexicographic order, in which those with the longest
common prefixes are neighbours; a tree is a row of chains, each of which continues an earlier one.
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
    """The row of all tokens with their positions, and the indices of each sequence's tokens."""

    tokens: list[int]
    positions: list[int]
    chains: list[Chain]
    paths: list[list[int]]  # one a sequence: the row's index of each of its tokens


def count_shared(one: Tokens | str, other: Tokens | str) -> int:
    """Return the length of the common prefix of two sequences, in tokens or characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # bisection, because comparing slices is fast and comparing items is not
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def count_tokens(sequences: Sequence[Tokens] | Sequence[str]) -> int:
    """Return the size of the prefix tree of sequences, in tokens or characters."""
    ordered: list[Any] = sorted(sequences)
    shared = (count_shared(one, other) for one, other in pairwise(ordered))
    return sum(map(len, ordered)) - sum(shared)


def split(sequences: Sequence[Tokens], budget: int) -> list[Sequence[Tokens]]:
    """Cut ordered sequences into parts whose trees hold about `budget` tokens, sharing kept.

    A sequence longer than the budget is a part by itself.
    """
    if not sequences:
        return []
    shared = [0, *(count_shared(one, other) for one, other in pairwise(sequences))]
    own = [len(sequence) - same for sequence, same in zip(sequences, shared, strict=True)]
    return [sequences[first:end] for first, end in _cut(own, shared, budget)]


def build_tree(sequences: Sequence[Tokens]) -> Tree:
    """Build the prefix tree of ordered sequences."""
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
    """Join neighbouring chains; the tokens before the block that they continue are its path.

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

    A part's first item repeats its `shared` tokens, so a part ends where few are shared.
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
