"""Train one model with TRL's SFTTrainer: padding-free batches, logits only at label positions.

The sequences of a micro-batch are concatenated (axes: batch 1, token, vocabulary).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from trl.trainer.sft_config import SFTConfig

from finetune import distributed
from finetune.config.schema import OptimizerConfig, TrainingConfig
from finetune.data.dataset import Examples
from finetune.data.token_rows import as_dataset, example_lengths
from finetune.models.adapters import (
    base_of,
    num_trainable,
)
from finetune.models.compatibility import CHECKPOINTING, disable_checkpointing, is_checkpointing
from finetune.models.gpu_power import PowerMeter
from finetune.models.precision import Precision
from finetune.models.process_memory import reset_peak_memory, return_freed_memory
from finetune.signals import StopSignals
from finetune.tracking.events import EventLog
from finetune.tracking.run_folder import RunFolder
from finetune.training.callbacks import StepWatch
from finetune.training.fsdp import unshard
from finetune.training.label_trainer import LabelTrainer
from finetune.training.row_order import filled_up, steps_between_validations, with_filler
from finetune.training.sequence_attention import find_layout_problem
from finetune.training.steps import (
    PADDING_FREE,
    Totals,
    TrainResult,
    build_result,
    find_kept,
    find_resume,
)
from finetune.training.validation import Validations

log = logging.getLogger("finetune")


@dataclass
class Arguments(SFTConfig):
    """TRL's SFTConfig, with settings of ours that it lacks."""

    early_stopping: int | None = None  # by validations
    checkpoint_minutes: float | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast of a forward pass, as accelerate does."""
        if not (self.bf16 or self.fp16):
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.bf16 else torch.float16)


def train(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    arguments: Arguments,
    events: EventLog,
) -> TrainResult:
    """Train the parameters that require a gradient, in place.

    Resumes from the newest valid checkpoint in `arguments.output_dir`, if there is one.

    Raises:
        Diverged: a loss or the gradient's norm is not finite.
        KeyboardInterrupt: a stop was asked for; the step was ended and a checkpoint written.
        ValueError: rows are packed, and this model cannot attend per sequence.
    """
    reset_peak_memory(arguments.device)
    power = PowerMeter(arguments.device)
    checkpoint = find_resume(arguments, events)
    signals, validations = StopSignals(), Validations(arguments.early_stopping)
    num_rows, num_tokens = len(examples.train), int(example_lengths(examples.train).sum())
    watch = StepWatch(
        events, signals, validations, num_rows=num_rows, num_tokens=num_tokens,
        checkpoint_minutes=arguments.checkpoint_minutes,
    )  # fmt: skip
    with arguments.autocast():
        problem = _find_padding_reason(model.eval(), examples)  # PEFT leaves dropout on
    arguments.padding_free = problem is None
    _set_validations(arguments, examples)
    if getattr(arguments, CHECKPOINTING) and arguments.device.type == "cpu":
        return_freed_memory()
    with _base_restored(model), signals.watched():
        trainer = _build_trainer(model, tokenizer, examples, arguments, watch)
        trainer.claim = events.claim
        if checkpoint is not None:
            trainer.seconds_before = checkpoint.seconds
        with trainer.per_sequence_attention():
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        seconds, watts = trainer.seconds(), power.mean_watts()
    if signals.request is not None:
        raise signals.request
    steps, planned = trainer.state.global_step, trainer.state.max_steps
    if (kept := find_kept(arguments, validations, steps, planned)) is not None:
        trainer._load_from_checkpoint(str(kept))
    if distributed.is_sharded():
        unshard(base_of(model))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    mean = fmean(losses)  # the Trainer's own forgets the steps before a resume
    totals = Totals(steps, mean, watch.num_tokens * (trainer.state.epoch or 0.0), seconds)
    layout = PADDING_FREE if problem is None else f"padded, since {problem}"
    return build_result(
        totals, validations, arguments.device,
        num_trainable=num_trainable(model), layout=layout, power_watts=watts,
    )  # fmt: skip


def _build_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    arguments: Arguments,
    watch: StepWatch,
) -> LabelTrainer:
    """Build the Trainer; under a launcher rows are filled up to full batches on all ranks."""
    train, validation = examples.train, examples.validation
    if launched := distributed.is_launched():
        train = with_filler(train)
        together = arguments.per_device_eval_batch_size * arguments.world_size
        validation = filled_up(validation, together) if validation else []
    trainer = LabelTrainer(
        model=model,
        args=arguments,
        train_dataset=as_dataset(train),
        eval_dataset=as_dataset(validation) if validation else None,
        processing_class=tokenizer,
        callbacks=[watch],
        num_rows=len(examples.train),
    )
    trainer.remove_callback(PrinterCallback)
    if launched:  # for another dropout on each rank
        torch.manual_seed(arguments.seed + distributed.rank())
    return trainer


def _find_padding_reason(model: PreTrainedModel | PeftModel, examples: Examples) -> str | None:
    """Return why batches are padded, and log it once; None where they are padding-free.

    Raises:
        ValueError: rows are packed, which needs per-sequence attention.
    """
    problem = find_layout_problem(model, examples.shortest_and_longest())
    if problem is None:
        return None
    if examples.is_packed:
        raise ValueError(
            f"training.sequence_packing=true needs per-sequence attention, but {problem}; "
            "set training.sequence_packing=false"
        )
    log.info("batches are padded: %s", problem)
    return problem


def _set_validations(arguments: Arguments, examples: Examples) -> None:
    """Validate by steps, at an epoch's end too: before the checkpoint of the same step."""
    if examples.validation:
        arguments.eval_steps = steps_between_validations(len(examples.train), arguments)
        arguments.eval_strategy = IntervalStrategy.STEPS


