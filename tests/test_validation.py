"""Early stopping: the best adapter is kept, on both ways of training, also after a kill."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from finetune.config import methods
from finetune.config.inputs import DataSource
from finetune.config.rules import find_problems
from finetune.config.schema import Config, DataConfig, LoraConfig, OptimizerConfig, TrainingConfig
from finetune.data.dataset import Examples, build_examples
from finetune.data.row_counts import RowCounts
from finetune.models import adapters
from finetune.models.base_model import find_model, load_tokenizer
from finetune.pipeline import run_jobs
from finetune.tracking.run_folder import RunFolder
from finetune.training import label_trainer, trainer
from finetune.training.adapter_training import AdapterSpec
from finetune.training.multi_adapter import train_together
from finetune.training.steps import Diverged, TrainResult
from finetune.training.validation import Validations
from tests.test_grouping import job
from tests.test_loglikelihood import build
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
)
from tests.trainings import spec as whole_spec

SLOW = pytest.mark.slow
WAYS = ("ours", "the Trainer's")
QUICK_WAYS = ("ours", pytest.param("the Trainer's", marks=SLOW))
Trained = tuple[dict[str, torch.Tensor], TrainResult]
# Three steps an epoch on rows that nothing can be generalised from: the loss soon rises elsewhere.
OVERFITTING = Setting(
    lora={"dropout": 0.1},
    optimizer={"lr": 0.03, "scheduler": "constant", "warmup_ratio": 0.0},
    training={
        "batch_size": 2, "epochs": 12, "validate_every": 2, "early_stopping": 3,
        "checkpoint_every": 3,
    },
    validation=7,
)  # fmt: skip


def spec(folder: Path, setting: Setting = OVERFITTING) -> AdapterSpec:
    """Return a run of few rows, with others held out."""
    one = whole_spec(RunFolder(folder), setting)
    held_out = random_examples(setting.validation, seed=9)
    return replace(one, examples=Examples(random_examples(12), held_out, RowCounts()))


def changed(setting: Setting, **settings: Any) -> Setting:
    return replace(setting, training={**setting.training, **settings})


def train_by(way: str, one: AdapterSpec) -> Trained:
    """Train one run in a way, and return its adapter and result."""
    try:
        if way == "ours":
            ((_, weights, result),) = train_together(load(), [one], CPU)
            if isinstance(result, Exception):
                raise result
            return copied(weights), result
        adapted = adapters.attach(load(), methods.lora_settings(one.lora), one.arguments.seed)
        tokenizer = load_tokenizer(TINY, find_model(TINY))
        result = trainer.train(adapted, tokenizer, one.examples, one.arguments, one.events)
        tensors = {
            name.replace(".default.", "."): parameter.detach().clone()
            for name, parameter in adapted.named_parameters()
            if "lora_" in name
        }
        return tensors, result
    finally:
        one.events.close()


def train(way: str, folder: Path, setting: Setting = OVERFITTING) -> Trained:
    return train_by(way, spec(folder, setting))


@pytest.mark.parametrize(
    ("found", "patience", "best", "kept", "stops"),
    [
        ([], 1, None, None, False),
        ([3.0, 2.0], None, None, 2.0, False),
        ([3.0, 2.0, 2.5], None, None, 2.5, False),
        ([3.0, 2.0, 2.5], 2, 20, 2.0, False),
        ([3.0, 2.0, 2.5, 2.0], 2, 20, 2.0, True),
        ([3.0, 2.0, 2.5, 1.9], 2, 40, 1.9, False),
        ([3.0], 1, 10, 3.0, False),
    ],
)
def test_the_lowest_loss_is_kept_and_patience_counts_from_it(
    found: list[float], patience: int | None, best: int | None, kept: float | None, stops: bool
) -> None:
    """The first of equals is the best; without early stopping it is the last one."""
    validations = Validations(patience)
    validations.losses = {10 * number: loss for number, loss in enumerate(found, start=1)}
    assert (validations.best_step, validations.kept_loss) == (best, kept)
    assert validations.stops is stops


@pytest.mark.parametrize("way", QUICK_WAYS)
def test_training_ends_early_and_keeps_the_best_adapter(
    tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its bits are those of a run that ends at the best step; the log says when and why."""
    with caplog.at_level(logging.INFO, logger="finetune"):
        weights, result = train(way, tmp_path / "run")
    seen = losses(tmp_path / "run", "validation/loss")
    best = result.best_step
    assert best == 2 * (1 + seen.index(min(seen)))
    assert result.steps == best + 6 < 36
    assert result.validation_loss == min(seen) < seen[-1]
    assert len(losses(tmp_path / "run")) == result.steps
    assert (
        f"run: stopped early at step {result.steps} of 36: validation loss has not fallen for 3 "
        f"validations; the adapter of step {best} is kept"
    ) in caplog.text
    shorter = changed(OVERFITTING, max_steps=best, early_stopping=None)
    expected, alone = train(way, tmp_path / "shorter", shorter)
    assert equal(weights, expected)
    assert (alone.best_step, alone.validation_loss) == (None, result.validation_loss)
    last, _ = train(way, tmp_path / "last", changed(shorter, max_steps=result.steps))
    assert not equal(weights, last)


