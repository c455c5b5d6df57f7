"""Tokenised rows as text: learned tokens in colour or in brackets, and lengths as a histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from finetune.data.dataset import Examples
from finetune.data.token_rows import IGNORED, Example, unpacked
from finetune.escaping import for_terminal

LEARNED = "black on green"  # a background, so that learned spaces are seen
NEWLINE = "↵"  # before a learned newline, which has no background
LINE_CHARACTERS = 120  # of a span in a log line
BINS = 8
BAR_CHARACTERS = 40


class Span(NamedTuple):
    """The text of successive tokens that are all learned, or all masked."""

    text: str
    is_learned: bool


def find_spans(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Return the text of the learned and of the masked tokens, special tokens written out.

    Each span's text is what its tokens add to the text before them: a tokenizer decodes tokens by
    themselves without the space that they begin with.
    """
    ids, spans, start, before = example["input_ids"], [], 0, ""
    for is_learned, labels in groupby(example["labels"], key=lambda label: label != IGNORED):
        end = start + len(list(labels))
        text = decode(ids[:end], tokenizer)
        begins = text.startswith(before)  # not where a character's bytes are in both spans
        added = text[len(before) :] if begins else decode(ids[start:end], tokenizer)
        spans.append(Span(added, is_learned))
        start, before = end, text
    return spans


def decode(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of tokens as they are: nothing skipped, no space cleaned up."""
    return str(
        tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )


def render_brackets(spans: Sequence[Span]) -> str:
    """Return the text with learned tokens in brackets."""
    return "".join(f"[{text}]" if is_learned else text for text, is_learned in spans)


def render_colour(spans: Sequence[Span]) -> Text:
    """Return the text with a coloured background behind learned tokens."""
    shown = Text()
    for text, is_learned in spans:
        plain = for_terminal(text)
        if is_learned:
            shown.append(plain.replace("\n", f"{NEWLINE}\n"), style=LEARNED)
        else:
            shown.append(plain)
    return shown


def render_line(spans: Sequence[Span]) -> str:
    r"""Return a line for a log: newlines as \n, the middle of long spans left out."""
    short = [Span(_shorten(text), is_learned) for text, is_learned in spans]
    return render_brackets(short).replace("\n", "\\n")


def _shorten(text: str) -> str:
    if len(text) <= LINE_CHARACTERS:
        return text
    half = LINE_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"


def describe_first(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a log line with the first row to train on, the first of its sequence where packed."""
    first, origins = unpacked(examples.train)[0], examples.train_origins
    name = "first row" if examples.is_packed or not origins else f"row {origins[0].row}"
    line = render_line(find_spans(first, tokenizer))
    return f"{name} as the model gets it, {describe_marks(first)} (in brackets): {line}"


def describe_marks(example: Example) -> str:
    """Say how many tokens there are, and how many of them are learned."""
    learned = sum(label != IGNORED for label in example["labels"])
    return f"{len(example['input_ids'])} tokens, {learned} learned"


def render_histogram(lengths: Sequence[int]) -> list[str]:
    """Return the lines of a histogram: a range of lengths, how many rows have one, a bar."""
    low, high = min(lengths), max(lengths)
    width = math.ceil((high - low + 1) / BINS)
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    digits, most = len(str(high)), max(counts)
    lines = []
    for place, count in enumerate(counts):
        start = low + place * width
        bar = "#" * math.ceil(BAR_CHARACTERS * count / most)
        end = min(start + width - 1, high)
        lines.append(f"{start:>{digits}} - {end:>{digits}}  {count:>{len(str(most))}}  {bar}")
    return [line.rstrip() for line in lines]
