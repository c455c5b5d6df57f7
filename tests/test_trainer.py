"""The training step: the stock objective, repeatable, and stopped where it diverges."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerControl, TrainerState
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune.config import methods, optimizers
from finetune.config.schema import LoraConfig, OptimizerConfig, TrainingConfig
from finetune.data.dataset import Examples
from finetune.data.row_counts import RowCounts
from finetune.models import adapters
from finetune.models.base_model import find_model, load_base, load_tokenizer
from finetune.models.compatibility import CHECKPOINTING, is_checkpointing
from finetune.models.precision import Precision, find_precision_problems
from finetune.signals import StopSignals
from finetune.tracking.events import EventLog, read_events
from finetune.tracking.run_folder import RunFolder
from finetune.training import trainer
from finetune.training.callbacks import StepWatch
from finetune.training.label_loss import FrozenHeadLoss
from finetune.training.steps import Diverged, TrainResult
from finetune.training.validation import Validations
from tests.trainings import CPU, TINY, random_examples


def train(folder: Path, **changes: Any) -> tuple[Any, TrainResult, list[float]]:
    """Train the tiny model; return it, the result and the loss of each step."""
    settings = TrainingConfig(
        batch_size=4, gradient_accumulation_steps=2, **changes.pop("training", {})
    )
    lora = LoraConfig(r=4, **changes.pop("lora", {}))
    optimizer = OptimizerConfig(**{"weight_decay": 0.01, **changes.pop("optimizer", {})})
    model = load_base(TINY, find_model(TINY), torch.device("cpu"))
    adapted = adapters.attach(model, methods.lora_settings(lora), settings.seed)
    run = RunFolder(folder)
    examples = Examples(random_examples(40), changes.pop("validation", []), RowCounts())
    arguments = trainer.build_arguments(
        run, optimizer, settings, CPU, validate=bool(examples.validation)
    )
    events = EventLog(run.events)
    tokenizer = load_tokenizer(TINY, find_model(TINY))
    try:
        result = trainer.train(adapted, tokenizer, examples, arguments, events)
    finally:
        events.close()
    losses = [e["value"] for e in read_events(run.events) if e.get("key") == "train/loss"]
    return adapted, result, losses


def adapter_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_losses_and_adapter_equal_stock_sfttrainer(tmp_path: Path) -> None:
    """Twenty steps with accumulation, clipping and weight decay: within 1e-4 of stock TRL."""
    strong = {"weight_decay": 1.0, "max_grad_norm": 0.05}  # of which none could be missing
    kept: Any = {CHECKPOINTING: False}
    ours, result, losses = train(tmp_path / "ours", training={"epochs": 4}, optimizer=strong)
    model = load_base(TINY, find_model(TINY), torch.device("cpu"))
    theirs = adapters.attach(model, methods.lora_settings(LoraConfig(r=4)), 42)
    stock = SFTTrainer(
        model=theirs,
        args=SFTConfig(
            output_dir=str(tmp_path / "stock"), num_train_epochs=4, use_cpu=True, bf16=False,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3,
            weight_decay=1.0, max_grad_norm=0.05, lr_scheduler_type="cosine", warmup_steps=0.03,
            seed=42, data_seed=42, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, max_length=None, **kept,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list([dict(e) for e in random_examples(40)]),
        processing_class=load_tokenizer(TINY, find_model(TINY)),
    )  # fmt: skip
    stock.train()
    expected = [log["loss"] for log in stock.state.log_history if "loss" in log]
    assert len(losses) == result.steps == 20
    assert losses == pytest.approx(expected, abs=1e-4)
    mine, other = adapter_weights(ours), adapter_weights(theirs)
    assert max((mine[n] - other[n]).abs().max() for n in mine) < 1e-4


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    """Training is repeatable, dropout included."""
    first, _, _ = train(tmp_path / "a", lora={"dropout": 0.1})
    again, _, _ = train(tmp_path / "b", lora={"dropout": 0.1})
    other, _, _ = train(tmp_path / "c", lora={"dropout": 0.1}, training={"seed": 1})
    one, two, three = map(adapter_weights, (first, again, other))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], three[n]) for n in one)


def test_the_base_is_left_as_it_was(tmp_path: Path) -> None:
    """Only the adapter changes; without it the model's output is bit for bit the base's."""
    base = load_base(TINY, find_model(TINY), torch.device("cpu"))
    ids = torch.arange(30)[None]
    expected = base(input_ids=ids).logits
    adapted, _, _ = train(tmp_path, training={"gradient_checkpointing": True})
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=ids).logits, expected)
    assert not torch.equal(adapted(input_ids=ids).logits, expected)
    assert not is_checkpointing(adapted.get_base_model())


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    """A learning rate beyond all measure is told as divergence, with the step."""
    with pytest.raises(Diverged, match=r"became (nan|inf) at step \d+ of 15"):
        train(tmp_path, optimizer={"lr": 1e18, "warmup_ratio": 0.0}, training={"epochs": 3})


def test_fp16_holds_a_loss_scale_among_thousands_of_labels() -> None:
    """The gradient of a frozen fp16 head is the fp32 head's times accelerate's first scale."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 512, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(4000, 32), torch.randint(512, (4000,))
    found = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 65536.0)):
        states = hidden.to(dtype).detach().requires_grad_()
        weights = torch.full((4000,), 1 / 4000)
        losses = FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
            states, head.to(dtype), targets, weights, [4000]
        )
        (losses.sum() * scale).backward()
        assert states.grad is not None
        found.append(states.grad.float() / scale)
    assert (found[1] - found[0]).norm() < 2e-3 * found[0].norm()


