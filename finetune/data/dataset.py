"""The rows to train on: checked one by one, mixed, put into the prompt, tokenised and masked.

Every row that is cut or left out is counted with its reason. Batches are training's matter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from finetune.config.inputs import DataSource
from finetune.config.schema import DataConfig, TrainingConfig
from finetune.data.chat_tokens import find_chat_problems
from finetune.data.plain_tokens import find_plain_problems
from finetune.data.row_counts import RowCounts
from finetune.data.row_draw import Spans, expand_spans, find_spans, hold_out, share_sizes
from finetune.data.row_encoding import encode_row, tokenise_rows
from finetune.data.row_shapes import ROWS_LOOKED_AT, Reading, find_reading, find_unknown_fields
from finetune.data.sources import Row, RowStream, find_source
from finetune.data.templates import BY_NAME, Template, load_template
from finetune.data.token_cache import Faults, TokenSource, rows_key
from finetune.data.token_rows import (
    Example,
    Integers,
    Origin,
    TokenRows,
    example_lengths,
    pack,
    unpacked,
)
from finetune.data.turns import Turn, Unusable

SourceRows = tuple[DataSource, Sequence[Row]]
MOST_COLUMNS = 1000  # that are looked at to name those that are not used


@dataclass(frozen=True)
class Examples:
    """Tokenised rows, in the order drawn or packed, and the counts of all rows.

    `train_origins` has one entry for each row to train on, in the order drawn, also where the rows
    were packed into sequences.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    counts: RowCounts
    train_origins: Sequence[Origin] = ()
    validation_origins: Sequence[Origin] = ()
    heldout: Sequence[Example] = ()  # neither trained nor validated on
    heldout_origins: Sequence[Origin] = ()

    @property
    def all(self) -> list[Example]:
        """Return every row, also those that are packed into a sequence."""
        return [*unpacked(self.train), *unpacked(self.validation)]

    def shortest_and_longest(self) -> list[list[int]]:
        """Return the tokens of the first of the shortest rows, and of the last of the longest."""
        parts = [part for part in map(unpacked, (self.train, self.validation)) if len(part)]
        sizes = np.concatenate([example_lengths(part) for part in parts])
        starts = np.cumsum([0, *map(len, parts)])
        places = int(sizes.argmin()), len(sizes) - 1 - int(sizes[::-1].argmax())
        found = []
        for place in places:
            part = int(np.searchsorted(starts, place, side="right")) - 1
            found.append(parts[part][place - int(starts[part])]["input_ids"])
        return found

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
                encode_row, template=template, data=data, training=fits,
                tokenizer=tokenizer,
            )  # fmt: skip
    for key, settings in data.sources().items():
        try:
            source = find_source(key, settings)
            rows = RowStream(source)
            if template is None:
                len(rows)  # which reads them
            else:
                _check_columns(source, rows, template, data.prompt_template)
                checked = _token_source(source, rows, data, TrainingConfig(), None)
                if not len(checked.usable):
                    raise _nothing_left(source, _count_checked(checked))
                if tries is not None:
                    _try_rows(source, rows, template, tries)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    return problems


def _check_columns(source: DataSource, rows: Sequence[Row], template: Template, given: str) -> None:
    columns = source.settings.columns
    unknown = find_unknown_fields(template, columns)
    if unknown:
        section = source.key.removesuffix("path") + "columns"
        fields = ", ".join((*template.required, *template.optional))
        raise ValueError(
            f"{section}.{unknown[0]} is set, and data.prompt_template={given} has no field "
            f"{unknown[0]}; its fields are {fields}"
        )
    reading = _find_reading(source, rows[:ROWS_LOOKED_AT], template)
    names = [name for name in template.required if name not in reading.provided]
    wanted = {name: columns.get(name, name) for name in names}
    lacking = {f: column for f, column in wanted.items() if not any(column in row for row in rows)}
    if lacking:
        section = source.key.removesuffix("path") + "columns"
        remedy = " ".join(f"++{section}.{f}=COLUMN" for f in lacking)  # ++ sets old and new keys
        if template.has_turns:
            pair = " ".join(f"++{section}.{f}=COLUMN" for f in ("instruction", "output"))
            remedy += f" (a conversation) or {pair} (texts)"
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
        has_columns = set(template.required) <= known and not template.has_turns
        if has_columns or set(template.required) <= reading.provided:
            return f", or data.prompt_template={name}, which takes these rows as they are"
    return ""


