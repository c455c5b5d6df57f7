"""Prompts of rows for the report's samples: of held-out rows where there are any."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.config.schema import DataConfig, SourceConfig, TrainingConfig
from finetune.data.dataset import Examples, build_examples
from finetune.data.row_counts import RowCounts
from finetune.data.row_prompts import (
    CANDIDATES,
    HELD_OUT,
    TRAINED,
    UNUSED,
    VALIDATION,
    RowPrompt,
    last_prompts,
    sample_prompts,
)
from finetune.data.templates import BY_NAME
from tests.test_dataset import source


def ask(
    tokenizer: PreTrainedTokenizerBase, *, trains: bool = True, **settings: Any
) -> tuple[list[RowPrompt], Examples]:
    """Build twenty rows, the last of which is empty, and return their prompts."""
    rows = [{"instruction": f"Say {n}?", "output": str(n) if n < 20 else ""} for n in range(1, 21)]
    data, training = DataConfig(path="x", **settings), TrainingConfig()
    read = [(source(data, place), rows) for place in range(len(data.sources()))]
    examples = Examples([], [], RowCounts())
    if trains:
        examples = build_examples(read, data, training, tokenizer)
    return list(sample_prompts(read, examples, data, training, tokenizer)), examples


def numbers(prompts: list[RowPrompt]) -> list[int]:
    return [int(prompt.row.split(",")[0].split()[1]) for prompt in prompts]


@pytest.mark.parametrize(
    ("settings", "use", "count"),
    [
        ({"num_examples": None, "validation_fraction": 0.2}, VALIDATION, 4),
        ({"num_examples": 10, "validation_fraction": 0.2}, VALIDATION, 2),
        ({"num_examples": 10, "validation_fraction": 0.2, "heldout_fraction": 0.15}, HELD_OUT, 3),
        ({"num_examples": 10}, UNUSED, 9),
        ({"num_examples": None}, TRAINED, 19),
        ({"num_examples": None, "trains": False}, UNUSED, 19),
    ],
)
def test_samples_are_of_held_out_rows(
    settings: dict[str, Any], use: str, count: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of those held out for validation, else not drawn, else trained on; each says which."""
    prompts, examples = ask(tokenizer, **settings)
    assert len(prompts) == count
    assert all(prompt.row.endswith(f", {use}") for prompt in prompts)
    assert numbers(prompts) == sorted(numbers(prompts), reverse=True)
    for number, prompt in zip(numbers(prompts), prompts, strict=True):
        assert f"Say {number}?" in prompt.prompt.text
    trained = {origin.row for origin in examples.train_origins}
    assert trained.isdisjoint(numbers(prompts)) or use == TRAINED


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"validation_fraction": 0.1}, CANDIDATES),
        ({"num_examples": 100}, CANDIDATES),
        ({}, CANDIDATES),
    ],
)
def test_only_the_last_rows_are_rendered(
    settings: dict[str, Any],
    most: int,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many rows there are, and whatever use the asked ones have."""
    rows = [{"instruction": f"Say {n}?", "output": str(n)} for n in range(1, 1001)]
    data = DataConfig(path="x", **{"num_examples": None, "validation_fraction": 0.0, **settings})
    read, training = [(source(data), rows)], TrainingConfig()
    examples = build_examples(read, data, training, tokenizer)
    rendered: list[Any] = []
    alpaca = BY_NAME["alpaca"]

    def render(fields: Any) -> Any:
        rendered.append(fields)
        return alpaca.render(fields)

    monkeypatch.setitem(BY_NAME, "alpaca", replace(alpaca, render=render))
    prompts = list(islice(sample_prompts(read, examples, data, training, tokenizer), 4))
    assert len(prompts) == 4
    assert 0 < len(rendered) <= most
    rendered.clear()
    last = last_prompts(read, data, training, tokenizer, 8)
    assert [prompt.text.count(f"Say {n}?") for n, prompt in enumerate(last, 993)] == [1] * 8
    assert len(rendered) <= most


def test_rows_that_cannot_be_used_are_passed(tokenizer: PreTrainedTokenizerBase) -> None:
    """More of them than are rendered at a time, at the end of the file."""
    empty = [{"instruction": "Say?", "output": ""}] * (3 * CANDIDATES)
    rows = [{"instruction": f"Say {n}?", "output": str(n)} for n in range(1, 4)] + empty
    data, training = (
        DataConfig(path="x", num_examples=None, validation_fraction=0.0),
        TrainingConfig(),
    )
    read = [(source(data), rows)]
    assert len(last_prompts(read, data, training, tokenizer, 8)) == 3
    examples = build_examples(read, data, training, tokenizer)
    prompts = list(sample_prompts(read, examples, data, training, tokenizer))
    assert numbers(prompts) == [3, 2, 1]
    assert all(prompt.row.endswith(TRAINED) for prompt in prompts)


def test_a_mix_names_the_source(tokenizer: PreTrainedTokenizerBase) -> None:
    """A number alone would be ambiguous."""
    mix = [SourceConfig(path="a.jsonl"), SourceConfig(path="b.jsonl")]
    prompts, _ = ask(tokenizer, mix=mix, num_examples=None, validation_fraction=0.2)
    assert {prompt.row.split(" of ")[1].split("=")[0] for prompt in prompts} <= {
        "data.mix.0.path", "data.mix.1.path", "data.mix[0].path", "data.mix[1].path",
    }  # fmt: skip