@pytest.mark.parametrize("way", QUICK_WAYS)
def test_the_speed_counts_the_tokens_that_were_trained_on(tmp_path: Path, way: str) -> None:
    """Whole epochs of one size: the tokens of the steps that were taken, not of those planned."""
    setting = changed(OVERFITTING, validate_every=None, early_stopping=1)
    one = spec(tmp_path, setting)
    tokens = sum(len(example["input_ids"]) for example in one.examples.train)
    _, result = train_by(way, one)
    assert result.steps % 3 == 0
    assert result.steps < 36
    processed = result.tokens_per_second * result.train_seconds
    assert processed == pytest.approx(tokens * result.steps / 3)


def test_both_ways_validate_at_the_same_steps_with_the_same_loss(tmp_path: Path) -> None:
    """At each epoch's end, or as said, and at the end."""
    for every, steps in ((None, 3), (4, 2)):
        setting = changed(OVERFITTING, max_steps=7, early_stopping=None, validate_every=every)
        setting = replace(setting, lora={}, optimizer={"lr": 1e-3})
        found = []
        for way in WAYS:
            folder = tmp_path / f"{way}-{every}"
            train(way, folder, setting)
            found.append(losses(folder, "validation/loss"))
        assert len(found[0]) == steps
        assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_padded_rows_are_validated_by_labels_too(tmp_path: Path) -> None:
    """However they are batched, where nothing is learned; the last batch is a smaller one."""
    found = []
    for size in (2, 3, 7):
        setting = changed(OVERFITTING, max_steps=1, batch_size=size)
        one = spec(tmp_path / str(size), replace(setting, optimizer={"lr": 1e-12}))
        lora = LoraConfig(r=4, target_modules=["all-linear"])
        adapted = adapters.attach(
            build("bloom", {"n_layer": 3, "n_head": 4}), methods.lora_settings(lora), 1
        )
        tokenizer = load_tokenizer(TINY, find_model(TINY))
        result = trainer.train(adapted, tokenizer, one.examples, one.arguments, one.events)
        one.events.close()
        assert result.layout.startswith("padded")
        found.append(result.validation_loss)
    assert found == pytest.approx([found[0]] * 3, abs=1e-5)


