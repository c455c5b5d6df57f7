"""Losses equal stock SFTTrainer's on the same plain rows, which each tokenises and masks itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import SFTTrainer

from finetune.config.schema import DataConfig, OptimizerConfig, TrainingConfig
from finetune.data.dataset import build_examples
from finetune.data.templates import render_alpaca
from finetune.tracking.events import EventLog, read_events
from finetune.tracking.run_folder import RunFolder
from finetune.training import trainer as training
from tests.test_dataset import source
from tests.tokenizer_kinds import KINDS
from tests.trainings import CPU
from tests.trl_preparation import as_rows

SETTINGS = TrainingConfig(batch_size=2, epochs=2.0, max_length=400)
ROWS = [
    {"instruction": f"Say {place} words.", "input": "", "output": "Paris " * (1 + place % 5)}
    for place in range(10)
]


def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def arguments(folder: Path) -> training.Arguments:
    run = RunFolder(folder)
    return training.build_arguments(run, OptimizerConfig(lr=1e-2), SETTINGS, CPU, validate=False)


def stock_losses(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """Train on the texts, in the order of our rows."""
    turns = [render_alpaca(row) for row in ROWS]
    pairs = [(prompt.content, answer.content) for prompt, answer in turns]
    given = arguments(folder)
    given.save_strategy, given.dataset_kwargs = "no", {}
    trainer = SFTTrainer(
        model=model(tokenizer), args=given, train_dataset=Dataset.from_list(as_rows(pairs)),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["SentencePiece, prefix space", "byte-level, newlines joined"])
def test_losses_equal_stock_sfttrainer_on_its_own_tokens(tmp_path: Path, kind: str) -> None:
    """Within 1e-4 over ten steps, from the same texts on."""
    tokenizer = KINDS[kind]()
    tokenizer.pad_token = tokenizer.eos_token
    data = DataConfig(path="rows.jsonl")
    examples = build_examples([(source(data), ROWS)], data, SETTINGS, tokenizer)
    events = EventLog(RunFolder(tmp_path / "ours").events)
    try:
        training.train(model(tokenizer), tokenizer, examples, arguments(tmp_path / "ours"), events)
    finally:
        events.close()
    log = read_events(tmp_path / "ours" / "events.jsonl")
    ours = [event["value"] for event in log if event.get("key") == "train/loss"]
    assert len(ours) == 10
    assert ours == pytest.approx(stock_losses(tmp_path / "stock", tokenizer), abs=1e-4)
