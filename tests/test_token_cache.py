"""Rows are tokenised once, to the tokens that they have one by one, in bounded memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest
from transformers import PreTrainedTokenizerBase

from finetune.config.inputs import DataSource
from finetune.config.schema import DataConfig, TrainingConfig
from finetune.data import dataset, row_encoding, templates, text_sections, token_cache
from finetune.data.dataset import (
    Examples,
    build_examples,
    find_sources,
    longest_batch,
    read_sources,
)
from finetune.data.templates import load_template
from finetune.data.token_rows import as_dataset, example_lengths
from finetune.data.turns import Turn, Unusable
from tests.conftest import TINY, Command, write_rows

ROWS: list[Any] = [
    {"instruction": f"Say {n}.", "input": "" if n % 3 else None, "output": "word " * (n % 17)}
    for n in range(300)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many rows were tokenised, at each time."""
    counted: list[int] = []

    real = row_encoding._encode_rows

    def count(rows: Any, *given: Any) -> list[Any]:
        counted.append(len(rows))
        return real(rows, *given)

    monkeypatch.setattr(row_encoding, "_encode_rows", count)
    return counted


def build(path: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Examples:
    training = TrainingConfig(
        max_length=settings.pop("max_length", 256), seed=settings.pop("seed", 42)
    )
    section = DataConfig(path=str(path), **settings)
    return build_examples(read_sources(find_sources(section)), section, training, tokenizer)


def in_memory(tokenizer: PreTrainedTokenizerBase, rows: list[Any], **settings: Any) -> Examples:
    """Build the same without a cache."""
    training = TrainingConfig(
        max_length=settings.pop("max_length", 256), seed=settings.pop("seed", 42)
    )
    section = DataConfig(path="rows.jsonl", **settings)
    key, own = next(iter(section.sources().items()))
    read = [(DataSource(key, own.path, "", own), rows)]
    return build_examples(read, section, training, tokenizer)


def test_runs_that_differ_in_their_draw_share_the_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, encoded: list[int]
) -> None:
    """Seeds, splits and num_examples are an index into the same rows; so is a changed path."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    settings: list[dict[str, Any]] = [
        {}, {"seed": 1, "validation_fraction": 0.2}, {"num_examples": 200}, {"num_examples": 250},
    ]  # fmt: skip
    built = [build(path, tokenizer, **dict(one)) for one in settings]
    assert sum(encoded) == built[0].counts.drawn == 282
    for one, found in zip(settings, built, strict=True):
        assert found == in_memory(tokenizer, ROWS, **dict(one))
    encoded.clear()
    assert build(path.rename(tmp_path / "moved.jsonl"), tokenizer) == built[0]
    assert encoded == []


@pytest.mark.parametrize(
    "change",
    [{"max_length": 250}, {"mask_prompt": False}, {"columns": {"output": "instruction"}}],
)
def test_what_changes_tokens_is_tokenised_anew(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, encoded: list[int], change: Any
) -> None:
    """Lengths, masks, columns, the rows themselves, and the tokenizer."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    build(path, tokenizer)
    encoded.clear()
    assert build(path, tokenizer, **dict(change)) == in_memory(tokenizer, ROWS, **dict(change))
    assert sum(encoded) > 282  # with those in memory
    encoded.clear()
    tokenizer.add_tokens(["word word"])
    build(path, tokenizer)
    assert sum(encoded) == 282


