"""Held-out rows as an evaluation: which rows they are, and how they are asked and scored."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.config import rules
from finetune.config.schema import Config, DataConfig, EvaluationConfig, ModelConfig, TrainingConfig
from finetune.data import dataset
from finetune.data.dataset import Examples
from finetune.data.heldout import HeldoutRow, count_trained, find_heldout
from finetune.data.token_rows import IGNORED
from finetune.evaluation.tasks import LoadedTask, chat_settings
from finetune.models import base_model
from finetune.pipeline.preflight import prepare
from finetune.pipeline.session import Session
from finetune.tracking.run_folder import RunFolder
from tests.conftest import train_tiny, write_rows

LONG = "A long answer of more words than those that are compared one by one, as they are few."
HELDOUT = EvaluationConfig(tasks=["heldout"])


def rows_of(folder: Path, count: int = 20, **changes: Any) -> DataConfig:
    """Return settings of alpaca rows, every other answer of which is short."""
    rows: list[object] = [
        {"instruction": f"Say {n}.", "output": f"It is {n}." if n % 2 else f"{n}. {LONG}"}
        for n in range(count)
    ]
    return DataConfig(path=str(write_rows(folder / "rows.jsonl", rows)), **changes)


def examples_of(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, **training: Any
) -> tuple[list[dataset.SourceRows], Examples]:
    read = dataset.read_sources(dataset.find_sources(data))
    return read, dataset.build_examples(read, data, TrainingConfig(**training), tokenizer)


def heldout_of(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, **training: Any
) -> list[HeldoutRow]:
    read, examples = examples_of(data, tokenizer, **training)
    return find_heldout(read, examples, data, tokenizer)


def load(config: Config) -> LoadedTask:
    (task,) = Session().tasks(config, base_model.find_model(config.model))
    return task


def config_of(data: DataConfig, **changes: Any) -> Config:
    model = ModelConfig(path="random://tiny")
    return replace(Config(model=model, data=data, evaluation=HELDOUT), **changes)


def test_all_runs_hold_out_the_same_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Whatever their seed and number of rows, and they learn from none of these."""
    named = set()
    for changes in ({}, {"num_examples": 5}, {"validation_fraction": 0.5}):
        for seed in (1, 2):
            data = rows_of(tmp_path, heldout_fraction=0.2, **changes)
            _, examples = examples_of(data, tokenizer, seed=seed)
            held_out = {origin.row for origin in examples.heldout_origins}
            used = {*examples.train_origins, *examples.validation_origins}
            assert len(held_out) == 4
            assert held_out.isdisjoint(origin.row for origin in used)
            named.add(tuple(sorted(held_out)))
            assert len(examples.train) == {"num_examples": 5, "validation_fraction": 8}.get(
                next(iter(changes), ""), 16
            )
            assert "4 held out for evaluation" in examples.counts.summary()
    assert len(named) == 1


def test_without_rows_of_their_own_those_to_validate_on_are_asked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """From a share of the rows, or from a file."""
    found = heldout_of(rows_of(tmp_path, validation_fraction=0.2), tokenizer)
    assert len(found) == 4
    other = str(write_rows(tmp_path / "o.jsonl", [{"instruction": "Why?", "output": "So."}]))
    (one,) = heldout_of(rows_of(tmp_path, validation_path=other), tokenizer)
    assert one.name == f"row 1 of data.validation_path={other}"
    assert one.prompt.endswith("Why?\n\n### Response:\n")
    assert one.response == "So."


