"""Every shipped YAML composes, says how to use it, and is short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from finetune.config.paths import conf_dir
from finetune.config.rules import find_problems
from finetune.config.schema import Config, build_config, register

register()
FILES = sorted(conf_dir().glob("*/*.yaml"))


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return build_config(compose("config", list(overrides)))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}={f.stem}")
def test_an_option_composes_without_problems(file: Path) -> None:
    """Each option is valid by itself, beside the defaults."""
    text = file.read_text(encoding="utf-8")
    extra = ["data.path=rows.jsonl"] if "path: ???" in text else []
    extra += [f"evaluation.questions={file}"] if "questions: ???" in text else []
    assert find_problems(composed(f"{file.parent.name}={file.stem}", *extra)) == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}={f.stem}")
def test_an_option_says_how_to_use_it(file: Path) -> None:
    """Its first comment is the command; it is short and instantiates nothing."""
    text = file.read_text(encoding="utf-8")
    first = next(line for line in text.splitlines() if not line.startswith("# @package"))
    assert first == f"# python -m finetune {file.parent.name}={file.stem}"
    assert len(text.splitlines()) < 25
    assert "_target_" not in text


def test_the_reference_experiment_is_exactly_that_of_the_design() -> None:
    """Mistral-7B in 4 bit, LoRA r 16 on all linear layers, 1,500 Alpaca rows, AdamW 8-bit."""
    config = composed("experiment=mistral_alpaca_arc")
    expected: dict[str, Any] = {
        "model.path": "mistralai/Mistral-7B-v0.1", "model.quantization": "nf4",
        "model.double_quant": True, "model.dtype": "auto",
        "peft.method": "lora", "lora.r": 16, "lora.alpha": 16, "lora.dropout": 0.0,
        "lora.use_rslora": False, "lora.use_dora": False,
        "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                "down_proj"],
        "data.path": "tatsu-lab/alpaca", "data.num_examples": 1500,
        "data.prompt_template": "alpaca",
        "training.batch_size": 8, "training.gradient_accumulation_steps": 4,
        "training.epochs": 2.0, "training.max_steps": None, "training.max_length": 2048,
        "training.gradient_checkpointing": True, "training.precision": "auto",
        "optimizer.lr": 2e-4, "optimizer.scheduler": "cosine", "optimizer.name": "adamw_8bit",
        "evaluation.tasks": ["arc_easy"], "evaluation.base": True, "evaluation.limit": None,
        "evaluation.num_fewshot": None,
    }  # fmt: skip
    node = OmegaConf.structured(config)
    assert {key: OmegaConf.select(node, key) for key in expected} == expected
