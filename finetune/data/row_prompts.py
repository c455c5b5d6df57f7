"""Prompts of rows, that base and tuned model answer: of held-out rows where there are any."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from finetune.config.schema import DataConfig, TrainingConfig
from finetune.data.dataset import Examples, SourceRows, sound_rows
from finetune.data.templates import Template, load_template
from finetune.data.token_rows import Origin
from finetune.data.turns import Prompt, Turn, Unusable

HELD_OUT, UNUSED, TRAINED = "held out for validation", "not trained on", "trained on"
MOST_TRIED = 1000  # of the last rows, since many may be too long to ask
CANDIDATES = 64  # of each use, the last ones, since not every row can be asked


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
    for use, rows in _by_use(read, examples, template).items():
        found = False
        for origin, turns in reversed(rows):
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


def _by_use(
    read: Sequence[SourceRows], examples: Examples, template: Template
) -> dict[str, deque[tuple[Origin, list[Turn]]]]:
    """Return the last rows of each use, in the order in which they are to be asked."""
    held_out, trained = set(examples.validation_origins), set(examples.train_origins)
    found: dict[str, deque[tuple[Origin, list[Turn]]]] = {
        use: deque(maxlen=CANDIDATES) for use in (HELD_OUT, UNUSED, TRAINED)
    }
    for place, (source, rows) in enumerate(read):
        for number, turns in sound_rows(source, rows, template):
            origin = Origin(place, number)
            use = HELD_OUT if origin in held_out else TRAINED if origin in trained else UNUSED
            found[use].append((origin, turns))
    return found


def last_prompts(
    read: Sequence[SourceRows],
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> list[Prompt]:
    """Return the prompts of the last rows that can be used."""
    template = load_template(data.prompt_template)
    last: deque[list[Turn]] = deque(maxlen=MOST_TRIED)
    for source, rows in read:
        last.extend(turns for _, turns in sound_rows(source, rows, template))
    prompts: list[Prompt] = []
    for turns in reversed(last):
        if (prompt := _ask(turns, template, training, tokenizer)) is not None:
            prompts.append(prompt)
        if len(prompts) == count:
            break
    return prompts[::-1]
