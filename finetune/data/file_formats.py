"""File formats by name and content: JSON, csv, plain text, parquet and Arrow, row by row.

Every reader yields rows as it goes; `json_rows` interprets the content of JSON files.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.data.json_rows import TEXT_COLUMN, Row, holds_splits, read_json_rows
from finetune.data.text_lines import DEFAULT_ENCODING, read_lines, split_at_carriage_returns
from finetune.files import refuse_lfs_pointer

ONLY_SPLIT = "train"  # of a file without splits, as `datasets` names it
ROWS_AT_ONCE = 1000  # of a columnar file
DELIMITERS = ",;\t|"
LARGEST_FIELD = 2**31 - 1  # csv's own bound is 131,072 characters
TSV = (".tsv", ".tab")
COMPRESSED = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lz4")
LONG_LINE = 1 << 20  # bytes; a longer line of JSON is read in pieces
PARAGRAPH_SEARCH = 1_000_000  # characters in which a text's first blank line is looked for


def find_format(path: Path) -> str | None:
    """Return the ending that says a file's format, in lower case; None if it is not read."""
    endings = [ending.lower() for ending in path.suffixes]
    while endings and endings[-1] in COMPRESSED:
        endings.pop()
    return endings[-1] if endings and endings[-1] in READERS else None


def known_endings() -> str:
    """Return the endings of the files that are read, for a message."""
    return f"{', '.join(READERS)} files, compressed or not ({', '.join(COMPRESSED)})"


def iterate_file(
    path: Path, *, encoding: str = DEFAULT_ENCODING, split: str = "train"
) -> Iterator[Row]:
    """Yield the rows of a file of any format; raises ValueError with the place of a fault."""
    ending = find_format(path)
    if ending is None:
        raise ValueError(f"its format is not read; rows are read from {known_endings()}")
    refuse_lfs_pointer(path)
    yield from READERS[ending](path, encoding, split)


def refuse_unknown_split(path: Path, *, encoding: str, split: str) -> None:
    """Raise ValueError where `data.split` is not train, and a file holds no splits."""
    if split in ("", ONLY_SPLIT):
        return
    refuse_lfs_pointer(path)
    is_json = READERS[find_format(path) or ""] is _read_json
    if is_json and holds_splits(read_lines(path, encoding, longest=LONG_LINE), split):
        return
    raise ValueError(
        f"data.split is {split}, but a file that holds no splits has the split {ONLY_SPLIT} only; "
        f"set data.split={ONLY_SPLIT}"
    )


def _read_json(path: Path, encoding: str, split: str) -> Iterator[Row]:
    return read_json_rows(read_lines(path, encoding, longest=LONG_LINE), split)


def _read_csv(path: Path, encoding: str, split: str) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_FIELD)
    lines = split_at_carriage_returns(read_lines(path, encoding))
    head = next(lines, "")
    skipped = 0
    declared = re.fullmatch(r"sep=(.)\s*", head)  # Excel's first line
    if declared:
        head, skipped = next(lines, ""), 1
    is_tsv = find_format(path) in TSV
    delimiter = declared[1] if declared else "\t" if is_tsv else _sniff(head)
    records = _read_records(chain([head], lines), delimiter, skipped)
    first, header = next(records, (1, []))
    names = [name.strip() for name in header]
    double = sorted({name for name in names if name and names.count(name) > 1})
    if double:
        raise ValueError(f"line {first} names the column {double[0]!r} twice; rename one of them")
    for number, record in records:
        if len(record) != len(names):
            raise ValueError(
                f"line {number} is malformed: it has {len(record)} fields, line {first} has "
                f"{len(names)}"
            )
        yield dict(zip(names, record, strict=True))


def _sniff(header: str) -> str:
    """Return the delimiter that a header has most of, outside of quotes; without one the comma."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=bare.count)


def _read_records(
    lines: Iterable[str], delimiter: str, skipped: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield each record that is not blank, with the line that it begins at."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1 + skipped
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error)
            if "unexpected end of data" in reason:
                reason = "its quoted field does not end"
            raise ValueError(f"line {number} is malformed: {reason}") from None
        if record:
            yield number, record


def _read_text(path: Path, encoding: str, split: str) -> Iterator[Row]:
    """Yield a text's paragraphs, separated by blank lines; without a blank line, its lines."""
    lines = read_lines(path, encoding)
    head: list[str] = []
    size, has_paragraphs = 0, False
    for line in lines:
        head.append(line)
        size += len(line)
        has_paragraphs = not line.strip() and any(one.strip() for one in head)
        if has_paragraphs or size > PARAGRAPH_SEARCH:
            break
    yield from _join_text(chain(head, lines), has_paragraphs)


def _join_text(lines: Iterable[str], has_paragraphs: bool) -> Iterator[Row]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line.replace("\r\n", "\n"))
        if paragraph and not (has_paragraphs and line.strip()):
            yield {TEXT_COLUMN: "".join(paragraph).rstrip("\r\n")}
            paragraph = []
    if paragraph:
        yield {TEXT_COLUMN: "".join(paragraph).rstrip("\r\n")}


def _read_parquet(path: Path, encoding: str, split: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist(maps_as_pydicts="strict")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"it is not a parquet file: {error}") from None


def _read_arrow(path: Path, encoding: str, split: str) -> Iterator[Row]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            yield from _read_batches(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"it is not an Arrow file: {error}") from None


def _read_batches(file: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of an Arrow file (Feather) or stream (as `datasets` writes)."""
    import pyarrow

    try:
        reader = pyarrow.ipc.open_file(file)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    except pyarrow.ArrowInvalid:
        file.seek(0)
        batches = iter(pyarrow.ipc.open_stream(file))
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            yield from batch.slice(start, ROWS_AT_ONCE).to_pylist(maps_as_pydicts="strict")


READERS: dict[str, Callable[[Path, str, str], Iterator[Row]]] = {
    ".jsonl": _read_json, ".json": _read_json, ".ndjson": _read_json,
    ".csv": _read_csv, ".tsv": _read_csv, ".tab": _read_csv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow, ".feather": _read_arrow, ".jsonlines": _read_json,
}  # fmt: skip
