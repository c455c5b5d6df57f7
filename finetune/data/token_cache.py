"""Cache of tokenised rows: each row of a source is tokenised once, into an Arrow table.

A run's rows are indices into the table of all usable rows. Where it draws few of them, only these
are tokenised; where it takes all, they are checked in the same pass. Rendering and encoding are
passed in as functions.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from finetune.config.inputs import DataSource
from finetune.config.schema import DataConfig
from finetune.data.arrow_cache import ArrowCache, Batches
from finetune.data.text_sections import sized_parts
from finetune.data.token_rows import BATCH_ROWS, IGNORED, Example, Integers
from finetune.files import digest
from finetune.home import cache_dir

FOLDER = "tokens"
# Raised when the same rows become other tokens: runs trained on earlier ones are not reused.
TOKENS = 1  # 0, in release 0.1: prompt and response were tokenised separately
TABLES = 2  # raised when the tables' columns, or what rows they have, change
VERSIONS = ("transformers", "tokenizers", "trl", "jinja2")
# Settings that choose among rows, and leave each row as it is.
CHOOSING = {
    "path", "mix", "revision", "num_examples", "validation_fraction", "validation_path",
    "heldout_fraction",
}  # fmt: skip
TOGETHER = 1024  # rows that are tokenised together, or fewer long ones
FEW = 0.5  # a smaller share of the usable rows is tokenised without the others

CHECKED = pyarrow.schema(
    [
        ("fault", pyarrow.string()),
        ("size", pyarrow.int64()),
        ("about", pyarrow.string()),  # JSON, of all rows up to here, where it has changed
    ]
)
TOKENISED = pyarrow.schema(
    [
        ("row", pyarrow.int64()),
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("is_learned", pyarrow.list_(pyarrow.bool_())),
        ("num_tokens", pyarrow.int64()),
        ("notes", pyarrow.list_(pyarrow.string())),
        ("fault", pyarrow.string()),
    ]
)


class RowTokens(NamedTuple):
    """The examples of a row, of `num_tokens` before they were cut, or why it is left out."""

    examples: list[Example]
    num_tokens: int = 0
    notes: Sequence[str] = ()
    fault: str | None = None


class Faults:
    """Collects the rows that rendering drops, as RowCounts does, and its notes on all rows."""

    def __init__(self) -> None:
        self._by_row: dict[int, str] = {}
        self.shape = ""
        self.unused: list[str] = []
        self.absent: list[str] = []

    def drop(self, reason: str, number: int) -> None:
        self._by_row[number] = reason

    def take(self) -> list[str]:
        """Return the faults so far, which are forgotten: a file may have nothing but these."""
        if not self._by_row:  # of nearly all rows
            return []
        found = [self._by_row[number] for number in sorted(self._by_row)]
        self._by_row.clear()
        return found

    def about(self) -> str:
        """Return what was set about all rows, as JSON."""
        return json.dumps({k: v for k, v in vars(self).items() if not k.startswith("_")})


class _Checks:
    """Collects rows of the checked table, and appends its batches to a list."""

    def __init__(self, batches: list[pyarrow.RecordBatch], faults: Faults) -> None:
        self._batches, self._faults = batches, faults
        self._rows: list[tuple[str | None, int]] = []
        self._about: str | None = None

    def add(self, fault: str | None, size: int) -> None:
        self._rows.append((fault, size))
        if len(self._rows) == BATCH_ROWS:
            self.write()

    def add_faults(self) -> None:
        for fault in self._faults.take():
            self.add(fault, 0)

    def write(self) -> None:
        """Append the rows so far as a batch, if there are any."""
        if not self._rows:
            return
        said, self._about = self._about, self._faults.about()
        last = None if self._about == said else self._about
        reasons, sizes = zip(*self._rows, strict=True)
        columns = [
            pyarrow.array(reasons, pyarrow.string()),
            pyarrow.array(sizes, pyarrow.int64()),
            pyarrow.array([*[None] * (len(self._rows) - 1), last], pyarrow.string()),
        ]
        self._batches.append(pyarrow.record_batch(columns, schema=CHECKED))
        self._rows = []


# Row number and turns of each usable row, or of those among the numbers that are wanted.
Rendered = Callable[[Faults, Collection[int] | None], Iterable[tuple[int, Any]]]
Encode = Callable[[Sequence[Any], PreTrainedTokenizerBase], list[RowTokens]]


@dataclass(frozen=True, eq=False)
class TokenSource:
    """The rows of one source under one template and tokenizer.

    `key` identifies the rows and their rendering in the cache; None caches nothing.
    """

    render: Rendered
    encode: Encode
    tokenizer: PreTrainedTokenizerBase | None  # None where rows are only checked
    key: dict[str, Any] | None
    max_length: int
    _passed: list[pyarrow.RecordBatch] = field(default_factory=list, init=False)  # of `checked`

    @cached_property
    def _encoding(self) -> dict[str, Any]:
        assert self.tokenizer is not None, "rows are tokenised with one"
        return {"tokenizer": tokenizer_key(self.tokenizer), "max_length": self.max_length}

    @cached_property
    def checked(self) -> pyarrow.Table:
        """Return the fault and the size in characters of every row, read but not tokenised."""
        return self._table({}, CHECKED, self._check)

    @property
    def about(self) -> dict[str, Any]:
        """Return the notes of a rendering on all rows."""
        found: dict[str, Any] = json.loads(self.checked["about"].drop_null()[-1].as_py())
        return found

    @cached_property
    def usable(self) -> Integers:
        """Return the numbers (from 1) of the rows that can be rendered."""
        return np.flatnonzero(self.checked["fault"].is_null().to_numpy()) + 1

    @property
    def faults(self) -> Iterator[tuple[str, int]]:
        """Yield fault and number of each other row, in their order."""
        faulty = np.flatnonzero(self.checked["fault"].is_valid().to_numpy())
        reasons = self.checked["fault"].take(faulty).to_pylist()
        yield from zip(reasons, (faulty + 1).tolist(), strict=True)

    def tokens(self, numbers: Integers) -> pyarrow.Table:
        """Return a table of tokenised rows that has these rows, and maybe more, in their order."""
        if len(numbers) >= FEW * len(self.usable):
            return self.all_tokens
        wanted = {int(number) for number in numbers}
        part = {"encoding": self._encoding if self.key else {}, "rows": digest(sorted(wanted))}
        return self._table(part, TOKENISED, lambda: self._tokenise(wanted))

    @cached_property
    def all_tokens(self) -> pyarrow.Table:
        """Return the table of all usable rows; they are checked in the same pass, if not before."""
        part = {"encoding": self._encoding if self.key else {}, "rows": None}
        return self._table(part, TOKENISED, self._tokenise_all)

    def longest(self, count: int) -> list[int]:
        """Return the lengths of as many examples, of the longest texts."""
        schema = pyarrow.schema([("num_tokens", pyarrow.int64())])

        def make() -> Batches:
            found = self._find_longest(count)
            yield pyarrow.record_batch([pyarrow.array(found, pyarrow.int64())], schema=schema)

        part = {"encoding": self._encoding if self.key else {}, "longest": count}
        found: list[int] = self._table(part, schema, make)["num_tokens"].to_pylist()
        return found

    def turns(self, numbers: Iterable[int]) -> dict[int, Any]:
        """Return the turns of these rows, rendered in one pass."""
        wanted, last = set(numbers), max(numbers, default=0)
        found = {}
        for number, turns in self.render(Faults(), wanted) if wanted else ():
            found[number] = turns
            if number >= last:
                break
        return found

    def _table(
        self, part: dict[str, Any], schema: pyarrow.Schema, make: Callable[[], Batches]
    ) -> pyarrow.Table:
        def batches() -> Batches:
            return _without_collection(make())

        if self.key is None:
            return pyarrow.Table.from_batches(batches(), schema)
        return ArrowCache(cache_dir() / FOLDER).table({**self.key, **part}, schema, batches)

    def _check(self) -> Batches:
        batches = self._passed
        for _ in () if batches else self._every_row(batches):
            while batches:
                yield batches.pop(0)
        yield from batches

    def _tokenise_all(self) -> Batches:
        checked: list[pyarrow.RecordBatch] = []
        yield from self._token_batches(self._every_row(checked))
        self._passed[:] = checked
        _ = self.checked  # which is written from these

    def _tokenise(self, wanted: set[int]) -> Batches:
        return self._token_batches(self.render(Faults(), wanted))

    def _every_row(self, checked: list[pyarrow.RecordBatch]) -> Iterator[tuple[int, Any]]:
        """Yield the usable rows, and append the checked table's batches of all that passed."""
        faults = Faults()
        checks = _Checks(checked, faults)
        for row in self.render(faults, None):
            checks.add_faults()
            checks.add(None, _size(row[1]))
            yield row
        checks.add_faults()
        checks.write()

    def _token_batches(self, rows: Iterable[tuple[int, Any]]) -> Batches:
        for part in sized_parts(rows, lambda row: _size(row[1]), TOGETHER):
            yield _as_batch(self._encoded(part))

    def _encoded(self, rows: Sequence[tuple[int, Any]]) -> list[tuple[int, RowTokens]]:
        assert self.tokenizer is not None, "rows are tokenised with one"
        found = self.encode([turns for _, turns in rows], self.tokenizer)
        return list(zip((number for number, _ in rows), found, strict=True))

    def _find_longest(self, count: int) -> list[int]:
        sizes = self.checked["size"].to_numpy()[self.usable - 1]
        by_size = iter(self.usable[np.argsort(-sizes, kind="stable")].tolist())
        found: list[int] = []
        asked = 2 * count
        while len(found) < count and (numbers := list(islice(by_size, asked))):
            turns = self.turns(numbers)
            rows = self._encoded([(number, turns[number]) for number in numbers])
            found += [len(one["input_ids"]) for _, row in rows for one in row.examples]
            asked *= 4  # each time is a pass over all rows
        return found