def test_few_rows_of_many_are_tokenised_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, encoded: list[int]
) -> None:
    """Each draw by its seed, once."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    for _ in range(2):
        for seed in (1, 2):
            built = build(path, tokenizer, num_examples=20, seed=seed)
            assert built.counts.drawn == 20
    assert encoded == [20, 20]


def test_the_largest_batch_is_found_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, encoded: list[int]
) -> None:
    """Planning tokenises the longest rows alone, and not at all the second time."""
    section = DataConfig(path=str(write_rows(tmp_path / "rows.jsonl", ROWS)))
    training = TrainingConfig(batch_size=2)
    read = read_sources(find_sources(section))
    longest = sorted(example_lengths(build(Path(str(section.path)), tokenizer).train))[-2:]
    encoded.clear()
    for _ in range(2):
        assert longest_batch(read, section, training, tokenizer) == sum(longest)
    assert encoded == [16]


@pytest.mark.parametrize("template", ["alpaca", "text", "chat"])
def test_rows_tokenised_together_have_the_tokens_of_each_alone(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    """Also where one of them cannot be tokenised, which is that row's fault alone."""
    chosen = load_template(template)
    turns = [
        [Turn("user", f"Say {n}.\n"), Turn("assistant", "It is.\n" * (n % 5 + 1))]
        for n in range(50)
    ]
    turns[7] = [Turn("user", "half \ud800"), Turn("assistant", "x")]
    turns[9] = [Turn("user", "one"), Turn("assistant", "</s>"), *turns[3]]

    def alone(row: Any) -> Any:
        try:
            return chosen.encode(row, tokenizer)
        except Unusable as fault:
            return str(fault)

    found = row_encoding._encode_rows(turns, chosen, tokenizer)
    together = [str(one) if isinstance(one, Unusable) else one for one in found]
    assert together == [alone(row) for row in turns]


def test_the_trainer_gets_the_same_rows_as_a_list(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Lazy rows are lists of Python integers wherever one is asked for."""
    train = build(write_rows(tmp_path / "rows.jsonl", ROWS), tokenizer).train
    rows = list(train)
    assert as_dataset(train).to_list() == rows
    assert [train[-1], train[0], list(train[3:9:2])] == [rows[-1], rows[0], rows[3:9:2]]
    assert example_lengths(train).tolist() == [len(row["input_ids"]) for row in rows]
    with pytest.raises(IndexError):
        train[len(rows)]


def test_long_rows_are_tokenised_a_few_at_a_time(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bounded by their characters, since a part is held in memory with its tokens."""
    rows = [{"instruction": "Say.", "input": "", "output": "word " * 100} for _ in range(10)]
    monkeypatch.setattr(text_sections, "TOGETHER_CHARACTERS", 1200)
    built = build(write_rows(tmp_path / "rows.jsonl", [*rows]), tokenizer)
    assert encoded == [2, 2, 2, 2, 2]
    assert built == in_memory(tokenizer, [*rows])


@pytest.mark.parametrize("is_enabled", [True, False])
def test_garbage_is_collected_between_batches_alone(is_enabled: bool) -> None:
    """And the collector is left as it was, also where making a batch fails."""

    def make() -> Iterator[Any]:
        for number in range(2):
            states.append(gc.isenabled())
            yield number
        raise ValueError("a malformed line")

    states: list[bool] = []
    was_enabled = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        batches = token_cache._without_collection(make())
        for _ in range(2):
            next(batches)
            assert gc.isenabled() == is_enabled
        with pytest.raises(ValueError, match="malformed"):
            next(batches)
        assert gc.isenabled() == is_enabled
        assert states == [False, False]
    finally:
        (gc.enable if was_enabled else gc.disable)()


@pytest.mark.slow
def test_a_sweep_tokenises_once_and_a_second_one_not_at_all(
    tmp_path: Path, finetune: Command
) -> None:
    """Nine runs, and then nine others, read one table of tokens that is never written again."""
    grid = ["evaluation=none", "training.epochs=1", "lora.r=2,4,8", "--multirun"]
    tables = []
    for rates in ("1e-3,2e-3,3e-3", "4e-3,5e-3,6e-3"):
        done = finetune(*TINY, *grid, f"optimizer.lr={rates}")
        assert done.returncode == 0, done.stderr
        found = {
            path: path.stat().st_ino for path in (tmp_path / "cache" / "tokens").glob("*.arrow")
        }
        tables.append(found)
    assert tables[0] == tables[1]
    opened = [pyarrow.ipc.open_file(pyarrow.memory_map(str(path))) for path in tables[0]]
    assert sum("input_ids" in file.schema.names for file in opened) == 1


def test_nine_runs_of_a_sweep_tokenise_once_and_nine_others_not_at_all(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, encoded: list[int]
) -> None:
    """Whatever their seeds and their shares of rows to validate on."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    for sweep in range(2):
        for seed in range(3):
            for share in (0.0, 0.1, 0.2):
                built = build(path, tokenizer, seed=3 * sweep + seed, validation_fraction=share)
                assert built.counts.drawn == 282
        assert sum(encoded) == 282


def test_rows_that_are_not_drawn_are_not_rendered_anew(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read and checked once; of each draw only its rows are rendered."""
    template, rendered = load_template("alpaca"), []

    def render(fields: Any) -> list[Turn]:
        rendered.append(fields)
        return template.render(fields)

    monkeypatch.setitem(templates.BY_NAME, "alpaca", replace(template, render=render))
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert build(path, tokenizer, num_examples=20).counts.drawn == 20
    assert len(rendered) == 300 + 20


CHAT = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": "No"}]}
    for n in range(9)
]
FAULTY: list[Any] = [
    *ROWS[1:9],
    {"instruction": None, "input": "", "output": "x"},
    {"instruction": "A half", "input": "", "output": "\ud800"},
    {"question": "Why?", "answer": "So."},
    {"instruction": "Later", "input": "", "output": "x", "source": "a later column"},
    *ROWS[9:20],
    {"instruction": "Say.", "input": "", "output": ""},
]