@pytest.fixture(scope="module", params=WAYS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a way, and what an undisturbed run comes to in it."""
    folder = tmp_path_factory.mktemp("whole")
    return request.param, folder, train(request.param, folder)


@pytest.mark.parametrize(
    ("key", "after", "how"),
    [
        ("validation/loss", 0, "killed"),  # the best step's checkpoint is not written yet
        pytest.param("train/loss", 1, "killed", marks=SLOW),  # it is the newest
        pytest.param("validation/loss", 4, "killed", marks=SLOW),  # one without it is the newest
        pytest.param("train/loss", 6, "killed", marks=SLOW),
        pytest.param("validation/loss", 6, "killed", marks=SLOW),  # the one that ends the training
        pytest.param("train/loss", 0, "stopped", marks=SLOW),
        pytest.param("train/loss", 4, "stopped", marks=SLOW),
        ("train/loss", 6, "stopped"),
    ],
)
def test_a_resumed_run_stops_at_the_same_step_with_the_same_bits(
    tmp_path: Path, whole: Any, key: str, after: int, how: str
) -> None:
    """Broken off anywhere around the best step, with one checkpoint kept besides."""
    way, folder, (weights, result) = whole
    one = broken_off(spec(tmp_path), key, result.best_step + after, how)
    has_ended = way == "ours" and (after, how) == (6, "stopped")  # it is done at the same moment
    if not has_ended:
        with pytest.raises(Killed if how == "killed" else KeyboardInterrupt):
            train_by(way, one)
        again, resumed = train(way, tmp_path)
    else:
        again, resumed = train_by(way, one)
    assert equal(again, weights)
    assert resumed == replace(
        result,
        train_seconds=resumed.train_seconds,
        tokens_per_second=resumed.tokens_per_second,
        peak_memory_gib=resumed.peak_memory_gib,
    )
    for name in ("train/loss", "validation/loss"):
        assert losses(tmp_path, name) == losses(folder, name)


def test_one_of_a_group_stops_early_and_the_others_go_on_as_alone(tmp_path: Path) -> None:
    """Each has the bits of its solo run, the one that stops too."""
    calm = replace(OVERFITTING, optimizer={**OVERFITTING.optimizer, "lr": 1e-4})
    group = [changed(one, max_steps=16) for one in (OVERFITTING, calm)]
    specs = [spec(tmp_path / str(number), setting) for number, setting in enumerate(group)]
    ended = [(number, copied(w), end) for number, w, end in train_together(load(), specs, CPU)]
    for number, weights, outcome in ended:
        specs[number].events.close()
        expected, alone = train("ours", tmp_path / f"alone{number}", group[number])
        assert equal(weights, expected)
        assert isinstance(outcome, TrainResult)
        assert (outcome.steps, outcome.best_step) == (alone.steps, alone.best_step)
        assert (outcome.steps < 16) == (number == 0)
    assert [number for number, _, _ in ended] == [0, 1]


@pytest.mark.parametrize("way", WAYS)
def test_a_validation_loss_that_is_not_finite_is_divergence(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be compared with no other."""
    one = spec(tmp_path, changed(OVERFITTING, validate_every=1))
    record = label_trainer.LabelTrainer.evaluation_loop

    def broken(*args: Any, **given: Any) -> Any:
        return record(*args, **given)._replace(metrics={"eval_loss": float("nan")})

    monkeypatch.setattr(label_trainer.LabelTrainer, "evaluation_loop", broken)
    monkeypatch.setattr(
        "finetune.training.multi_adapter.SharedBase.validate", lambda *_: float("nan")
    )
    with pytest.raises(Diverged, match="validation loss became nan at step 1"):
        train_by(way, one)


@pytest.mark.parametrize("use_dora", [False, True], ids=WAYS)
def test_the_runs_files_tell_of_the_kept_adapter(tmp_path: Path, use_dora: bool) -> None:
    """A job of both settings: step and loss in its training.json, the packing in its data.json."""
    told = job(tmp_path, lora=LoraConfig(use_dora=use_dora), optimizer=OptimizerConfig(lr=0.3))
    told.config.data = replace(told.config.data, num_examples=40, validation_fraction=0.5)
    told.config.training = replace(
        told.config.training, sequence_packing=True, validate_every=1, early_stopping=1, epochs=9.0
    )
    assert run_jobs.run([told]) == ["finished"]
    (run,) = (RunFolder(path) for path in tmp_path.iterdir())
    trained, seen = run.read_json("training.json"), losses(run.path, "validation/loss")
    assert trained["validation_loss"] == min(seen) < seen[-1]
    assert trained["best_step"] == 1 + seen.index(min(seen)) == trained["steps"] - 1
    assert not run.checkpoints.exists()
    data = run.read_json("data.json")
    assert data["sequences"] < 20
    assert 0.5 < data["fullness"] <= 1


def test_early_stopping_without_rows_held_out_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """By the settings, or where the share of the rows is none."""
    data, early = DataConfig(path="rows.jsonl"), TrainingConfig(early_stopping=2)
    (problem,) = find_problems(Config(data=data, training=early))
    assert "set data.validation_fraction" in problem
    held_out = replace(data, validation_fraction=0.1)
    assert find_problems(Config(data=held_out, training=early)) == []
    wrong = TrainingConfig(early_stopping=0, validate_every=0)
    assert len(find_problems(Config(data=held_out, training=wrong))) == 2
    rows: Iterator[Any] = ({"instruction": "Say it.", "output": "It."} for _ in range(3))
    source = DataSource("data.path", "rows.jsonl", "", held_out.sources()["data.path"])
    with pytest.raises(ValueError, match=re.escape("validation_fraction=0.1 of 3 rows is no row")):
        build_examples([(source, list(rows))], held_out, early, tokenizer)
