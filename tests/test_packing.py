"""Rows packed into full sequences: as many tokens, the same steps, attention within each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.config import methods
from finetune.config.inputs import DataSource
from finetune.config.schema import Config, DataConfig, LoraConfig, ModelConfig, TrainingConfig
from finetune.data.dataset import Examples, build_examples
from finetune.data.row_counts import RowCounts
from finetune.data.token_rows import IGNORED, Example, pack, row_lengths
from finetune.models import adapters
from finetune.models.base_model import find_model, load_tokenizer
from finetune.pipeline import preflight
from finetune.pipeline.identity import find_inputs
from finetune.pipeline.memory_estimate import GIB, DeviceMemory
from finetune.tracking.run_folder import RunFolder
from finetune.training import trainer
from finetune.training.adapter_training import AdapterSpec
from finetune.training.multi_adapter import train_together
from finetune.training.row_order import rows_of_step
from tests.conftest import write_rows
from tests.test_loglikelihood import build
from tests.test_validation import WAYS, train_by
from tests.trainings import (
    CPU,
    TINY,
    Killed,
    Setting,
    broken_off,
    copied,
    equal,
    load,
    losses,
    random_examples,
    spec,
)


def joined(rows: list[Example]) -> Example:
    """Concatenate rows to one sequence."""
    return Example(
        input_ids=[token for row in rows for token in row["input_ids"]],
        labels=[label for row in rows for label in row["labels"]],
        seq_lengths=[len(row["input_ids"]) for row in rows],
    )


def given(folder: Path, rows: Sequence[Example], **settings: Any) -> AdapterSpec:
    """Return a run on these rows as they are."""
    one = spec(RunFolder(folder), Setting(training=settings))
    return replace(one, examples=Examples(rows, [], RowCounts()))


def test_every_row_is_in_one_sequence_whole() -> None:
    """With its labels; no sequence is too long, and they are nearly full."""
    rows = random_examples(1300)
    packed = pack(rows, 64)
    assert pack(rows, 64) == packed
    found = Examples(packed, [], RowCounts())
    assert sorted(map(str, found.all)) == sorted(map(str, rows))
    assert all(sum(row_lengths(one)) == len(one["input_ids"]) <= 64 for one in packed)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert len(packed) < 1.05 * tokens / 64
    assert found.is_packed
    assert not Examples(rows, [], RowCounts()).is_packed


def test_the_counts_say_how_many_sequences_and_how_full(tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows held out stay apart."""
    data = DataConfig(path="rows.jsonl", validation_fraction=0.25)
    source = DataSource("data.path", "rows.jsonl", "", data.sources()["data.path"])
    rows = [{"instruction": f"Say {n}.", "output": "word " * n} for n in range(1, 25)]
    settings = TrainingConfig(sequence_packing=True, max_length=600)
    built = build_examples([(source, rows)], data, settings, tokenizer)
    tokens = sum(len(example["input_ids"]) for example in built.train)
    assert sum(len(row_lengths(example)) for example in built.train) == 18
    assert [len(row_lengths(example)) for example in built.validation] == [1] * 6
    assert built.counts.sequences == len(built.train) < 18
    assert built.counts.fullness == pytest.approx(tokens / (600 * len(built.train)))
    said = f"packed into {len(built.train)} sequences, {built.counts.fullness:.1%} full"
    assert said in built.counts.summary()


@pytest.mark.parametrize("way", WAYS)
def test_a_sequence_of_rows_is_a_batch_of_them(tmp_path: Path, way: str) -> None:
    """Steps of two micro-batches of three rows: three apart, or one sequence of the same three."""
    rows = random_examples(24)
    apart = given(tmp_path / "apart", rows, batch_size=3)
    packed = given(tmp_path / "packed", rows, batch_size=1)
    sequences: list[Example] = [joined(rows)] * 8
    for step in range(4):
        batches = rows_of_step(step, 24, apart.arguments)
        for batch, (place,) in zip(batches, rows_of_step(step, 8, packed.arguments), strict=True):
            sequences[place] = joined([rows[row] for row in batch])
    packed = replace(packed, examples=Examples(sequences, [], RowCounts()))
    expected, alone = train_by(way, apart)
    weights, result = train_by(way, packed)
    assert equal(weights, expected)
    assert losses(tmp_path / "packed") == losses(tmp_path / "apart")
    assert result.steps == alone.steps == 4


