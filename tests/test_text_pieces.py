"""Long plain text: all of it learned in pieces, or cut with the share that is lost."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.config.schema import DataConfig, TrainingConfig
from finetune.data.dataset import Examples, build_examples, longest_batch
from finetune.data.text_pieces import piece_spans
from finetune.data.token_rows import IGNORED
from tests.test_dataset import source

LONG = "".join(chr(97 + place % 26) for place in range(300))
ROWS = [{"text": LONG}, {"text": "short"}, {"text": LONG[::-1]}]


def build(
    tokenizer: PreTrainedTokenizerBase, *, max_length: int = 64, **settings: object
) -> Examples:
    data = DataConfig(path="rows.jsonl", prompt_template="text")
    for name, value in settings.items():
        setattr(data, name, value)
    return build_examples(
        [(source(data), ROWS)], data, TrainingConfig(max_length=max_length), tokenizer
    )


@pytest.mark.parametrize("length", [2, 3, 64, 300, 301, 302, 512])
def test_every_token_of_a_long_text_is_learned_once(
    tokenizer: PreTrainedTokenizerBase, length: int
) -> None:
    """But the text's first, which nothing predicts; no piece is longer than max_length."""
    built = build(tokenizer, max_length=length)
    assert max(len(one["input_ids"]) for one in built.train) <= length
    for number, row in enumerate(ROWS, start=1):
        pieces = [
            one
            for one, origin in zip(built.train, built.train_origins, strict=True)
            if origin.row == number
        ]
        learned = [label for one in pieces for label in one["labels"] if label != IGNORED]
        assert tokenizer.decode(learned) == row["text"][1:] + "</s>"
        assert all(one["labels"][0] == IGNORED for one in pieces)
    assert built.counts.drawn == 3
    assert built.counts.truncated == built.counts.lost_tokens == 0


def test_pieces_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    """Beside the rows that they are of."""
    counts = build(tokenizer).counts
    assert (counts.split, counts.pieces) == (2, 10)
    assert counts.summary() == "3 rows read, 3 used, 2 split into 10 pieces"


def test_the_share_that_is_cut_off_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    """Where data.long_text=cut asks for it."""
    built = build(tokenizer, long_text="cut")
    assert [len(one["input_ids"]) for one in built.train] == [64, 6, 64]
    assert (built.counts.tokens, built.counts.lost_tokens) == (608, 474)
    assert "3 used, 2 truncated (78.0% of all tokens lost)" in built.counts.summary()


def test_no_piece_of_a_text_is_held_out_from_the_others(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Else a validation loss would be of texts that are trained on."""
    built = build(tokenizer, validation_fraction=0.34)
    trained, held_out = (
        {origin.row for origin in origins}
        for origins in (built.train_origins, built.validation_origins)
    )
    assert len(held_out) == 1
    assert trained | held_out == {1, 2, 3}
    assert not trained & held_out


def test_memory_is_estimated_for_whole_pieces(tokenizer: PreTrainedTokenizerBase) -> None:
    """A batch can be of the pieces of one text."""
    data = DataConfig(path="rows.jsonl", prompt_template="text")
    training = TrainingConfig(max_length=64, batch_size=4)
    assert longest_batch([(source(data), ROWS[:1])], data, training, tokenizer) == 4 * 64


def test_a_text_as_long_as_a_piece_is_one() -> None:
    """And a text of one token."""
    assert piece_spans(8, 8) == [slice(0, 8)]
    assert piece_spans(1, 8) == [slice(0, 1)]
    assert piece_spans(9, 8) == [slice(0, 8), slice(7, 9)]
