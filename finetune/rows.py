"""Rows as they lie in files and on the hub: found, named by their content, and read.

What a row must hold is known to its template; which rows are taken is `data`'s matter.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

from finetune.config import SourceConfig, local_path
from finetune.files import file_digest
from finetune.hub import hub_commit
from finetune.inputs import DataSource

Row = Mapping[str, Any]


def find_source(key: str, settings: SourceConfig) -> DataSource:
    """Find the data and what identifies its content.

    Raises:
        FileNotFoundError: there is no such file or hub data set.
        ValueError: the file is of a kind that is not read.
    """
    given = settings.path
    path = local_path(given)
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{key}={path}: rows are read from {', '.join(READERS)} files")
        return DataSource(key, str(path), file_digest(path), settings)
    is_hub_id = given.count("/") == 1 and not given.startswith((".", "/", "~"))
    if path.suffix in READERS or not is_hub_id:
        raise FileNotFoundError(f"{key}={given}: there is no file {path.absolute()}")
    commit = hub_commit(given, settings.revision, repo_type="dataset", key=key)
    return DataSource(key, given, f"hub:{given}@{commit}", settings, commit)


def read_rows(source: DataSource) -> list[Row]:
    """Read all rows.

    Raises:
        ValueError: a malformed line (with its number), or no row at all.
    """
    return list(RowStream(source))


class RowStream(Sequence[Row]):
    """The rows of a source, read anew at each pass and never held: a file may outgrow the memory.

    Iteration raises what `read_rows` does. The length takes a pass, and so does a place.
    """

    def __init__(self, source: DataSource) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Row]:
        is_empty = True
        for row in self._rows():
            is_empty = False
            yield row
        if is_empty:
            raise ValueError(f"{self.source} holds no rows")

    def _rows(self) -> Iterator[Row]:
        if self.source.revision is None:
            return stream_file(Path(self.source.location), name=str(self.source))
        return iter(self._hub)

    @cached_property
    def _hub(self) -> Any:
        return _load_hub(self.source)

    @cached_property
    def _length(self) -> int:
        return sum(1 for _ in self)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | Sequence[Row]:
        if isinstance(place, slice):
            return list(islice(self, *place.indices(len(self))))
        wanted = place if place >= 0 else len(self) + place
        for row in islice(self, wanted, None) if wanted >= 0 else ():
            return row
        raise IndexError(f"{self.source} has no row {place}")


PARQUET_ROWS = 1024  # that are in memory at a time
ENCODING = "utf-8-sig"  # spreadsheets put a mark before the first column's name


def read_file(path: Path, *, name: str) -> list[Row]:
    """Read the rows of a json, jsonl, csv or parquet file; `name` begins what its errors say."""
    return list(stream_file(path, name=name))


def stream_file(path: Path, *, name: str) -> Iterator[Row]:
    """Read the rows of a file one by one; raises ValueError at the first that is malformed."""
    try:
        yield from READERS[path.suffix](path)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _load_hub(source: DataSource) -> Any:
    from datasets import load_dataset

    part, split = source.settings.subset, source.settings.split
    try:
        return load_dataset(source.location, part, revision=source.revision, split=split)
    except ValueError as error:  # such as an unknown split; without the example in code
        told = " ".join(str(error).partition("\nExample")[0].split())
        remedy = "; set data.subset=NAME" if told.startswith("Config name is missing") else ""
        raise ValueError(f"{source}: {told}{remedy}") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding=ENCODING) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _as_row(_parse_json(line.rstrip("\n"), number), f"line {number}")


def _read_json(path: Path) -> Iterator[Row]:
    rows = _parse_json(path.read_text(encoding=ENCODING), 1)
    if not isinstance(rows, list):
        raise ValueError("a .json file is one list of rows; or name it .jsonl")
    for number, row in enumerate(rows, start=1):
        yield _as_row(row, f"row {number}")


def _parse_json(text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{where} is not JSON: {error.msg}") from None


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a row of named fields")
    return value


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding=ENCODING, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error(
                        f"it has not the {len(reader.fieldnames or [])} fields of line 1"
                    )
                yield row
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} is malformed: {error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"it is not a parquet file: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
