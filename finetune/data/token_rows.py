"""Examples read from memory-mapped Arrow tables one by one, and packed into sequences.

An example is one sequence of tokens: a tokenised row, or several concatenated ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, NotRequired, TypedDict, overload

import numpy as np
import pyarrow
from datasets import Dataset
from trl.data_utils import pack_dataset

IGNORED = -100  # the label of a token that carries no loss, as in transformers
BATCH_ROWS = 4096  # of an Arrow table that are made at a time

Integers = np.ndarray[Any, np.dtype[np.int64]]


class Example(TypedDict):
    """One sequence: a tokenised row, or several concatenated ones of lengths `seq_lengths`.

    `labels` has the length of `input_ids`, IGNORED where masked and at each row's first token.
    """

    input_ids: list[int]
    labels: list[int]
    seq_lengths: NotRequired[list[int]]  # TRL's name, which its collator looks for


class Origin(NamedTuple):
    """The origin of an example: the index of its source in the mix, and its row, from 1."""

    source: int
    row: int

    def name(self, sources: Sequence[object]) -> str:
        """Name the row by its number, and in a mix by its source too."""
        return f"row {self.row}" + (f" of {sources[self.source]}" if len(sources) > 1 else "")


class LazyExamples(Sequence[Example]):
    """Examples that are made as they are asked for; equal to a list of the same ones."""

    lengths: Integers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        if not -len(self) <= place < len(self):
            raise IndexError(f"there is no example {place}")
        return self._example(place % len(self))

    def take(self, places: Integers) -> Sequence[Example]:
        """Return the examples at these places, in their order."""
        raise NotImplementedError

    def _example(self, place: int) -> Example:
        raise NotImplementedError


class TokenRows(LazyExamples):
    """Rows of tables with `input_ids`, `is_learned` and `row`; `places` index all of them."""

    def __init__(self, tables: Sequence[pyarrow.Table], places: Integers) -> None:
        self._tables, self._places = tables, places

    @cached_property
    def _chunks(self) -> list[pyarrow.RecordBatch]:
        return [batch for table in self._tables for batch in table.to_batches() if len(batch)]

    @cached_property
    def _starts(self) -> Integers:
        return np.cumsum([0, *(len(chunk) for chunk in self._chunks)])

    @cached_property
    def _all_lengths(self) -> Integers:
        offsets = [chunk.column("input_ids").offsets.to_numpy() for chunk in self._chunks]
        return np.concatenate([np.zeros(0, np.int64), *map(np.diff, offsets)]).astype(np.int64)

    @cached_property
    def lengths(self) -> Integers:  # type: ignore[override]
        return self._all_lengths[self._places]

    @property
    def origins(self) -> Sequence[Origin]:
        """Return the source and row of each example."""
        ends = np.cumsum([len(table) for table in self._tables])
        sources = np.searchsorted(ends, self._places, side="right")
        rows = np.concatenate([table["row"].to_numpy() for table in self._tables])
        return Origins(sources, rows[self._places])

    def take(self, places: Integers) -> TokenRows:
        return TokenRows(self._tables, self._places[places])

    def _example(self, place: int) -> Example:
        wanted = int(self._places[place])
        number = int(np.searchsorted(self._starts, wanted, side="right")) - 1
        chunk, row = self._chunks[number], wanted - int(self._starts[number])
        tokens = chunk.column("input_ids")
        start, end = tokens.offsets[row].as_py(), tokens.offsets[row + 1].as_py()
        ids = tokens.values[start:end].to_numpy()
        learned = chunk.column("is_learned").values[start:end].to_numpy(zero_copy_only=False)
        return Example(input_ids=ids.tolist(), labels=np.where(learned, ids, IGNORED).tolist())


class Origins(Sequence[Origin]):
    """The source and row of each of many examples."""

    def __init__(self, sources: Integers, rows: Integers) -> None:
        self._sources, self._rows = sources, rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __len__(self) -> int:
        return len(self._rows)

    def rows_of(self, source: int) -> Integers:
        """Return the numbers of a source's rows, each once, in ascending order."""
        return np.unique(self._rows[self._sources == source])

    @overload
    def __getitem__(self, place: int) -> Origin: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Origin]: ...
    def __getitem__(self, place: int | slice) -> Origin | Sequence[Origin]:
        if isinstance(place, slice):
            return Origins(self._sources[place], self._rows[place])
        return Origin(int(self._sources[place]), int(self._rows[place]))


