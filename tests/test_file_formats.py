"""File formats: the same rows come out of every layout, compression and encoding."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from finetune.data.file_formats import LONG_LINE, iterate_file

ROWS: list[dict[str, Any]] = [
    {"instruction": f"Say {i}.", "input": "é, ö; ü", "output": f"It is\n{i}."} for i in range(3)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
COLUMNS = {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}


def delimited(delimiter: str, end: str = "\n") -> str:
    records = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    return "".join(delimiter.join(f'"{field}"' for field in record) + end for record in records)


TEXTS: dict[str, str] = {
    "lines.json": LINES,
    "lines.JSONL": LINES,
    "lines.ndjson": "\n" + LINES.replace("\n", "\n\n"),
    "crlf.jsonl": LINES.replace("}\n", "}\r\n"),
    "list.jsonl": json.dumps(ROWS),
    "pretty_list.jsonl": json.dumps(ROWS, indent=2),
    "pretty_rows.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "side_by_side.json": "".join(map(json.dumps, ROWS)),
    "data_key.json": json.dumps({"version": "1.0", "data": ROWS}),
    "other_key.json": json.dumps({"version": 1, "questions": ROWS}),
    "lines.jsonlines": LINES,
    "splits.json": json.dumps({"test": ROWS[:1], "train": ROWS}, indent=1),
    "columns.json": json.dumps(COLUMNS),
    "index.json": json.dumps({str(i): row for i, row in enumerate(ROWS)}),
    "split_columns.json": json.dumps(
        {"columns": list(ROWS[0]), "index": [0, 1, 2], "data": [list(r.values()) for r in ROWS]}
    ),
    "lists.json": json.dumps({name: list(column.values()) for name, column in COLUMNS.items()}),
    "a.csv": delimited(","),
    "semicolon.csv": delimited(";"),
    "crlf.csv": delimited(",", "\r\n"),
    "old_mac.csv": delimited(",", "\r"),
    "tabs.csv": delimited("\t"),
    "a.tsv": delimited("\t"),
    "bars.csv": delimited("|"),
    "excel.csv": "sep=;\n" + delimited(";"),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_layout_gives_the_same_rows(tmp_path: Path, name: str, encoding: str) -> None:
    """What is in a file says how it is read, and a byte order mark says its encoding."""
    (tmp_path / name).write_bytes(TEXTS[name].encode(encoding))
    assert list(iterate_file(tmp_path / name)) == ROWS


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": gzip.compress,
    ".zst": lambda raw: pyarrow.compress(raw, codec="zstd", asbytes=True),
    ".lz4": lambda raw: pyarrow.compress(raw, codec="lz4", asbytes=True),
}  # fmt: skip


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["lines.JSONL", "a.csv"])
def test_compressed_files_are_read(tmp_path: Path, ending: str, name: str) -> None:
    """The first bytes say the compression, whatever the name."""
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(COMPRESS[ending](TEXTS[name].encode()))
    assert list(iterate_file(path)) == ROWS


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow", "a.feather"])
def test_columnar_files_are_read(tmp_path: Path, name: str) -> None:
    """Arrow files are of two kinds, a file (Feather) and a stream (of datasets)."""
    table, path = pyarrow.Table.from_pylist(ROWS), tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, path)
    elif name == "stream.arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.feather.write_feather(table, path)
    assert list(iterate_file(path)) == ROWS


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("One\r\ntwo.\n\n \nThree.\n", ["One\ntwo.", "Three."]),
        ("One.\ntwo.", ["One.", "two."]),
        ("\n\nOne.\n", ["One."]),
        ("", []),
    ],
)
def test_a_text_is_read_by_paragraphs(tmp_path: Path, text: str, rows: list[str]) -> None:
    """Blank lines part paragraphs; a text without them has a row in each line."""
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    assert [row["text"] for row in iterate_file(tmp_path / "a.txt")] == rows


def test_a_large_field_is_read(tmp_path: Path) -> None:
    """The csv module's own bound is 131,072 characters."""
    (tmp_path / "a.csv").write_text(f"a,b\n{'x' * 200_000},y\n", encoding="utf-8")
    assert [len(row["a"]) for row in iterate_file(tmp_path / "a.csv")] == [200_000]


