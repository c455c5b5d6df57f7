"""Every architecture trains as stock SFTTrainer trains it, padding-free or, if needed, padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import SFTTrainer

from finetune.config import methods
from finetune.config.schema import LoraConfig, OptimizerConfig, TrainingConfig
from finetune.data.dataset import Examples
from finetune.data.row_counts import RowCounts
from finetune.models import adapters
from finetune.models.base_model import find_model, load_tokenizer
from finetune.tracking.events import EventLog, read_events
from finetune.tracking.run_folder import RunFolder
from finetune.training import multi_adapter
from finetune.training import trainer as training
from finetune.training.adapter_training import AdapterSpec
from finetune.training.multi_adapter import train_together
from finetune.training.sequence_attention import find_layout_problem
from finetune.training.steps import TrainResult
from tests.test_loglikelihood import ARCHITECTURES, build
from tests.trainings import CPU, TINY, random_examples

ALL = ["all-linear"]
TARGETS = {"mamba": ["in_proj", "x_proj"]}  # PEFT refuses the others


def spec(folder: Path, kind: str) -> AdapterSpec:
    arguments = training.build_arguments(
        RunFolder(folder),
        OptimizerConfig(lr=1e-2),
        TrainingConfig(batch_size=3, gradient_accumulation_steps=2, max_steps=4),
        CPU,
        validate=False,
    )
    examples = Examples(random_examples(24), [], RowCounts())
    lora = LoraConfig(r=4, target_modules=TARGETS.get(kind, ALL))
    return AdapterSpec(lora, arguments, examples, EventLog(RunFolder(folder).events))


def model(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    """Build a model that drops nothing out, so that two trainings can be compared."""
    built = build(kind, settings)
    for module in built.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            setattr(module, "dropout", 0.0)  # noqa: B010  # to mypy a module has no such float
    for name in ("attention_dropout", "attn_pdrop", "dropout"):
        if hasattr(built.config, name):
            setattr(built.config, name, 0.0)
    built.requires_grad_(False)
    return built


def stock(base: PreTrainedModel, one: AdapterSpec) -> list[float]:
    arguments = one.arguments
    arguments.save_strategy = "no"
    trainer = SFTTrainer(
        model=adapters.attach(base, methods.lora_settings(one.lora), arguments.seed),
        args=arguments,
        train_dataset=Dataset.from_list([dict(e) for e in one.examples.train]),
        processing_class=load_tokenizer(TINY, find_model(TINY)),
    )
    trainer.train()
    one.events.close()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, settings) for kind, settings, _ in ARCHITECTURES],
    ids=[f"{kind}-{number}" for number, (kind, _, _) in enumerate(ARCHITECTURES)],
)
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning"
)
def test_every_architecture_trains_as_stock_does(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    """Losses within 1e-4 over four steps of accumulated, unequal rows; the layout is recorded."""
    expected = stock(model(kind, settings), spec(tmp_path / "stock", kind))
    base, one = model(kind, settings), spec(tmp_path / "ours", kind)
    rows = [example["input_ids"] for example in one.examples.train]
    obstacle = find_layout_problem(base, rows)
    if multi_adapter.find_obstacle(base, rows) is None:
        ((_, _, result),) = train_together(base, [one], CPU)
    else:
        adapted = adapters.attach(base, methods.lora_settings(one.lora), one.arguments.seed)
        tokenizer = load_tokenizer(TINY, find_model(TINY))
        result = training.train(adapted, tokenizer, one.examples, one.arguments, one.events)
    assert isinstance(result, TrainResult)
    one.events.close()
    events = read_events(tmp_path / "ours" / "events.jsonl")
    found = [event["value"] for event in events if event.get("key") == "train/loss"]
    assert found == pytest.approx(expected, abs=1e-4)
    assert result.layout == ("padding-free" if obstacle is None else f"padded, since {obstacle}")