@pytest.mark.parametrize(("scale", "is_skipped"), [(32768.0, True), (0.5, True), (32768.0, False)])
def test_a_step_skipped_for_its_loss_scale_is_no_divergence(
    tmp_path: Path, scale: float, is_skipped: bool
) -> None:
    """fp16 begins too high and halves the scale; below 1, or without a skip, it has diverged."""
    run = RunFolder(tmp_path)
    arguments = trainer.build_arguments(
        run, OptimizerConfig(), TrainingConfig(), CPU, validate=False
    )
    events, state = EventLog(run.events), TrainerState(max_steps=9, global_step=1)
    watch = StepWatch(events, StopSignals(), Validations(None), num_rows=40, num_tokens=400)
    optimizer = SimpleNamespace(
        scaler=SimpleNamespace(get_scale=lambda: scale), step_was_skipped=is_skipped
    )
    told = {"loss": 2.0, "grad_norm": float("inf"), "learning_rate": 1e-3}
    watch.on_train_begin(arguments, state, TrainerControl())
    is_tolerated = is_skipped and scale >= 1
    with nullcontext() if is_tolerated else pytest.raises(Diverged, match="grad_norm became inf"):
        watch.on_log(arguments, state, TrainerControl(), logs=told, optimizer=optimizer)
    events.close()
    metrics = {e["key"] for e in read_events(run.events) if e["event"] == "metric"}
    recorded = {key for key in metrics if key.startswith("train/")}
    assert recorded == ({"train/loss", "train/lr"} if is_tolerated else set())


def test_validation_loss_is_the_mean_over_held_out_labels(tmp_path: Path) -> None:
    """It is reported, and recorded as an event."""
    _, result, _ = train(tmp_path, validation=random_examples(6))
    assert result.validation_loss is not None
    assert 4 < result.validation_loss < 7
    keys = {e.get("key") for e in read_events(tmp_path / "events.jsonl")}
    assert {"train/loss", "train/lr", "train/grad_norm", "validation/loss"} <= keys


def test_what_cannot_run_here_is_refused_with_the_remedy() -> None:
    """Unknown optimizers, missing packages and precisions are never replaced silently."""
    (unknown,) = optimizers.find_optimizer_problems(OptimizerConfig(name="adamw8bit"))
    assert "did you mean 'adamw_8bit'?" in unknown
    (missing,) = optimizers.find_optimizer_problems(OptimizerConfig(name="stable_adamw"))
    assert "pip install torch-optimi" in missing
    half = Precision(torch.device("cpu"), torch.float16)
    (problem,) = find_precision_problems(half)
    assert "cannot be trained on a CPU" in problem
    for name in ("adamw_torch", "adamw_8bit", "paged_adamw_8bit"):
        assert optimizers.find_optimizer_problems(OptimizerConfig(name=name)) == []


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}, {"init": "pissa"}])
def test_the_relatives_of_lora_train(tmp_path: Path, changes: dict[str, Any]) -> None:
    """rsLoRA, DoRA and another initialisation run on the same path and learn."""
    _, _, losses = train(tmp_path, lora=changes, training={"epochs": 3})
    assert losses[-1] < losses[0]


def test_an_adapters_dropout_does_not_disturb_the_check_of_the_layout(tmp_path: Path) -> None:
    """PiSSA's B is not zero: two draws of dropout would look like rows that see each other."""
    lora = {"init": "pissa", "dropout": 0.3}
    _, result, _ = train(tmp_path, lora=lora, training={"max_steps": 1})
    assert result.layout == "padding-free"
