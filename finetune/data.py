"""The rows to train on: checked one by one, mixed, put into the prompt, tokenised and masked.

Every row that is cut or left out is counted with its reason. Batches are training's matter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, islice, pairwise
from typing import NamedTuple, NotRequired, TypedDict, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import pack_dataset

from finetune.chat_tokens import find_chat_problems, find_learned
from finetune.config import DataConfig, TrainingConfig
from finetune.inputs import DataSource
from finetune.plain_tokens import find_plain_problems
from finetune.prompts import BY_NAME, Template, load_template
from finetune.row_counts import RowCounts
from finetune.row_shapes import ROWS_LOOKED_AT, Reading, find_reading
from finetune.rows import Row, RowStream, find_source, read_rows
from finetune.text_pieces import piece_spans
from finetune.turns import Turn, Unusable

IGNORED = -100  # the label of a token that carries no loss, as in transformers
SourceRows = tuple[DataSource, Sequence[Row]]


class Example(TypedDict):
    """One sequence: a tokenised row, or several end to end, whose lengths are `seq_lengths`.

    `labels` has the length of `input_ids`, IGNORED where masked and at each row's first token.
    """

    input_ids: list[int]
    labels: list[int]
    seq_lengths: NotRequired[list[int]]  # TRL's name, which its collator looks for


class Origin(NamedTuple):
    """Where an example comes from: the place of its source in the mix, and its row, from 1."""

    source: int
    row: int


@dataclass(frozen=True)
class Examples:
    """Tokenised rows, in the order drawn or joined, and what became of the others.

    `train_origins` has one entry for each row to train on, in the order drawn, also where the rows
    were joined into sequences.
    """

    train: list[Example]
    validation: list[Example]
    counts: RowCounts
    train_origins: list[Origin] = field(default_factory=list)
    validation_origins: list[Origin] = field(default_factory=list)

    @property
    def all(self) -> list[Example]:
        """Return every row, also those that are joined in a sequence."""
        return [row for example in (*self.train, *self.validation) for row in _rows(example)]

    @property
    def is_packed(self) -> bool:
        return "seq_lengths" in self.train[0]


def find_sources(data: DataConfig) -> list[DataSource]:
    """Find every source; raises what `find_source` does."""
    return [find_source(key, settings) for key, settings in data.sources().items()]


def read_sources(sources: Sequence[DataSource]) -> list[SourceRows]:
    """Open every source; its rows are read at each pass, which raises what `read_rows` does."""
    return [(source, RowStream(source)) for source in sources]


def find_problems(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    training: TrainingConfig | None = None,
) -> list[str]:
    """Return what is wrong with the template and with each source, without tokenising all rows.

    Args:
        data: the section, its values in range.
        tokenizer: the model's, to try rows on; None leaves that out.
        training: its max_length; None takes the default.
    """
    problems: list[str] = []
    template = None
    try:
        template = load_template(data.prompt_template)
    except (FileNotFoundError, ValueError) as error:
        problems.append(str(error))
    tries = None  # encodes a row, where there is a tokenizer to try it on
    if tokenizer is not None and template is not None:
        unfit = find_chat_problems(tokenizer) if template.has_turns else []
        unfit += find_plain_problems(tokenizer)
        problems += unfit
        fits = training or TrainingConfig()
        if not unfit:
            tries = partial(
                _encode, template=template, data=data, training=fits,
                tokenizer=tokenizer,
            )  # fmt: skip
    for key, settings in data.sources().items():
        try:
            source = find_source(key, settings)
            rows = read_rows(source)
            if template is not None:
                _check_columns(source, rows, template, data.prompt_template)
                _check_rows(source, rows, template, tries)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    return problems


def _check_columns(source: DataSource, rows: Sequence[Row], template: Template, given: str) -> None:
    columns = source.settings.columns
    reading = _find_reading(source, rows[:ROWS_LOOKED_AT], template)
    names = [name for name in template.required if name not in reading.provided]
    wanted = {name: columns.get(name, name) for name in names}
    lacking = {f: column for f, column in wanted.items() if not any(column in row for row in rows)}
    if lacking:
        section = source.key.removesuffix("path") + "columns"
        remedy = " ".join(f"++{section}.{f}=COLUMN" for f in lacking)  # ++ sets old and new keys
        raise ValueError(
            f"{source} has no column {', '.join(map(repr, lacking.values()))} for the "
            f"{', '.join(lacking)} of data.prompt_template={given}; its columns are "
            f"{', '.join(map(str, rows[0]))}. Set {remedy}{_other_template(source, rows)}"
        )


def _other_template(source: DataSource, rows: Sequence[Row]) -> str:
    """Return the remedy of another template, where one takes the rows as they are."""
    head = rows[:ROWS_LOOKED_AT]
    known = {name for row in head for name in row}
    for name, template in BY_NAME.items():
        reading = find_reading(head, template, source.settings.columns)
        if set(template.required) <= known | reading.provided:
            return f", or data.prompt_template={name}, which takes these rows as they are"
    return ""


def _check_rows(
    source: DataSource,
    rows: Sequence[Row],
    template: Template,
    encode: Callable[[Sequence[Turn]], object] | None,
) -> None:
    """Raise ValueError if no row can be used; rows are encoded up to the first that can be."""
    counts = RowCounts(read=len(rows))
    for number, turns in _sound_rows(source, rows, template, counts):
        try:
            if encode is not None:
                encode(turns)
            return
        except Unusable as fault:
            counts.drop(str(fault), number)
    raise _nothing_left(source, counts)


def _nothing_left(source: DataSource | str, counts: RowCounts) -> ValueError:
    return ValueError(f"{source}: no row is left to train on: {counts.summary()}")


def build_examples(
    read: Sequence[SourceRows],
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Examples:
    """Check, draw, mix, render, tokenise and mask the rows; join those to train on if asked to.

    Raises:
        ValueError: no row is left to train on; the message names the first one's fault. Or none is
            to validate on, where early stopping asks for it.
    """
    template = load_template(data.prompt_template)
    counts = [RowCounts(read=len(rows)) for _, rows in read]
    sound = [
        list(_sound_rows(source, rows, template, own))
        for (source, rows), own in zip(read, counts, strict=True)
    ]
    weights = [source.settings.weight for source, _ in read]
    sizes = share_sizes(weights, [len(rows) for rows in sound], data.num_examples)
    seed = training.order_seed
    rows_used: list[list[tuple[Example, Origin]]] = []  # a long text is several examples
    for place, (rows, size, own) in enumerate(zip(sound, sizes, counts, strict=True)):
        own.missing = max(0, size - len(rows))
        drawn = rows
        if data.num_examples is not None or size < len(rows):
            # Each source draws for itself: the others' weights do not change which rows come first.
            drawn = random.Random(seed + place).sample(rows, min(size, len(rows)))
        for number, turns in drawn:
            try:
                example, notes = _encode(turns, template, data, training, tokenizer)
            except Unusable as fault:
                own.drop(str(fault), number)
            else:
                own.note(notes)
                pieces = _fit_length(example, data, training)
                own.count(len(example["input_ids"]), [len(one["input_ids"]) for one in pieces])
                rows_used.append([(one, Origin(place, number)) for one in pieces])
    total = counts[0] if len(read) == 1 else _total(read, counts)
    held_out = round(len(rows_used) * data.validation_fraction)
    if held_out == len(rows_used):
        raise _nothing_left(read[0][0] if len(read) == 1 else "data.mix", total)
    if not held_out and training.early_stopping is not None:
        raise ValueError(
            f"data.validation_fraction={data.validation_fraction} of {total.drawn} rows is none, "
            "and training.early_stopping validates; raise it"
        )
    if held_out:
        rows_used = random.Random(seed).sample(rows_used, len(rows_used))
    train, train_origins = _unzip(rows_used[held_out:])
    if training.sequence_packing:
        train = pack(train, training.max_length)
        total.sequences = len(train)
        tokens = sum(len(example["input_ids"]) for example in train)
        total.fullness = tokens / (len(train) * training.max_length)
    validation, validation_origins = _unzip(rows_used[:held_out])
    return Examples(train, validation, total, train_origins, validation_origins)


def _unzip(rows: Sequence[list[tuple[Example, Origin]]]) -> tuple[list[Example], list[Origin]]:
    pairs = [pair for row in rows for pair in row]
    return [example for example, _ in pairs], [origin for _, origin in pairs]


def pack(rows: list[Example], length: int) -> list[Example]:
    """Join rows into as few sequences of up to `length` tokens as best-fit decreasing finds.

    The longest row first, each joins the fullest sequence that still has room (arXiv:2404.10830).
    """
    apart = Dataset.from_list([dict(row) for row in rows])
    # By itself it packs every 1,000 rows for themselves.
    packed = pack_dataset(apart, length, "bfd", {"batch_size": len(rows)})
    return cast(list[Example], packed.to_list())


def row_lengths(example: Example) -> list[int]:
    """Return the length of each row of a sequence."""
    return example.get("seq_lengths", [len(example["input_ids"])])


def _rows(example: Example) -> list[Example]:
    ends = [0, *accumulate(row_lengths(example))]
    return [
        Example(input_ids=example["input_ids"][a:b], labels=example["labels"][a:b])
        for a, b in pairwise(ends)
    ]


def longest_batch(
    read: Sequence[SourceRows],
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Return the tokens of the largest micro-batch that there can be, of the longest texts."""
    template = load_template(data.prompt_template)
    sound = [
        turns
        for source, rows in read
        for _, turns in _sound_rows(source, rows, template, RowCounts())
    ]
    sound.sort(key=lambda turns: sum(len(turn.content) for turn in turns), reverse=True)
    lengths: list[int] = []
    for turns in sound:
        if len(lengths) >= 4 * training.batch_size:
            break
        with suppress(Unusable):
            example, _ = _encode(turns, template, data, training, tokenizer)
            lengths += [len(one["input_ids"]) for one in _fit_length(example, data, training)]
    return sum(sorted(lengths)[-training.batch_size :])


