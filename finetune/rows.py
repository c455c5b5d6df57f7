"""Rows as they lie in files and on the hub: found, named by their content, and read.

What a row must hold is known to its template; which rows are taken is `data`'s matter.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
    if source.revision is None:
        rows = read_file(Path(source.location), name=str(source))
    else:
        rows = _read_hub(source)
    if not rows:
        raise ValueError(f"{source} holds no rows")
    return rows


ENCODING = "utf-8-sig"  # spreadsheets put a mark before the first column's name


def read_file(path: Path, *, name: str) -> list[Row]:
    """Read the rows of a json, jsonl, csv or parquet file; `name` begins what its errors say."""
    try:
        return list(READERS[path.suffix](path))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _read_hub(source: DataSource) -> list[Row]:
    from datasets import load_dataset

    part, split = source.settings.subset, source.settings.split
    try:
        return list(load_dataset(source.location, part, revision=source.revision, split=split))
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
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"it is not a parquet file: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
