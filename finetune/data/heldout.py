"""Rows that a run does not learn from, to be asked and scored by `evaluation=heldout`.

They are those of `data.heldout_fraction`, else the rows to validate on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.config.schema import DataConfig
from finetune.data.dataset import Examples, SourceRows, sound_rows
from finetune.data.questions import normalise
from finetune.data.templates import Template, load_template
from finetune.data.token_rows import IGNORED, Example, Origin, example_lengths, unpacked
from finetune.data.turns import Turn, Unusable

MOST_WORDS = 10  # of a short answer, which is compared word by word


@dataclass(frozen=True)
class HeldoutRow:
    """One example that was not learned from, as tokens and as text."""

    name: str  # of its row, and its source in a mix
    example: Example
    prompt: str  # up to the last response; empty where none is asked for
    response: str

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and end of each response, in tokens; nothing predicts the first token of all."""
        is_learned = np.array(self.example["labels"]) != IGNORED
        is_learned[0] = False
        edges = np.flatnonzero(np.diff(np.concatenate([[0], is_learned.astype(int), [0]])))
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    @property
    def is_short(self) -> bool:
        """True if the response is one line of a few words, and something asks for it."""
        words = normalise(self.response).split()
        lines = self.response.strip().splitlines()
        return bool(self.prompt) and len(lines) == 1 and 0 < len(words) <= MOST_WORDS


def find_heldout(
    read: Sequence[SourceRows],
    examples: Examples,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[HeldoutRow]:
    """Return the rows that were held out, in the order of the sources.

    Args:
        read: the sources with their rows.
        examples: built from them.
        data: the prompt.
        tokenizer: the model's.
    """
    template = load_template(data.prompt_template)
    held_out, origins = examples.heldout, examples.heldout_origins
    if not len(held_out):
        held_out, origins = examples.validation, examples.validation_origins
    texts = dict(_find_texts(read, origins, template, tokenizer))
    sources = [source for source, _ in read]
    rows = [
        HeldoutRow(origin.name(sources), example, *texts[origin])
        for origin, example in zip(origins, held_out, strict=True)
    ]
    return [row for row in rows if row.spans]


def _find_texts(
    read: Sequence[SourceRows],
    origins: Sequence[Origin],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[tuple[Origin, tuple[str, str]]]:
    """Yield prompt and response of each row."""
    for place, (source, rows) in enumerate(read):
        wanted = {origin.row for origin in origins if origin.source == place}
        for number, turns in sound_rows(source, rows, template, wanted) if wanted else ():
            yield Origin(place, number), (_ask(turns, template, tokenizer), turns[-1].content or "")


def _ask(turns: Sequence[Turn], template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt of a row; nothing where its text stands alone, or ends with a question."""
    if len(turns) < 2:
        return ""
    try:
        return template.ask(turns, tokenizer).text
    except Unusable:
        return ""


def count_trained(rows: Sequence[HeldoutRow], examples: Examples) -> int:
    """Return how many of the rows stand, token by token, in the rows to train on as well."""
    trained = unpacked(examples.train)
    asked = Counter(tuple(row.example["input_ids"]) for row in rows)
    lengths = {len(tokens) for tokens in asked}
    alike = [n for n, length in enumerate(example_lengths(trained)) if int(length) in lengths]
    found = {tuple(trained[n]["input_ids"]) for n in alike} & asked.keys()
    return sum(asked[tokens] for tokens in found)
