"""Trees of token sequences: nothing is lost, nothing is seen that should not be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune.evaluation.prefix_tree import (
    Tokens,
    build_blocks,
    build_tree,
    count_shared,
    count_tokens,
    split,
)

SEQUENCES = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple),
    min_size=1, max_size=12, unique=True,
).map(sorted)  # fmt: skip


@given(SEQUENCES)
def test_every_sequence_is_a_path_through_the_row(sequences: list[Tokens]) -> None:
    """A path's tokens are the sequence, at positions 0, 1, 2, ..."""
    tree = build_tree(sequences)
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert tuple(tree.tokens[at] for at in path) == sequence
        assert [tree.positions[at] for at in path] == list(range(len(sequence)))


@given(SEQUENCES)
def test_a_row_holds_every_distinct_beginning_once(sequences: list[Tokens]) -> None:
    """The row is as long as there are distinct prefixes: the least a model can read."""
    prefixes = {sequence[:end] for sequence in sequences for end in range(1, len(sequence) + 1)}
    assert len(build_tree(sequences).tokens) == len(prefixes) == count_tokens(sequences)


@given(SEQUENCES, st.integers(1, 20))
def test_blocks_show_a_token_its_own_past_and_nothing_else(
    sequences: list[Tokens], budget: int
) -> None:
    """Whatever the size of the blocks, a token sees exactly the path that leads to it."""
    tree = build_tree(sequences)
    past = {path[at]: set(path[: at + 1]) for path in tree.paths for at in range(len(path))}
    blocks = build_blocks(tree, budget)
    assert [at for block in blocks for at in range(block.start, block.end)] == list(
        range(len(tree.tokens))
    )
    for block in blocks:
        keys = [*block.path, *range(block.start, block.end)]
        for query, visible in zip(range(block.start, block.end), block.visible, strict=True):
            seen = [key for key, shown in zip(keys, visible, strict=True) if shown]
            assert len(seen) == len(set(seen))
            assert set(seen) == past[query]


@given(SEQUENCES, st.integers(1, 30))
def test_splitting_keeps_all_sequences_in_order(sequences: list[Tokens], budget: int) -> None:
    """Parts hold about the budget and together are what was given."""
    parts = split(sequences, budget)
    assert [sequence for part in parts for sequence in part] == sequences
    for part in parts:
        new = count_tokens(part) - (len(part[0]) if len(part) > 1 else 0)
        assert len(part) == 1 or new <= budget


def test_parts_end_where_little_is_shared() -> None:
    """The choices of a question stay together though the budget would end between them."""
    questions = [(*[number] * 20, choice, choice) for number in range(3) for choice in range(4)]
    parts = split(questions, 40)
    assert [len(part) for part in parts] == [4, 4, 4]


@given(SEQUENCES)
def test_the_shared_beginning_is_the_longest(sequences: list[Tokens]) -> None:
    """What two sequences share is equal, and their next tokens differ."""
    one, other = sequences[0], sequences[-1]
    shared = count_shared(one, other)
    assert one[:shared] == other[:shared]
    assert one[: shared + 1] != other[: shared + 1] or shared == len(one) == len(other)