def share_sizes(
    weights: Sequence[float], available: Sequence[int], num_examples: int | None
) -> list[int]:
    """Return how many rows each source should give, in proportion to the weights.

    Without `num_examples` it is as many as there can be without taking a row twice; with it, what
    rounding leaves over goes to the largest remainders.
    """
    shares = [weight / math.fsum(weights) for weight in weights]
    if num_examples is None:
        most = min(have / share for have, share in zip(available, shares, strict=True))
        return [
            min(have, round(most * share)) for have, share in zip(available, shares, strict=True)
        ]
    exact = [num_examples * share for share in shares]
    sizes = [math.floor(size) for size in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: sizes[i] - exact[i])
    for place in by_remainder[: num_examples - sum(sizes)]:
        sizes[place] += 1
    return sizes


def _total(read: Sequence[SourceRows], counts: Sequence[RowCounts]) -> RowCounts:
    total = RowCounts(
        sources={str(source): own for (source, _), own in zip(read, counts, strict=True)}
    )
    for own in counts:
        total.read += own.read
        total.drawn += own.drawn
        for name in ("truncated", "tokens", "lost_tokens", "split", "pieces"):
            setattr(total, name, getattr(total, name) + getattr(own, name))
        total.missing += own.missing
        for reason, count in own.dropped.items():
            total.dropped[reason] = total.dropped.get(reason, 0) + count
        for note, count in own.notes.items():
            total.notes[note] = total.notes.get(note, 0) + count
    return total


