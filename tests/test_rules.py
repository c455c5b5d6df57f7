"""Ranges: every number of the schema, at the values that a library would refuse late."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from finetune import chat
from finetune.config import rules
from finetune.config.overrides import find_override_problems
from finetune.config.rules import (
    LARGEST_INT,
    LARGEST_SEED,
    MOST_ADAPTERS,
    MOST_WORKERS,
    find_problems,
)
from finetune.config.schema import (
    AUTO_FORMAT,
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    PeftConfig,
    SourceConfig,
    build_config,
    register,
)
from finetune.data import row_shapes
from tests.conftest import train_tiny

HUGE = [10**30, 2**64, 99999999999999999999]
NUMBERS: dict[str, list[Any]] = {
    "int": [-1, -(2**70), *HUGE, float("inf"), float("nan"), 1e308],
    "float": [-1.0, float("inf"), -math.inf, float("nan"), 1e308, *HUGE],
}
SEEDS = ("training.seed", "training.data_seed")


def numeric_fields() -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the kind of every number in the schema."""
    for section, kind in get_type_hints(Config).items():
        if not is_dataclass(kind):
            continue
        hints = get_type_hints(kind)
        for field in fields(kind):
            text = str(hints[field.name])
            for number in ("float", "int"):
                if text in (
                    f"<class '{number}'>",
                    f"{number} | None",
                    f"typing.Optional[{number}]",
                ):
                    yield f"{section}.{field.name}", number


FIELDS = dict(numeric_fields())


def test_the_numbers_of_the_schema_are_found() -> None:
    """The list that the other tests go by is not empty by mistake."""
    assert {"lora.r", "optimizer.lr", "training.seed", "sweep.job_timeout"} <= set(FIELDS)
    assert len(FIELDS) > 20


def problems_with(key: str, value: Any) -> list[str]:
    node = OmegaConf.structured(Config(data=DataConfig(path="rows.jsonl")))
    node.data.validation_fraction = 0.5  # which early stopping asks for
    if key == "peft.num_virtual_tokens":
        node.peft.method = "prompt_tuning"
    OmegaConf.update(node, key, value)
    return find_problems(build_config(node))


@pytest.mark.parametrize("key", FIELDS)
def test_a_number_that_nothing_can_hold_is_refused(key: str) -> None:
    """Infinite, NaN, negative and huge values: one line that names the key, none runs on."""
    for value in NUMBERS[FIELDS[key]]:
        if FIELDS[key] == "float" and value in HUGE and key.startswith("optimizer."):
            continue  # fp32 holds it; the run diverges, and says so
        try:
            problems = problems_with(key, value)
        except ValidationError:
            continue  # the schema's own refusal
        assert problems, f"{key}={value}"
        assert problems[0].startswith(f"{key} is "), problems
        assert "\n" not in problems[0]
        assert len(problems[0]) < 120


@pytest.mark.parametrize("value", ["9" * 32, "nan", "-inf", "-5", "inf", "9" * 5000])
def test_what_is_typed_is_refused_with_its_key(value: str) -> None:
    """The command line says the same of every number at once, before anything is composed."""
    register()
    wanted = [k for k in FIELDS if not (value == "9" * 32 and k.startswith("optimizer."))]
    typed = [f"{key}={value}" for key in wanted]
    problems = find_override_problems([*typed, "lora.rr=1"], multirun=False)  # so it is composed
    for key in wanted:
        assert any(problem.startswith((f"{key} is ", f"{key}={value}")) for problem in problems)


@pytest.mark.parametrize("key", [k for k, kind in FIELDS.items() if kind == "int"])
def test_the_largest_number_is_within_the_range(key: str) -> None:
    """Bounds are where libraries end, not where a use was thought of."""
    largest = LARGEST_SEED if key in SEEDS else LARGEST_INT
    if key == "sweep.max_concurrent_adapters":  # each number is tried against the memory
        largest = MOST_ADAPTERS
    if key.startswith("workers."):
        largest = MOST_WORKERS
    assert problems_with(key, largest) == []
    assert problems_with(key, largest + 1)


@pytest.mark.parametrize("minutes", [0.0, -0.5, math.nan, math.inf])
def test_the_time_between_checkpoints_is_above_0(minutes: float) -> None:
    """A fraction of a minute is enough; none leaves checkpoints to the steps."""
    assert "training.checkpoint_minutes" in FIELDS
    (problem,) = problems_with("training.checkpoint_minutes", minutes)
    assert problem.startswith("training.checkpoint_minutes is ")
    for allowed in (None, 0.01, 15, 1440.0):
        assert problems_with("training.checkpoint_minutes", allowed) == []


def test_a_sources_weight_is_a_number_too() -> None:
    """A mix has numbers of its own."""
    for weight in (0.0, -1.0, math.inf, math.nan, 1e308):
        mix = [SourceConfig("a.jsonl"), SourceConfig("b.jsonl", weight)]
        (problem,) = find_problems(Config(data=DataConfig(mix=mix)))
        assert problem.startswith("data.mix.1.weight is ")


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_the_largest_seed_trains(method: str, tmp_path: Path) -> None:
    """On our own path and on the Trainer's, which also seeds numpy."""
    from finetune.config.schema import TrainingConfig

    train_tiny(
        tmp_path,
        peft=PeftConfig("ia3" if method == "ia3" else "lora"),
        lora=LoraConfig(use_dora=method == "dora"),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(
            max_steps=1, max_length=200, batch_size=2, seed=LARGEST_SEED, data_seed=LARGEST_SEED
        ),
        evaluation=EvaluationConfig(tasks=[]),
    )


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999"])
def test_a_chats_seed_has_the_same_range(
    seed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers seeds numpy there, too."""
    monkeypatch.setattr("sys.argv", ["finetune.chat", "outputs/run", "--seed", seed])
    with pytest.raises(SystemExit) as ended:
        chat.main()
    assert ended.value.code == 2
    assert f"--seed is {seed}; it must be from 0 to 4294967295" in capsys.readouterr().err


def test_a_module_named_twice_is_refused() -> None:
    """It would be trained once, under the name of another run."""
    twice = LoraConfig(target_modules=["q_proj", "v_proj", "q_proj"])
    (problem,) = find_problems(Config(lora=twice, data=DataConfig(path="rows.jsonl")))
    assert problem == "lora.target_modules names q_proj twice or more; name each once"


def test_the_formats_are_those_that_rows_are_read_in() -> None:
    """`data.format` takes every shape by its name, and auto to recognise it."""
    shapes = [*row_shapes.PAIRS, *row_shapes.CONVERSATION_TITLES, *row_shapes.TEXT]
    assert sorted(rules.FORMATS) == sorted([AUTO_FORMAT, *shapes])
