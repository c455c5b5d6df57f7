"""Prompts of rows for the report's samples: of held-out rows where there are any."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.config.schema import DataConfig, SourceConfig, TrainingConfig
from finetune.data.dataset import Examples, build_examples
from finetune.data.row_counts import RowCounts
from finetune.data.row_prompts import HELD_OUT, TRAINED, UNUSED, RowPrompt, sample_prompts
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
        ({"num_examples": None, "validation_fraction": 0.2}, HELD_OUT, 4),
        ({"num_examples": 10, "validation_fraction": 0.2}, HELD_OUT, 2),
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


def test_a_mix_names_the_source(tokenizer: PreTrainedTokenizerBase) -> None:
    """A number alone would be ambiguous."""
    mix = [SourceConfig(path="a.jsonl"), SourceConfig(path="b.jsonl")]
    prompts, _ = ask(tokenizer, mix=mix, num_examples=None, validation_fraction=0.2)
    assert {prompt.row.split(" of ")[1].split("=")[0] for prompt in prompts} <= {
        "data.mix.0.path", "data.mix.1.path", "data.mix[0].path", "data.mix[1].path",
    }  # fmt: skip