class PackedRows(LazyExamples):
    """Sequences, each of several concatenated rows."""

    def __init__(self, rows: Sequence[Example], packed: Sequence[Integers]) -> None:
        self._rows, self._packed = rows, packed
        sizes = example_lengths(rows)
        self.lengths = np.array([sizes[places].sum() for places in packed], np.int64)

    def take(self, places: Integers) -> PackedRows:
        return PackedRows(self._rows, [self._packed[place] for place in places])

    def _example(self, place: int) -> Example:
        joined = [self._rows[int(row)] for row in self._packed[place]]
        return Example(
            input_ids=[token for row in joined for token in row["input_ids"]],
            labels=[label for row in joined for label in row["labels"]],
            seq_lengths=[len(row["input_ids"]) for row in joined],
        )

    def rows(self) -> Sequence[Example]:
        """Return the rows of all sequences, in their order."""
        places = np.concatenate([np.zeros(0, np.int64), *self._packed])
        if isinstance(self._rows, LazyExamples):
            return self._rows.take(places)
        return [self._rows[place] for place in places]


def pack(rows: Sequence[Example], length: int) -> PackedRows:
    """Pack rows into as few sequences of up to `length` tokens as best-fit decreasing finds.

    The longest row first, each joins the fullest sequence that still has room (arXiv:2404.10830).
    TRL packs by lengths alone: it gets each row's index in place of each of its tokens.
    """
    sizes = example_lengths(rows)
    places = np.repeat(np.arange(len(rows), dtype=np.int32), sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    column = pyarrow.LargeListArray.from_arrays(offsets, places)
    indices = Dataset(pyarrow.table({"input_ids": column}))
    # By default it packs every 1,000 rows separately.
    packed = pack_dataset(indices, length, "bfd", {"batch_size": len(rows)})
    batches = packed.with_format("arrow").iter(BATCH_ROWS)
    return PackedRows(rows, [found for batch in batches for found in _joined_rows(batch)])


def _joined_rows(batch: pyarrow.Table) -> Iterator[Integers]:
    """Yield the indices of the rows of each sequence."""
    for ids, sizes in zip(batch["input_ids"], batch["seq_lengths"], strict=True):
        starts = np.cumsum(sizes.values.to_numpy()) - sizes.values.to_numpy()
        yield ids.values.to_numpy()[starts].astype(np.int64)


def example_lengths(examples: Sequence[Example]) -> Integers:
    """Return the tokens of each example."""
    if isinstance(examples, LazyExamples):
        return examples.lengths
    return np.array([len(example["input_ids"]) for example in examples], np.int64)


def row_lengths(example: Example) -> list[int]:
    """Return the length of each row of a sequence."""
    return example.get("seq_lengths", [len(example["input_ids"])])


def unpacked(examples: Sequence[Example]) -> Sequence[Example]:
    """Return every row, also those that are packed into a sequence."""
    if isinstance(examples, TokenRows):
        return examples
    if isinstance(examples, PackedRows):
        return examples.rows()
    return [row for example in examples for row in _rows(example)]


def _rows(example: Example) -> list[Example]:
    ends = [0, *accumulate(row_lengths(example))]
    return [
        Example(input_ids=example["input_ids"][a:b], labels=example["labels"][a:b])
        for a, b in pairwise(ends)
    ]


def as_dataset(examples: Sequence[Example]) -> Dataset:
    """Return examples as the Trainer's Dataset, converted a batch at a time."""
    names = list(examples[0])
    types = pyarrow.schema([(name, pyarrow.list_(pyarrow.int32())) for name in names])
    tables = []
    for start in range(0, len(examples), BATCH_ROWS):
        part = [dict(one) for one in examples[start : start + BATCH_ROWS]]
        tables.append(pyarrow.Table.from_pylist(part, types))
    return Dataset(pyarrow.concat_tables(tables))
