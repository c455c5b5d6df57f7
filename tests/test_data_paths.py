"""Paths of data: files, folders, globs, saved data sets and cached hub data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from finetune.config.schema import DataConfig
from finetune.data.dataset import find_sources
from finetune.data.sources import read_rows
from tests.conftest import write_rows


def rows_of(*numbers: int) -> list[Any]:
    return [{"text": str(number)} for number in numbers]


def read(path: Path | str, **settings: Any) -> list[Any]:
    (source,) = find_sources(DataConfig(path=str(path), **settings))
    return [dict(row) for row in read_rows(source)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of two files in different formats, with notes beside them."""
    write_rows(tmp_path / "a.jsonl", rows_of(1, 2))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.csv").write_text("text\n3\n", encoding="utf-8")
    (tmp_path / "LICENSE.txt").write_text("As you like.\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("# Rows\n", encoding="utf-8")
    return tmp_path


def test_a_folder_is_its_data_files(folder: Path) -> None:
    """In the order of their names, without what is no data."""
    assert read(folder) == rows_of(1, 2, 3)


def test_a_readme_without_a_head_is_no_card(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The hub's library does not say that it lacks one."""
    assert read(folder) == rows_of(1, 2, 3)
    assert "card" not in capsys.readouterr().err + caplog.text


def test_the_splits_of_a_folder_are_those_of_its_names(folder: Path) -> None:
    """As datasets has it: rows to test on are not trained on by accident."""
    (folder / "LICENSE.txt").unlink()
    write_rows(folder / "train.jsonl", rows_of(4))
    write_rows(folder / "test.jsonl", rows_of(5))
    assert read(folder) == rows_of(4)
    assert read(folder, split="test") == rows_of(5)
    with pytest.raises(ValueError, match=r"data.split is dev, but the files of the folder are of"):
        read(folder, split="dev")


def test_a_card_says_the_files_of_its_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone of a hub data set is read as the hub has it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    card = "---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    assert read(folder) == rows_of(1, 2)
    assert read(folder, split="train[:50%]") == rows_of(1)


def test_a_glob_is_every_file_that_matches(folder: Path) -> None:
    """In the order of their names, in folders below with two stars."""
    assert read(folder / "*.jsonl") == rows_of(1, 2)
    assert read(folder / "**" / "*.csv") == rows_of(3)
    with pytest.raises(ValueError, match=r"data.path=.*\*.xml: the glob matches no file"):
        read(folder / "*.xml")


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    """One, and one of several splits."""
    Dataset.from_list(rows_of(1, 2)).save_to_disk(tmp_path / "one")
    splits = {"train": Dataset.from_list(rows_of(1, 2, 3)), "test": Dataset.from_list(rows_of(4))}
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "one") == rows_of(1, 2)
    assert read(tmp_path / "both", split="test") == rows_of(4)
    assert read(tmp_path / "both", split="train[1:]") == rows_of(2, 3)
    with pytest.raises(ValueError, match=r"data.split is dev, but the saved data set has"):
        read(tmp_path / "both", split="dev")


@pytest.mark.parametrize(
    ("split", "numbers"),
    [("train", range(10)), ("train[:10%]", [0]), ("train[-2:]", [8, 9]), ("train[2:4]", [2, 3])],
)
def test_a_slice_of_any_file_is_taken(tmp_path: Path, split: str, numbers: Any) -> None:
    """In the words of datasets, by number and by share."""
    path = write_rows(tmp_path / "a.jsonl", rows_of(*range(10)))
    assert read(path, split=split) == rows_of(*numbers)


@pytest.mark.parametrize("split", ["test", "validation[:10%]"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "*.jsonl"])
def test_a_split_of_a_file_without_splits_is_refused(tmp_path: Path, name: str, split: str) -> None:
    """Its rows are not taken for those of the split; the remedy is named."""
    write_rows(tmp_path / "a.jsonl", rows_of(1, 2))
    (tmp_path / "a.csv").write_text("text\n1\n2\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows_of(1, 2), indent=1), encoding="utf-8")
    assert read(tmp_path / name, split="train[:2]") == rows_of(1, 2)
    fault = rf"data.split is {split.partition('[')[0]}, but .* splits .* set data.split=train$"
    with pytest.raises(ValueError, match=fault):
        read(tmp_path / name, split=split)


def test_rows_to_validate_on_need_not_be_of_the_split(tmp_path: Path) -> None:
    """data.split is of data.path, which may hold splits where the other file holds none."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": rows_of(1), "test": rows_of(2)}), encoding="utf-8")
    other = write_rows(tmp_path / "b.jsonl", rows_of(3))
    data = DataConfig(path=str(path), split="test", validation_path=str(other))
    assert [read_rows(one) for one in find_sources(data)] == [rows_of(2), rows_of(3)]


def test_a_malformed_slice_is_refused(tmp_path: Path) -> None:
    """With the setting and what was given."""
    path = write_rows(tmp_path / "a.jsonl", rows_of(1))
    with pytest.raises(ValueError, match=r"data.split=train\[:x\]"):
        read(path, split="train[:x]")


def test_a_fault_in_a_folder_names_the_file(folder: Path) -> None:
    """And its line."""
    (folder / "a.jsonl").write_text('{"text": "1"}\nx\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"data.path=.*: .*a.jsonl: line 2, column 1 is not JSON"):
        read(folder)


def test_the_content_names_the_rows(folder: Path) -> None:
    """A file that changes changes the digest, whichever it is; another encoding does so too."""

    def digest(path: Path, **settings: Any) -> str:
        return find_sources(DataConfig(path=str(path), **settings))[0].digest

    before = digest(folder)
    assert digest(folder) == before
    (folder / "more" / "b.csv").write_text("text\n4\n", encoding="utf-8")
    assert digest(folder) != before
    file = folder / "a.jsonl"
    assert digest(file) != digest(file, encoding="cp1252")
    assert digest(file) == digest(file, encoding="utf-8")


@pytest.mark.usefixtures("folder")
def test_a_hub_data_set_is_read_from_the_hub_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are enough, where the hub cannot be reached."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    write_rows(snapshot / "train-0.jsonl", rows_of(1))
    write_rows(snapshot / "train-1.jsonl", rows_of(2))
    (snapshot / "test.json").write_text(json.dumps(rows_of(3)), encoding="utf-8")
    import datasets

    load = datasets.load_dataset

    def offline(path: str, *args: Any, **settings: Any) -> Any:
        if path == "own/rows":
            raise ConnectionError("Couldn't reach 'own/rows' on the Hub")
        return load(path, *args, **settings, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr("datasets.load_dataset", offline)
    monkeypatch.setattr("finetune.data.sources.hub_commit", lambda *_, **__: "c0ffee")
    monkeypatch.setattr("finetune.data.sources.cached_folder", lambda *_, **__: snapshot)
    assert read("own/rows") == rows_of(1, 2)
    assert read("own/rows", split="test") == rows_of(3)
    monkeypatch.setattr("finetune.data.sources.cached_folder", lambda *_, **__: None)
    with pytest.raises(ValueError, match="the hub cannot be reached; name a local folder"):
        read("own/rows")