def test_arrows_maps_are_objects(tmp_path: Path) -> None:
    """Not lists of pairs, as pyarrow has them by itself."""
    message = pyarrow.map_(pyarrow.string(), pyarrow.string())
    column = pyarrow.array([[[("role", "user"), ("content", "a")]]], pyarrow.list_(message))
    table = pyarrow.table({"messages": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    for name in ("a.parquet", "a.feather"):
        (row,) = iterate_file(tmp_path / name)
        assert row == {"messages": [{"role": "user", "content": "a"}]}


def test_lists_and_strings_are_rows(tmp_path: Path) -> None:
    """A row that is a list is a conversation, one that is a string is a text."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.json").write_text(json.dumps([turns, turns]), encoding="utf-8")
    assert list(iterate_file(tmp_path / "a.json")) == [{"messages": turns}] * 2
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(turns)}\n" * 2, encoding="utf-8")
    assert list(iterate_file(tmp_path / "b.jsonl")) == [{"messages": turns}] * 2
    (tmp_path / "c.json").write_text('["a", "b"]', encoding="utf-8")
    assert list(iterate_file(tmp_path / "c.json")) == [{"text": "a"}, {"text": "b"}]
    (tmp_path / "d.json").write_text(json.dumps({"messages": turns}), encoding="utf-8")
    assert list(iterate_file(tmp_path / "d.json")) == [{"messages": turns}]


def test_a_split_that_a_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    """Another one's rows are not taken for it."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}), encoding="utf-8")
    assert list(iterate_file(path, split="test")) == ROWS[:1]
    with pytest.raises(ValueError, match=r"data\.split is validation, but the file holds train"):
        list(iterate_file(path, split="validation"))


@pytest.mark.parametrize("answers", [1, 2])
def test_the_messages_of_the_only_row_are_no_rows(tmp_path: Path, answers: int) -> None:
    """A file of one row, whose columns are lists of messages."""
    messages = [{"role": "assistant", "content": "b"}] * answers
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": messages}
    for one in (row, {"dialogue": messages, "id": 1}):
        (tmp_path / "a.jsonl").write_text(json.dumps(one), encoding="utf-8")
        assert list(iterate_file(tmp_path / "a.jsonl")) == [one]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xe9"}\n', r"line 3 is not UTF-8 \(byte 0xE9"),
        ("a.csv", b"a\nb\n\xe9\n", "line 3 is not UTF-8.*such as data.encoding=cp1252"),
        ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', "line 3 is malformed: its quoted field does not end"),
        ("a.csv", b'a,b\n"1\n2",3\n\n4\n', "line 5 is malformed: it has 1 fields, line 1 has 2"),
        ("a.csv", b"a,b,a\n1,2,3\n", "line 1 names the column 'a' twice"),
        ("a.json", b'[\n{"a": 1},\n]', "line 3, column 1 is not JSON"),
        ("a.jsonl", b'{"a":\n{"a": 1}\n{"a": 1}\n', "line 1, column"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1},\n', "line 2, column 9 is not JSON"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", "line 1"),
        ("a.json", b"\xff\xfea", "is not UTF-16"),
        ("a.json.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-20], "damaged|to its end"),
        ("a.json", b"PK\x03\x04", "zip archive; unpack"),
        ("a.jsonl", POINTER, r"a\.jsonl is a Git LFS pointer.*`git lfs pull` in its repository"),
        ("a.csv", POINTER, r"a\.csv is a Git LFS pointer"),
        ("a.txt", POINTER, r"a\.txt is a Git LFS pointer"),
        ("a.parquet", POINTER, r"a\.parquet is a Git LFS pointer"),
        ("a.arrow", POINTER, r"a\.arrow is a Git LFS pointer"),
        ("a.xls", b"", "rows are read from .jsonl"),
        ("a.arrow", b"xx", "not an Arrow file"),
    ],
)
def test_a_fault_names_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Not the line before, after, or the last of the file."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(iterate_file(tmp_path / name))


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16-le", "shift-jis"])
def test_another_encoding_is_read_by_its_name(tmp_path: Path, encoding: str) -> None:
    """data.encoding is one that Python knows."""
    text = '{"a": "ア"}\n' if encoding == "shift-jis" else '{"a": "é"}\n'
    (tmp_path / "a.jsonl").write_bytes(text.encode(encoding) * 2)
    rows = list(iterate_file(tmp_path / "a.jsonl", encoding=encoding))
    assert rows == [json.loads(text)] * 2


def test_json_lines_are_not_held(tmp_path: Path) -> None:
    """The first rows come before a fault further down is met."""
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' * 3 + "x\n", encoding="utf-8")
    assert len(list(islice(iterate_file(tmp_path / "a.jsonl"), 3))) == 3


@pytest.mark.parametrize("layout", ["list", "one line", "rows", "data.jsonl"])
def test_a_large_text_is_held_in_parts(tmp_path: Path, layout: str) -> None:
    """The rows of a list, in lines or in one line, come before a fault further down is met."""
    rows = [{"instruction": f"Say é {n}.", "output": "日本 " * 999} for n in range(3000)]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = {
        "list": "[\n" + ",\n".join(texts) + ",\n x]",
        "one line": "[" + ", ".join(texts) + ", x]",
        "rows": "\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in rows) + "\nx",
        "data.jsonl": "\n".join(texts) + "\nx",
    }[layout]
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    tracemalloc.start()
    read = iterate_file(path)
    assert all(row == one for row, one in zip(islice(read, 2999), rows, strict=False))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size * 3 / 4
    last = text.rfind("\n") + 1
    place = f"line {text[:last].count(chr(10)) + 1}, column {text.rfind('x') - last + 1}"
    with pytest.raises(ValueError, match=f"{place} is not JSON"):
        list(read)


def test_a_long_line_of_json_lines_is_one_row(tmp_path: Path) -> None:
    """Also beyond the piece that a line is read in; its bad byte has its position."""
    row = {"text": "é" * (LONG_LINE // 2 + 7)}
    line = json.dumps(row, ensure_ascii=False).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n\n" + line + b"\n")
    assert list(iterate_file(path)) == [row, row]
    path.write_bytes(line + b"\n" + line[:-2] + b'\xe9"}\n')
    with pytest.raises(ValueError, match=rf"line 2 is not UTF-8 .* position {len(line) - 1}\)"):
        list(iterate_file(path))


@pytest.mark.parametrize("last", ['[{"a": 1}]\n[{"a": 2}]', '[{"a": 1}] {"a": 2}'])
def test_what_follows_a_list_of_rows_is_named(tmp_path: Path, last: str) -> None:
    """It is neither dropped nor taken for a row."""
    (tmp_path / "a.json").write_text(last.replace("[{", "[\n{"), encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON: more follows the list of rows"):
        list(iterate_file(tmp_path / "a.json"))
