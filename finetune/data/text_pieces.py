"""Long plain text as pieces of up to `training.max_length` tokens, so that all of it is learned."""

from __future__ import annotations

from finetune.config.schema import DataConfig, TrainingConfig
from finetune.data.token_rows import IGNORED, Example


def fit_length(example: Example, data: DataConfig, training: TrainingConfig) -> list[Example]:
    """Return the row cut to `training.max_length`, or all of a long text in pieces."""
    length = training.max_length
    if len(example["input_ids"]) <= length and example["labels"][0] == IGNORED:
        return [example]
    pieces = piece_spans(len(example["input_ids"]), length)
    if data.prompt_template != "text" or data.long_text == "cut":
        pieces = [slice(length)]
    return [
        Example(
            input_ids=example["input_ids"][piece],
            labels=[IGNORED, *example["labels"][piece][1:]],
        )
        for piece in pieces
    ]


def piece_spans(num_tokens: int, length: int) -> list[slice]:
    """Return where each piece of a text begins and ends.

    A piece begins with the last token of the piece before it: nothing predicts a first token, so
    that each token but the text's first is learned once.
    """
    starts = range(0, max(num_tokens - 1, 1), length - 1)
    return [slice(start, min(start + length, num_tokens)) for start in starts]