def _as_batch(rows: Sequence[tuple[int, RowTokens]]) -> pyarrow.RecordBatch:
    """Put rows into a batch, one place an example, and one a row that is left out."""
    places = [
        (number, example, row)
        for number, row in rows
        for example in row.examples or [Example(input_ids=[], labels=[])]
    ]
    sizes = [len(example["input_ids"]) for _, example, _ in places]
    offsets = pyarrow.array(np.cumsum([0, *sizes]), pyarrow.int32())
    ids = _joined([example["input_ids"] for _, example, _ in places])
    labels = _joined([example["labels"] for _, example, _ in places])
    columns = [
        pyarrow.array([number for number, _, _ in places], pyarrow.int64()),
        pyarrow.ListArray.from_arrays(offsets, pyarrow.array(ids)),
        pyarrow.ListArray.from_arrays(offsets, pyarrow.array(labels != IGNORED)),
        pyarrow.array([row.num_tokens for _, _, row in places], pyarrow.int64()),
        pyarrow.array([list(row.notes) for _, _, row in places], pyarrow.list_(pyarrow.string())),
        pyarrow.array([row.fault for _, _, row in places], pyarrow.string()),
    ]
    return pyarrow.record_batch(columns, schema=TOKENISED)


def _joined(lists: Sequence[list[int]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.fromiter(chain.from_iterable(lists), np.int32, count=sum(map(len, lists)))


def _without_collection(batches: Batches) -> Batches:
    """Yield batches, each made without garbage collection.

    Collections go through all that is imported, again and again for every few rows, whose lists
    and dicts are in no cycles.
    """
    while True:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            batch = next(batches, None)
        finally:
            if was_enabled:
                gc.enable()
        if batch is None:
            return
        yield batch


def _size(turns: Sequence[Any]) -> int:
    size = 0
    for turn in turns:
        size += len(turn.content or "") + (len(str(turn.extra)) if turn.extra else 0)
    return size


def rows_key(source: DataSource, data: DataConfig, template: str | None) -> dict[str, Any] | None:
    """Return the cache key of the rendered rows of a source; None without a digest.

    Args:
        source: of the rows; its digest is of their content.
        data: its settings that choose among rows are left out.
        template: the text of a user's template file.
    """
    if not source.digest:
        return None
    settings = {k: v for k, v in asdict(data).items() if k not in CHOOSING}
    columns = {k: v for k, v in asdict(source.settings).items() if k not in {*CHOOSING, "weight"}}
    return {
        "tables": TABLES, "tokens": TOKENS, "digest": source.digest, "template": template,
        "data": settings, "source": columns, "versions": {name: version(name) for name in VERSIONS},
    }  # fmt: skip


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that determines a tokenizer's tokens."""
    parts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "added": {str(n): repr(token) for n, token in tokenizer.added_tokens_decoder.items()},
        "chat_template": tokenizer.chat_template,
        "settings": {name: repr(value) for name, value in tokenizer.init_kwargs.items()},
    }
    if tokenizer.is_fast:
        parts["fast"] = digest(tokenizer.backend_tokenizer.to_str())
    else:
        with suppress(NotImplementedError):
            parts["vocabulary"] = digest(tokenizer.get_vocab())
    parts["flags"] = [
        getattr(tokenizer, name, None)
        for name in ("add_bos_token", "add_eos_token", "split_special_tokens")
    ]
    return digest(json.loads(json.dumps(parts, default=repr)))