def build_arguments(
    run: RunFolder,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    precision: Precision,
    *,
    validate: bool,
) -> Arguments:
    """Translate our settings into TRL's."""
    validation = "epoch" if training.validate_every is None else "steps"
    checkpointing: Any = {CHECKPOINTING: training.gradient_checkpointing}
    return Arguments(
        output_dir=str(run.checkpoints),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        bf16=precision.autocast == torch.bfloat16,
        fp16=precision.autocast == torch.float16,
        use_cpu=precision.device.type == "cpu",
        seed=training.seed,
        data_seed=training.seed if training.data_seed is None else training.data_seed,
        optim=optimizer.name,
        learning_rate=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        lr_scheduler_type=optimizer.scheduler,
        warmup_steps=optimizer.warmup_ratio,  # below 1 it is a share of all steps
        max_grad_norm=optimizer.max_grad_norm,
        save_steps=training.checkpoint_every,
        checkpoint_minutes=training.checkpoint_minutes,
        save_total_limit=training.keep_checkpoints,
        eval_strategy=validation if validate else "no",
        eval_steps=training.validate_every,
        early_stopping=training.early_stopping,
        disable_tqdm=True,  # StepWatch shows the progress
        logging_steps=1,
        logging_nan_inf_filter=False,  # on, it would log a NaN loss as 0.0 and go on
        report_to="none",
        fsdp=distributed.is_sharded() or None,  # type: ignore[arg-type]  # a bool, by its own help
        max_length=None,  # the rows are cut and counted already
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=precision.device.type == "cuda",
        **checkpointing,
    )


@contextmanager
def _base_restored(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Undo at the end what TRL and the Trainer changed on the base."""
    base = base_of(model)
    config = base.config.get_text_config()
    before = {
        name: value
        for name in ("use_cache", "output_router_logits")
        if (value := getattr(config, name, None)) is not None
    }
    try:
        yield
    finally:
        base.__dict__.pop("forward", None)  # TRL's fused head
        if is_checkpointing(base):
            disable_checkpointing(base)
        for name, value in before.items():
            setattr(config, name, value)
        model.eval()