@pytest.mark.parametrize("way", WAYS)
def test_a_row_does_not_see_the_one_before_it(tmp_path: Path, way: str) -> None:
    """Other tokens there leave the loss as it is, to the bit."""
    first, last = random_examples(8)[-2:]
    silent = Example(input_ids=first["input_ids"], labels=[IGNORED] * len(first["labels"]))
    other = replace_tokens(silent)
    for name, before in (("one", silent), ("other", other)):
        train_by(way, given(tmp_path / name, [joined([before, last])], max_steps=1))
    assert losses(tmp_path / "one") == losses(tmp_path / "other")


def replace_tokens(row: Example) -> Example:
    return Example(input_ids=[token // 2 + 5 for token in row["input_ids"]], labels=row["labels"])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_packed_runs_resume_bit_for_bit(tmp_path: Path, way: str) -> None:
    """With dropout and accumulation, killed behind a checkpoint."""
    settings: dict[str, Any] = {"batch_size": 2, "epochs": 3, "checkpoint_every": 2}
    sequences = pack(random_examples(24), 64)

    def run(folder: str) -> AdapterSpec:
        one = given(tmp_path / folder, sequences, **settings)
        return replace(one, lora=LoraConfig(r=4, dropout=0.1))

    expected, whole = train_by(way, run("whole"))
    with pytest.raises(Killed):
        train_by(way, broken_off(run("killed"), "train/loss", 4, "killed"))
    weights, resumed = train_by(way, run("killed"))
    assert equal(weights, expected)
    assert (resumed.steps, resumed.mean_loss) == (whole.steps, whole.mean_loss)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_packed_runs_of_a_group_are_those_alone(tmp_path: Path) -> None:
    """The sequences of several adapters are concatenated, with attention within each row."""
    sequences = pack(random_examples(24), 64)
    loras = [LoraConfig(r=2), LoraConfig(r=8, dropout=0.1)]

    def run(name: str, number: int) -> AdapterSpec:
        one = given(tmp_path / f"{name}{number}", sequences, batch_size=1, max_steps=3)
        return replace(one, lora=loras[number])

    specs = [run("together", number) for number in range(2)]
    ended = [(number, copied(weights)) for number, weights, _ in train_together(load(), specs, CPU)]
    for number, weights in ended:
        specs[number].events.close()
        expected, _ = train_by("ours", run("alone", number))
        assert equal(weights, expected)


def test_a_model_that_must_be_padded_is_refused(tmp_path: Path) -> None:
    """Before it trains, with the reason and the remedy."""
    base = build("bloom", {"n_layer": 3, "n_head": 4})
    one = given(tmp_path, pack(random_examples(24), 64))
    adapted = adapters.attach(
        base, methods.lora_settings(LoraConfig(r=4, target_modules=["all-linear"])), 42
    )
    tokenizer = load_tokenizer(TINY, find_model(TINY))
    with pytest.raises(ValueError, match=r"needs per-sequence attention.*sequence_packing=false"):
        trainer.train(adapted, tokenizer, one.examples, one.arguments, one.events)
    one.events.close()


def test_memory_is_checked_for_full_sequences_and_the_run_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short rows make full micro-batches; the setting is part of what names a run."""
    monkeypatch.setattr(DeviceMemory, "find", lambda _: DeviceMemory("cpu", 4, 0.5 * GIB))
    rows: list[Any] = [{"instruction": "Say it.", "output": "word"} for _ in range(30)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    apart = Config(
        model=ModelConfig(path="random://tiny"),
        data=DataConfig(path=str(path)),
        training=TrainingConfig(batch_size=2, max_length=1024),
    )
    packed = replace(apart, training=replace(apart.training, sequence_packing=True))
    for config, tokens in ((packed, 2048), (apart, 304)):
        (problem,) = preflight.prepare(config).problems
        assert f"activations of {tokens} tokens" in problem
    assert find_inputs(packed).identity != find_inputs(apart).identity
