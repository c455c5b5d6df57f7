"""Long plain text as pieces of up to `training.max_length` tokens, so that all of it is learned."""

from __future__ import annotations


def piece_spans(num_tokens: int, length: int) -> list[slice]:
    """Return where each piece of a text begins and ends.

    A piece begins with the last token of the piece before it: nothing predicts a first token, so
    that each token but the text's first is learned once.
    """
    starts = range(0, max(num_tokens - 1, 1), length - 1)
    return [slice(start, min(start + length, num_tokens)) for start in starts]
