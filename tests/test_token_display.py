"""Tokenised rows as text: spans, marks, log lines and histograms."""

from __future__ import annotations

from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.data.dataset import Examples
from finetune.data.row_counts import RowCounts
from finetune.data.token_display import (
    Span,
    decode,
    describe_first,
    find_spans,
    render_brackets,
    render_colour,
    render_histogram,
    render_line,
)
from finetune.data.token_rows import IGNORED, Example, Origin


class Bytes:
    """A tokenizer of UTF-8 bytes that, as SentencePiece, drops a leading space in decoding."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode("utf-8", errors="replace").removeprefix(" ")


def example(masked: bytes, learned: bytes) -> Example:
    return Example(input_ids=[*masked, *learned], labels=[IGNORED] * len(masked) + list(learned))


@pytest.mark.parametrize(
    ("masked", "learned", "expected"),
    [
        (b"Ask:", b" it", [Span("Ask:", False), Span(" it", True)]),
        (b"", b" all", [Span("all", True)]),
        ("é".encode()[:1], "é".encode()[1:], [Span("\ufffd", False), Span("\ufffd", True)]),
    ],
)
def test_spans_keep_their_spaces(masked: bytes, learned: bytes, expected: list[Span]) -> None:
    """A span's text is what it adds to the text before; a divided character is shown as such."""
    tokenizer = cast(PreTrainedTokenizerBase, Bytes())
    assert find_spans(example(masked, learned), tokenizer) == expected


def test_spans_are_the_whole_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Special tokens too."""
    asked, said = tokenizer("Who?\n\n")["input_ids"], [*tokenizer("I.")["input_ids"], 2]
    row = Example(input_ids=[*asked, *said], labels=[IGNORED] * len(asked) + said)
    spans = find_spans(row, tokenizer)
    assert [span.is_learned for span in spans] == [False, True]
    assert "".join(span.text for span in spans) == decode(row["input_ids"], tokenizer)


def test_marks_are_brackets_or_colour() -> None:
    """Colour marks learned newlines, which have no background; escapes are written out."""
    spans = [Span("a\x1b[31m\n", False), Span("b\n", True)]
    assert render_brackets([Span("a", False), Span("b</s>", True)]) == "a[b</s>]"
    shown = render_colour(spans)
    assert shown.plain == "a\\x1b[31m\nb↵\n"
    assert [shown.plain[one.start : one.end] for one in shown.spans] == ["b↵\n"]


def test_a_log_line_is_one_short_line(tokenizer: PreTrainedTokenizerBase) -> None:
    """Long spans lose their middle, not their ends."""
    line = render_line([Span("a" * 500 + "\nend", False), Span("b", True)])
    assert "\n" not in line
    assert line.endswith("\\nend[b]")
    assert len(line) < 200
    ids = tokenizer("Hello.")["input_ids"]
    row = Example(input_ids=ids, labels=[IGNORED, *ids[1:]])
    built = Examples([row], [], RowCounts(), [Origin(0, 7)])
    told = describe_first(built, tokenizer)
    assert told.startswith(f"row 7 as the model gets it, {len(ids)} tokens, {len(ids) - 1} learned")


@pytest.mark.parametrize("lengths", [[5], [5, 5], [1, 2], [1, 1000], list(range(3, 90))])
def test_a_histogram_counts_every_row_once(lengths: list[int]) -> None:
    """Its ranges begin and end with the shortest and longest row."""
    lines = render_histogram(lengths)
    assert sum(int(line.split()[3]) for line in lines) == len(lengths)
    assert int(lines[0].split()[0]) == min(lengths)
    assert int(lines[-1].split()[2]) == max(lengths)
    assert len(lines) <= 8
