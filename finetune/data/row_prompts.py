"""Prompts of rows for sample answers and export checks: the last rows, held out where any are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.config.schema import DataConfig, TrainingConfig
from finetune.data.dataset import Examples, SourceRows, sound_rows
from finetune.data.templates import Template, load_template
from finetune.data.token_rows import Integers, Origin, Origins
from finetune.data.turns import Prompt, Turn, Unusable

HELD_OUT, VALIDATION = "held out for evaluation", "held out for validation"
UNUSED, TRAINED = "not trained on", "trained on"
MOST_TRIED = 1000  # of the last rows, since many may be too long to ask
CANDIDATES = 64  # of each use, the last ones, since not every row can be asked
GROWTH = 4  # of the rows that are rendered at a time, since each time is a pass over the source

FindNumbers = Callable[[int], Integers]  # by a source's index, the numbers of rows, ascending


class RowPrompt(NamedTuple):
    """A prompt, and the row that it is of: its number, and how it was used."""

    row: str
    prompt: Prompt


def sample_prompts(
    read: Sequence[SourceRows],
    examples: Examples,
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterable[RowPrompt]:
    """Yield prompts, the last row first: of rows held out, else not drawn, else trained on."""
    template, sources = load_template(data.prompt_template), [source for source, _ in read]
    for use, find_numbers in _numbers_by_use(read, examples).items():
        found = False
        for origin, turns in _last_rows(read, template, find_numbers, CANDIDATES):
            if (prompt := _ask(turns, template, training, tokenizer)) is not None:
                found = True
                yield RowPrompt(f"{origin.name(sources)}, {use}", prompt)
        if found:
            return


def _ask(
    turns: Sequence[Turn],
    template: Template,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Prompt | None:
    """Return the prompt of a row; None where it has none, or leaves no room for an answer."""
    with suppress(Unusable):
        prompt = template.ask(turns, tokenizer)
        if len(prompt.tokens) < training.max_length:
            return prompt
    return None


def _numbers_by_use(read: Sequence[SourceRows], examples: Examples) -> dict[str, FindNumbers]:
    """Return how to find the rows of each use, in the order in which they are to be asked."""

    def held_out(place: int) -> Integers:
        return _rows_of(examples.heldout_origins, place)

    def validation(place: int) -> Integers:
        return _rows_of(examples.validation_origins, place)

    def trained(place: int) -> Integers:
        return np.setdiff1d(_rows_of(examples.train_origins, place), validation(place))

    def unused(place: int) -> Integers:
        used = [one(place) for one in (held_out, validation, trained)]
        return np.setdiff1d(_all_numbers(read, place), np.concatenate(used))

    return {HELD_OUT: held_out, VALIDATION: validation, UNUSED: unused, TRAINED: trained}


def _rows_of(origins: Sequence[Origin], place: int) -> Integers:
    if isinstance(origins, Origins):
        return origins.rows_of(place)
    return np.unique(np.array([one.row for one in origins if one.source == place], np.int64))


def _all_numbers(read: Sequence[SourceRows], place: int) -> Integers:
    return np.arange(1, len(read[place][1]) + 1)


def _last_rows(
    read: Sequence[SourceRows], template: Template, find_numbers: FindNumbers, most: int
) -> Iterator[tuple[Origin, list[Turn]]]:
    """Yield origin and turns of the last rows that can be used, the last one first.

    Only as many are rendered as are asked for, and some that cannot be used.
    """
    for place in reversed(range(len(read))):
        source, rows = read[place]
        numbers, size = find_numbers(place), CANDIDATES
        while len(numbers) and most:
            last, numbers = numbers[-size:], numbers[:-size]
            turns = dict(sound_rows(source, rows, template, set(last.tolist())))
            for number in sorted(turns, reverse=True)[:most]:
                yield Origin(place, number), turns[number]
            most -= min(most, len(turns))
            size *= GROWTH


def last_prompts(
    read: Sequence[SourceRows],
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> list[Prompt]:
    """Return the prompts of the last rows that can be used."""
    template = load_template(data.prompt_template)
    prompts: list[Prompt] = []
    for _, turns in _last_rows(read, template, partial(_all_numbers, read), MOST_TRIED):
        if (prompt := _ask(turns, template, training, tokenizer)) is not None:
            prompts.append(prompt)
        if len(prompts) == count:
            break
    return prompts[::-1]