@pytest.mark.parametrize(
    ("files", "settings"),
    [
        ([FAULTY], {}),
        ([FAULTY[:3], FAULTY[3:12], ROWS[20:30]], {"validation_fraction": 0.2}),
        ([[*CHAT, {"messages": []}, {"text": "no conversation"}]], {"prompt_template": "chat"}),
        ([[{"text": "word " * 900}, {"text": None}]], {"prompt_template": "text"}),
        ([[{"text": "word " * 900}]], {"prompt_template": "text", "long_text": "cut"}),
        ([[{"instruction": "Say.", "output": ""}] * 9], {}),
    ],
)
@pytest.mark.parametrize("batch_rows", [1, 4, 4096])
def test_rows_checked_as_they_are_tokenised_have_the_tables_of_two_passes(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    files: list[list[Any]],
    settings: dict[str, Any],
    batch_rows: int,
) -> None:
    """Faults, sizes, what is said of all rows, and tokens, whatever the batches."""
    monkeypatch.setattr(token_cache, "BATCH_ROWS", batch_rows)
    (tmp_path / "rows").mkdir()
    for number, rows in enumerate(files):
        write_rows(tmp_path / "rows" / f"{number}.jsonl", rows)
    section = DataConfig(path=str(tmp_path / "rows"), **settings)
    training = TrainingConfig(max_length=256)
    read = read_sources(find_sources(section))

    def tables(name: str, *, at_once: bool) -> list[pyarrow.Table]:
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / name))
        source = dataset._token_source(*read[0], section, training, tokenizer)
        if not at_once:
            _ = source.checked
        tokens = source.all_tokens
        assert "checked" in vars(source)
        return [source.checked, tokens]

    one, two = tables("one", at_once=True), tables("two", at_once=False)
    assert [table.to_pylist() for table in one] == [table.to_pylist() for table in two]
    names = [
        sorted(path.name for path in (tmp_path / name / "tokens").glob("*.arrow"))
        for name in ("one", "two")
    ]
    assert names[0] == names[1]  # of keys, and of bytes
    assert len(names[0]) == 2


@pytest.mark.parametrize(
    ("settings", "passes"), [({}, 1), ({"num_examples": 200}, 2), ({"num_examples": 20}, 2)]
)
def test_rows_that_are_all_wanted_are_read_once(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    passes: int,
) -> None:
    """Where some are drawn, it takes a pass to see which ones can be."""
    started = []
    real = dataset._sound_rows

    def count(*given: Any) -> Any:
        started.append(given)
        return real(*given)

    monkeypatch.setattr(dataset, "_sound_rows", count)
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    built = build(path, tokenizer, **dict(settings))
    assert len(started) == passes
    assert built == in_memory(tokenizer, ROWS, **dict(settings))


def test_rows_are_tokenised_once_where_the_cache_cannot_be_written(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check made in the same pass is kept in memory as well."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    built = build(write_rows(tmp_path / "rows.jsonl", ROWS), tokenizer)
    assert sum(encoded) == 282
    assert built == in_memory(tokenizer, ROWS)