def test_every_learned_token_is_in_a_span(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of one response, of a text that stands alone, and of several turns."""
    text = write_rows(tmp_path / "text.jsonl", [{"text": "All of this is learned."}])
    data = DataConfig(path=str(text), prompt_template="text", validation_path=str(text))
    (row,) = heldout_of(data, tokenizer)
    assert row.spans == [(1, len(row.example["input_ids"]))]
    assert not row.is_short
    assert row.prompt == ""
    labels = [IGNORED, 5, IGNORED, 6, 7, IGNORED]
    turns = HeldoutRow("row 1", {"input_ids": [5, 5, 1, 6, 7, 1], "labels": labels}, "x", "y")
    assert turns.spans == [(1, 2), (3, 5)]


@pytest.mark.parametrize(
    ("response", "is_short"),
    [("Paris", True), ("one two\nthree", False), (" 42\n", True), (LONG, False), ("...", False)],
)
def test_short_answers_are_one_line_of_a_few_words(response: str, is_short: bool) -> None:
    """Others are not generated, only their likelihood is asked."""
    row = HeldoutRow("row 1", {"input_ids": [1, 2], "labels": [IGNORED, 2]}, "?", response)
    assert row.is_short == is_short
    assert not replace(row, prompt="").is_short


def test_rows_that_are_trained_on_too_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The same row twice may fall on both sides."""
    rows: list[object] = [{"instruction": "Why?", "output": "So."}] * 10
    data = DataConfig(path=str(write_rows(tmp_path / "r.jsonl", rows)), heldout_fraction=0.2)
    read, examples = examples_of(data, tokenizer)
    assert count_trained(find_heldout(read, examples, data, tokenizer), examples) == 2
    assert "2 of 2 held-out rows stand in the rows to train on" in load(config_of(data)).notes


def test_short_answers_are_generated_beside_the_likelihood(tmp_path: Path) -> None:
    """The task is a group of both; without short answers it is one task."""
    task = load(config_of(rows_of(tmp_path, heldout_fraction=0.5)))
    types = {name: one.OUTPUT_TYPE for name, one in task.tasks.items()}
    assert types == {"heldout_responses": "loglikelihood", "heldout_answers": "generate_until"}
    long: list[object] = [{"instruction": f"{n}?", "output": LONG} for n in range(4)]
    data = DataConfig(path=str(write_rows(tmp_path / "l.jsonl", long)), heldout_fraction=0.5)
    assert list(load(config_of(data)).tasks) == ["heldout"]


@pytest.mark.parametrize(
    ("data", "training", "problem"),
    [
        ({}, {}, "no rows are held out; set data.heldout_fraction"),
        ({"validation_fraction": 0.1}, {"early_stopping": 2}, "scores would be too good; set"),
        ({"heldout_fraction": 0.1}, {"max_steps": 0}, "nothing is trained"),
        ({"heldout_fraction": 1.0}, {}, "data.heldout_fraction is 1.0; it must be"),
        ({"heldout_fraction": 0.5, "validation_fraction": 0.5}, {}, "no rows to train on"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused(
    data: dict[str, Any], training: dict[str, Any], problem: str
) -> None:
    """With the setting that helps."""
    config = Config(
        data=DataConfig(path="x", **data), training=TrainingConfig(**training), evaluation=HELDOUT
    )
    assert any(problem in one for one in rules.find_problems(config))


def test_a_share_of_no_row_is_refused(tmp_path: Path) -> None:
    """Before anything runs, in one line."""
    (problem,) = prepare(config_of(rows_of(tmp_path, 4, heldout_fraction=0.1))).problems
    assert problem.startswith("data.heldout_fraction=0.1 of 4 rows is no row")


def test_missing_rows_are_reported_once(tmp_path: Path) -> None:
    """By the check of the data, and not as a task that cannot be reached."""
    data = DataConfig(path=str(tmp_path / "none.jsonl"), heldout_fraction=0.1)
    (problem,) = prepare(config_of(data)).problems
    assert "none.jsonl" in problem
    assert "evaluation.tasks" not in problem


def test_own_prompts_are_not_put_into_a_chat_template() -> None:
    """Neither when they are built nor when lm-eval builds them again."""
    settings = EvaluationConfig(chat_template=True)
    assert chat_settings("arc_easy", settings)["apply_chat_template"]
    for name in ("questions", "heldout"):
        assert not any(chat_settings(name, settings).values())


def test_perplexity_is_that_of_the_validation_loss(tmp_path: Path) -> None:
    """Of the same rows after the last step; each row's answers are kept to be read."""
    data = rows_of(tmp_path, validation_fraction=0.3)
    folder = RunFolder(train_tiny(tmp_path / "outputs", data=data, evaluation=HELDOUT))
    scores = json.loads((folder.evaluation / "heldout.json").read_text())
    loss = folder.metric("validation/loss")[-1].value
    assert math.log(scores["tuned"]["metrics"]["perplexity"]) == pytest.approx(loss, abs=1e-5)
    assert scores["base"]["metrics"]["perplexity"] > scores["tuned"]["metrics"]["perplexity"]
    assert scores["tuned"]["scoring"]["path"] == "shared"
    assert {"exact_match", "contains", "f1"} < set(scores["tuned"]["metrics"])
    items = (folder.evaluation / "heldout.items.jsonl").read_text().splitlines()
    first = json.loads(items[0])
    assert first["id"].startswith("row ")
    assert first["question"].endswith("### Response:\n")
    assert "It is" in first["gold"] or LONG in first["gold"]
    assert first["tuned"]["perplexity"][0] == pytest.approx(sum(first["said"]["tuned"]), abs=1e-3)


def test_the_tokens_of_a_row_are_asked_as_they_are(tmp_path: Path) -> None:
    """Not those that its text would have, cut into prompt and response."""
    task = load(config_of(rows_of(tmp_path, heldout_fraction=0.2)))
    for request in task.tasks["heldout_responses"].instances:
        context, response = request.args
        assert [*context.tokens, *response.tokens] == request.doc["tokens"]