def sound_rows(
    source: DataSource, rows: Sequence[Row], template: Template
) -> Iterator[tuple[int, list[Turn]]]:
    """Yield row number (from 1) and turns of each row whose fields can be used."""
    return _sound_rows(source, rows, template, RowCounts())


def _sound_rows(
    source: DataSource, rows: Sequence[Row], template: Template, counts: RowCounts
) -> Iterator[tuple[int, list[Turn]]]:
    """Yield row number (from 1) and turns of each row whose fields are whole."""
    stream = iter(rows)
    head = list(islice(stream, ROWS_LOOKED_AT))
    reading = _find_reading(source, head, template)
    counts.shape, counts.unused = reading.shape, list(reading.unused)
    counts.absent = list(reading.absent)
    for number, row in enumerate(chain(head, stream), start=1):
        try:
            turns = template.render(reading.fields(row))
        except Unusable as fault:
            counts.drop(str(fault), number)
        else:
            yield number, turns


def _find_reading(source: DataSource, head: Sequence[Row], template: Template) -> Reading:
    """Recognise the shape of a source's rows; ValueError where it is not the one that is set."""
    try:
        return find_reading(head, template, source.settings.columns, source.settings.format)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _encode(
    turns: Sequence[Turn],
    template: Template,
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Example, tuple[str, ...]]:
    """Return a row's tokens and labels, not cut yet, and what is noted of it."""
    encoded = template.encode(turns, tokenizer)
    if True not in encoded.is_response[: training.max_length]:
        raise Unusable(f"prompt alone fills training.max_length={training.max_length}")
    is_learned = find_learned(
        encoded, tokenizer, prompt=not data.mask_prompt, empty_think=not data.mask_empty_think
    )
    labels = [
        token if learned else IGNORED
        for token, learned in zip(encoded.tokens, is_learned, strict=True)
    ]
    labels[0] = IGNORED  # it has no predecessor to be predicted from
    if labels.count(IGNORED) == len(labels):
        raise Unusable("it has no token to learn")
    return Example(input_ids=encoded.tokens, labels=labels), encoded.notes


def _fit_length(example: Example, data: DataConfig, training: TrainingConfig) -> list[Example]:
    """Return the row cut to `training.max_length`, or all of a long text in pieces."""
    length = training.max_length
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