def _try_rows(
    source: DataSource,
    rows: Sequence[Row],
    template: Template,
    encode: Callable[[Sequence[Turn]], object],
) -> None:
    """Raise ValueError if no row can be encoded; rows are tried up to the first that can be."""
    counts = RowCounts()
    for number, turns in _sound_rows(source, rows, template, counts):
        try:
            encode(turns)
            return
        except Unusable as fault:
            counts.drop(str(fault), number)
    counts.read = len(rows)
    raise _nothing_left(source, counts)


def _nothing_left(source: DataSource | str, counts: RowCounts) -> ValueError:
    return ValueError(f"{source}: no row is left to train on: {counts.summary()}")


def build_examples(
    read: Sequence[SourceRows],
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Examples:
    """Check, draw, mix, render, tokenise and mask the rows; pack those to train on if set.

    Raises:
        ValueError: no row is left to train on; the message names the first one's fault. Or none is
            to validate on, where early stopping asks for it, or none held out of a share above 0.
    """
    sources = [_token_source(*one, data, training, tokenizer) for one in read]
    trains = sum(not source.is_validation for source, _ in read)  # the source after them is
    counts = []
    for place, source in enumerate(sources):
        if place >= trains or (trains == 1 and data.num_examples is None):
            _ = source.all_tokens  # which checks the rows in the same pass
        counts.append(_count_checked(source))
    share = data.heldout_fraction
    divided = [hold_out(one.usable, share * (n < trains)) for n, one in enumerate(sources)]
    available = [len(rest) for _, rest in divided]
    weights = [source.settings.weight for source, _ in read[:trains]]
    sizes = share_sizes(weights, available[:trains], data.num_examples) + available[trains:]
    tables: list[pyarrow.Table] = []
    spans: list[Spans] = []  # of the places of each row that is used, in the order drawn
    heldout: list[Spans] = []
    for place, (source, size, own) in enumerate(zip(sources, sizes, counts, strict=True)):
        kept_out, numbers = divided[place]
        own.missing = max(0, size - len(numbers))
        if place < trains and (data.num_examples is not None or size < len(numbers)):
            numbers = _draw(numbers, size, training.order_seed + place)
        start = sum(map(len, tables))
        tables.append(source.tokens(np.concatenate([numbers, kept_out])))
        spans.append(start + _count_tokenised(tables[-1], numbers, own))
        heldout.append(start + _count_tokenised(tables[-1], kept_out, own))
    total = counts[0]
    if len(read) > 1:
        named = zip((str(source) for source, _ in read), counts, strict=True)
        total = RowCounts.total(dict(named))
    rows = np.concatenate(spans[:trains])
    if trains < len(read):
        held_out_rows = spans[-1]
        if not len(rows) or not len(held_out_rows):
            raise _nothing_left(read[-1 if len(rows) else 0][0], total)
    else:
        held_out = _num_held_out(len(rows), read, data, training, total)
        if held_out:
            rows = rows[random.Random(training.order_seed).sample(range(len(rows)), len(rows))]
        held_out_rows, rows = rows[:held_out], rows[held_out:]
    total.validation, total.heldout = len(held_out_rows), sum(map(len, heldout))
    if share and not total.heldout:
        raise ValueError(
            f"data.heldout_fraction={share} of {sum(available)} rows is no row; raise it, or leave "
            "it out"
        )
    parts = rows, held_out_rows, np.concatenate(heldout)
    examples = _build(*(TokenRows(tables, expand_spans(one)) for one in parts), counts=total)
    return join_rows(examples, training.max_length) if training.sequence_packing else examples


def _build(
    train: TokenRows, validation: TokenRows, heldout: TokenRows, *, counts: RowCounts
) -> Examples:
    return Examples(
        train, validation, counts,
        train_origins=train.origins, validation_origins=validation.origins,
        heldout=heldout, heldout_origins=heldout.origins,
    )  # fmt: skip


def _draw(numbers: Integers, size: int, seed: int) -> Integers:
    """Draw rows of one source by its own seed: the others' weights change none of the first."""
    return numbers[random.Random(seed).sample(range(len(numbers)), min(size, len(numbers)))]


def join_rows(examples: Examples, max_length: int) -> Examples:
    """Pack the rows to train on into sequences of at most `max_length` tokens; count these."""
    packed = pack(examples.train, max_length)
    examples.counts.sequences = len(packed)
    num_tokens = int(example_lengths(examples.train).sum())
    examples.counts.fullness = num_tokens / (len(packed) * max_length)
    return replace(examples, train=packed)


def _token_source(
    source: DataSource,
    rows: Sequence[Row],
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> TokenSource:
    template = load_template(data.prompt_template)
    is_known = isinstance(rows, RowStream)  # others may be any
    return TokenSource(
        render=partial(_sound_rows, source, rows, template),
        encode=partial(tokenise_rows, template=template, data=data, training=training),
        tokenizer=tokenizer,
        key=rows_key(source, data, template.file_text) if is_known else None,
        max_length=training.max_length,
    )


def _count_checked(source: TokenSource) -> RowCounts:
    counts = RowCounts(read=len(source.checked), **source.about)
    for fault, number in source.faults:
        counts.drop(fault, number)
    return counts


def _count_tokenised(table: pyarrow.Table, numbers: Integers, counts: RowCounts) -> Spans:
    """Count the outcomes of the rows of these numbers; return the table's spans of their examples.

    A row has one example, or several pieces.
    """
    spans: Spans = find_spans(table["row"].to_numpy(), numbers)
    faults = table["fault"].take(spans[:, 0])
    is_used = faults.is_null().to_numpy()
    left_out = zip(faults.filter(~is_used).to_pylist(), numbers[~is_used].tolist(), strict=True)
    for fault, number in left_out:
        counts.drop(fault, number)
    spans = np.compress(is_used, spans, axis=0)
    kept = TokenRows([table], np.arange(len(table))).lengths
    before = np.concatenate([[0], np.cumsum(kept)])
    num_kept = before[spans[:, 1]] - before[spans[:, 0]]
    num_tokens = table["num_tokens"].to_numpy()[spans[:, 0]]
    counts.count_all(num_tokens, num_kept, spans[:, 1] - spans[:, 0])
    noted = table["notes"].take(spans[:, 0]).combine_chunks().flatten().value_counts()
    for one in noted.to_pylist():
        counts.note(one["values"], one["counts"])
    return spans


def _num_held_out(
    num_rows: int,
    read: Sequence[SourceRows],
    data: DataConfig,
    training: TrainingConfig,
    counts: RowCounts,
) -> int:
    held_out = round(num_rows * data.validation_fraction)
    if held_out == num_rows:
        raise _nothing_left(read[0][0] if len(read) == 1 else "data.mix", counts)
    if not held_out and training.early_stopping is not None:
        raise ValueError(
            f"data.validation_fraction={data.validation_fraction} of {num_rows} rows is no row, "
            "and training.early_stopping needs validation rows; raise data.validation_fraction"
        )
    return held_out


def longest_batch(
    read: Sequence[SourceRows],
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Return the most tokens that a micro-batch can have, from the longest texts."""
    count = 4 * training.batch_size
    lengths: list[int] = []
    for one in read:
        lengths += _token_source(*one, data, training, tokenizer).longest(count)
    return sum(sorted(lengths)[-training.batch_size :])


def sound_rows(
    source: DataSource, rows: Sequence[Row], template: Template, wanted: Collection[int]
) -> Iterator[tuple[int, list[Turn]]]:
    """Yield row number (from 1) and turns of each of the wanted rows whose fields can be used."""
    last = max(wanted, default=0)
    for number, turns in _sound_rows(source, rows, template, RowCounts(), wanted):
        yield number, turns
        if number == last:
            return


def _sound_rows(
    source: DataSource,
    rows: Sequence[Row],
    template: Template,
    counts: RowCounts | Faults,
    wanted: Collection[int] | None = None,
) -> Iterator[tuple[int, list[Turn]]]:
    """Yield row number (from 1) and turns of each row whose fields can be used.

    With `wanted` numbers, other rows are not rendered, and their faults are not counted.
    """
    stream = iter(rows)
    head = list(islice(stream, ROWS_LOOKED_AT))
    reading = _find_reading(source, head, template)
    known = set(reading.names)
    counts.shape, counts.unused = reading.shape, list(reading.unused)
    counts.absent = list(reading.absent)
    for number, row in enumerate(chain(head, stream), start=1):
        if len(known) < MOST_COLUMNS and not row.keys() <= known:  # what no row before it has
            reading = reading.with_names(row)
            known = set(reading.names)
            counts.unused, counts.absent = list(reading.unused), list(reading.absent)
        if wanted is not None and number not in wanted:
            continue
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
