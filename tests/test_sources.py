"""Rows in files: found, and read alike whatever the kind; a malformed one names the place."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetune.config.schema import DataConfig
from finetune.data.dataset import find_problems, find_sources
from finetune.data.sources import RowStream, read_rows
from tests.conftest import write_rows

ROWS: list[dict[str, Any]] = [
    {"instruction": f"Say {i}.", "input": "" if i % 2 else "loud", "output": f"It is {i}."}
    for i in range(10)
]


def read(path: Path) -> list[Any]:
    (source,) = find_sources(DataConfig(path=str(path)))
    return read_rows(source)


def test_all_file_kinds_give_the_same_rows(tmp_path: Path) -> None:
    """json, jsonl, csv and parquet are read alike."""
    write_rows(tmp_path / "a.jsonl", list(ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert read(tmp_path / f"a.{kind}") == ROWS


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_mark_before_the_first_column_is_not_part_of_its_name(tmp_path: Path, kind: str) -> None:
    """Spreadsheets write one; the column would be missing, and an optional one unnoticed."""
    path = tmp_path / f"a.{kind}"
    texts = {
        "jsonl": '{"input": "x", "output": "y"}\n',
        "json": '[{"input": "x", "output": "y"}]',
        "csv": "input,output\nx,y\n",
    }
    path.write_text(texts[kind], encoding="utf-8-sig")
    assert read(path) == [{"input": "x", "output": "y"}]


def test_a_named_part_of_a_hub_data_set_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """`data.subset` is what the library calls a configuration; without one it is asked for."""

    def load(path: str, name: str | None, *, revision: str, split: str) -> list[dict[str, str]]:
        if name is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main']"
                "\nExample of usage:\n\t`load_dataset('a/b', 'main')`"
            )
        return [{"text": f"{path} {name} {revision} {split}"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("finetune.data.sources.hub_commit", lambda *_, **__: "c0ffee")
    (source,) = find_sources(DataConfig(path="a/b", subset="main", split="test"))
    assert read_rows(source) == [{"text": "a/b main c0ffee test"}]
    (source,) = find_sources(DataConfig(path="a/b"))
    with pytest.raises(ValueError, match=r"configs: \['main'\]; set data.subset=NAME$"):
        read_rows(source)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction":\n', "line 2, column"),
        ("a.jsonl", "[1]\n", "row 1 is not a row of named fields"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", '[{"instruction": "a"},\n}]', "line 2, column"),
        ("a.json", '{"rows": []}', "holds no rows"),
        ("a.csv", "instruction,output\na,b\na,b,c\n", "line 3 is malformed"),
        ("a.csv", "instruction,output\na\n", "line 2 is malformed"),
        ("a.parquet", "no parquet", "is not a parquet file"),
        ("a.xlsx", "text", "rows are read from .jsonl, .json, .ndjson, .csv, .tsv"),
        ("a.jsonl", '{"question": "a", "output": "b"}\n', "no column 'instruction'.*columns are"),
    ],
)
def test_a_malformed_file_names_the_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    """The line, the column or the kind is told, with the file."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    (problem,) = find_problems(DataConfig(path=str(path)), None)
    assert re.search(message, problem)
    assert f"data.path={path}" in problem


def test_a_missing_file_is_told_with_its_full_path() -> None:
    """What was looked for, and where."""
    with pytest.raises(FileNotFoundError, match=r"data.path=rows.jsonl: there is no file /"):
        find_sources(DataConfig(path="rows.jsonl"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_are_read_at_each_pass(tmp_path: Path, suffix: str) -> None:
    """A stream of rows has the list's rows, length and places, and holds none of them."""
    rows = [{"n": str(n)} for n in range(3000)]
    path = tmp_path / f"rows{suffix}"
    writers: dict[str, Any] = {
        ".jsonl": lambda: write_rows(path, list(rows)),
        ".json": lambda: path.write_text(json.dumps(rows)),
        ".csv": lambda: path.write_text("n\n" + "".join(f"{row['n']}\n" for row in rows)),
        ".parquet": lambda: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    }
    writers[suffix]()
    (source,) = find_sources(DataConfig(path=str(path)))
    stream = RowStream(source)
    assert list(stream) == list(stream) == read_rows(source) == rows
    assert (len(stream), stream[0], stream[-1], stream[7:9]) == (3000, rows[0], rows[-1], rows[7:9])
    with pytest.raises(IndexError, match="has no row 3000"):
        stream[3000]
