"""Rows: every one is read, checked, counted, put into the prompt and masked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from finetune.config import DataConfig, ModelConfig, TrainingConfig
from finetune.data import IGNORED, Examples, build_examples, find_data, read_rows
from finetune.models import find_model, load_tokenizer
from tests.conftest import write_rows

ROWS: list[dict[str, Any]] = [
    {"instruction": f"Say {i}.", "input": "" if i % 2 else "loud", "output": f"It is {i}."}
    for i in range(10)
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    model = ModelConfig(path="random://tiny")
    return load_tokenizer(model, find_model(model))


def read(path: Path, **settings: Any) -> list[Any]:
    data = DataConfig(path=str(path), **settings)
    return read_rows(data, find_data(data))


def build(rows: list[Any], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Examples:
    training = TrainingConfig(max_length=settings.pop("max_length", 512))
    return build_examples(rows, DataConfig(**settings), training, tokenizer)


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


def test_the_prompt_is_alpacas_and_only_the_response_is_learned(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The text around the fields is Stanford Alpaca's, the labels are the response and its end."""
    (example,) = build([ROWS[0]], tokenizer).train
    text = tokenizer.decode(example["input_ids"])
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay 0.\n\n### Input:\nloud\n\n### Response:\nIt is 0.</s>"
    )
    learned = [t for t in example["labels"] if t != IGNORED]
    assert tokenizer.decode(learned) == "It is 0.</s>"
    (without,) = build([ROWS[1]], tokenizer).train
    assert "### Input" not in tokenizer.decode(without["input_ids"])


def test_without_a_mask_all_but_the_first_token_is_learned(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """data.mask_prompt=false learns the prompt too."""
    (example,) = build([ROWS[1]], tokenizer, mask_prompt=False).train
    assert example["labels"][0] == IGNORED
    assert example["labels"][1:] == example["input_ids"][1:]


def test_every_row_left_out_or_cut_is_counted_with_its_reason(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Nothing vanishes without a number."""
    rows = [
        *ROWS,
        {"instruction": "", "input": "", "output": "x"},
        {"instruction": "x", "input": None, "output": None},
        {"instruction": 7, "input": "", "output": "x"},
        {"instruction": "y", "input": "", "output": "long " * 100},
        {"instruction": "long " * 200, "input": "", "output": "x"},
        {"instruction": " ", "input": "", "output": "x"},
    ]
    built = build(rows, tokenizer, max_length=300)
    assert built.counts.dropped == {
        "instruction is empty": 2,
        "output is null": 1,
        "instruction is not text": 1,
        "prompt alone fills training.max_length=300": 1,
    }
    assert built.counts.first["instruction is empty"] == 11
    assert built.counts.truncated == 1
    assert (built.counts.read, built.counts.drawn, len(built.train)) == (16, 11, 11)
    assert "2 dropped (instruction is empty; first: row 11)" in built.counts.summary()


def test_nothing_left_is_an_error_with_the_first_row(tokenizer: PreTrainedTokenizerBase) -> None:
    """A file of unusable rows names the first."""
    rows = [{"instruction": "x", "input": "", "output": ""}] * 3
    with pytest.raises(ValueError, match=r"no row is left.*output is empty; first: row 1"):
        build(rows, tokenizer)


def test_rows_are_drawn_by_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    """The same seed draws the same rows, another one others, and never more than there are."""

    def drawn(seed: int, num_examples: int) -> list[list[int]]:
        training = TrainingConfig(seed=seed)
        data = DataConfig(num_examples=num_examples)
        return [e["input_ids"] for e in build_examples(ROWS, data, training, tokenizer).train]

    assert drawn(1, 5) == drawn(1, 5) != drawn(2, 5)
    assert len(drawn(1, 5)) == 5
    assert len(drawn(1, 50)) == 10


def test_the_validation_share_is_apart_from_training(tokenizer: PreTrainedTokenizerBase) -> None:
    """Held-out rows are not trained on, and together they are all rows."""
    built = build(ROWS, tokenizer, validation_fraction=0.3)
    train = {tuple(e["input_ids"]) for e in built.train}
    validation = {tuple(e["input_ids"]) for e in built.validation}
    assert (len(train), len(validation), len(train | validation)) == (7, 3, 10)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction":\n', "line 2, column"),
        ("a.jsonl", "[1]\n", "line 1 is not a row of named fields"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", '[{"instruction": "a"},\n}]', "line 2, column"),
        ("a.json", '{"rows": []}', "a .json file is one list of rows"),
        ("a.csv", "instruction,output\na,b\na,b,c\n", "line 3 is malformed"),
        ("a.csv", "instruction,output\na\n", "line 2 is malformed"),
        ("a.parquet", "no parquet", "is not a parquet file"),
        ("a.txt", "text", "rows are read from .jsonl, .json, .csv, .parquet"),
        ("a.jsonl", '{"question": "a", "output": "b"}\n', "no column 'instruction'.*columns are"),
    ],
)
def test_a_malformed_file_names_the_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    """The line, the column or the kind is told, with the file."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_told_with_its_full_path() -> None:
    """What was looked for, and where."""
    with pytest.raises(FileNotFoundError, match=r"data.path=rows.jsonl: there is no file /"):
        find_data(DataConfig(path="rows.jsonl"))


def test_columns_can_be_named(tmp_path: Path) -> None:
    """data.columns maps the template's fields to the file's columns."""
    path = write_rows(tmp_path / "a.jsonl", [{"q": "a", "output": "b"}])
    assert read(path, columns={"instruction": "q"}) == [{"q": "a", "output": "b"}]


def test_real_alpaca_rows_are_all_accounted_for(
    shared_data: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rows used and dropped add up to the rows of the file."""
    rows = read(shared_data / "alpaca_999.jsonl")
    built = build(rows, tokenizer, max_length=1024)
    assert built.counts.drawn + sum(built.counts.dropped.values()) == len(rows) == 999
