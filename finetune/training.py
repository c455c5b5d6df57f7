"""Train one model: TRL's SFTTrainer on our own rows, with the head only where there is a label.

Sequences of a micro-batch lie end to end without padding (axes: batch 1, token, vocabulary).
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import AdaLoraModel, PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune import distributed
from finetune.adapters import (
    base_of,
    load_rank_state,
    num_prepended,
    num_trainable,
    orthogonality,
    rank_state,
    ranks,
)
from finetune.checkpoints import find_newest, write_checkpoint
from finetune.config import OptimizerConfig, TrainingConfig
from finetune.data import IGNORED, Example, Examples
from finetune.label_loss import LabelLoss
from finetune.models import TORCH_DTYPES, has_bf16
from finetune.row_order import EvenOrder, with_filler
from finetune.run_folder import EventLog, RunFolder
from finetune.sequence_attention import SequenceAttention, find_layout_problem
from finetune.steps import (
    StepWatch,
    StopSignals,
    find_kept,
    log_resume,
    peak_memory_gib,
    return_freed_memory,
    steps_between_validations,
)
from finetune.validation import Validations

log = logging.getLogger("finetune")

TRAINED, RANKS = "trained.safetensors", "ranks.pt"


@dataclass(frozen=True)
class TrainResult:
    """What a training came to; `loss` is the mean over all steps, times are seconds."""

    steps: int
    loss: float
    validation_loss: float | None  # of the adapter that is kept
    train_seconds: float
    tokens_per_second: float  # real tokens, each as often as it was trained on
    peak_memory_gib: float  # of the process on a CPU, of the allocator on a GPU
    num_trainable_parameters: int
    layout: str  # of a batch's sequences: end to end, or padded and why
    best_step: int | None = None  # whose adapter is kept; None: the last one's


@dataclass
class Arguments(SFTConfig):
    """TRL's settings, and the one of ours that they have no name for."""

    early_stopping: int | None = None


@dataclass(frozen=True)
class Precision:
    """The arithmetic of training on one device."""

    device: torch.device
    autocast: torch.dtype  # fp32 means none


def resolve_precision(name: str, base: torch.dtype, device: torch.device) -> Precision:
    """Return the autocast of `training.precision`; auto takes the base's compute type."""
    return Precision(device, base if name == "auto" else TORCH_DTYPES[name])


def find_precision_problems(precision: Precision) -> list[str]:
    """Return why the device cannot train like this, with the remedy."""
    if precision.autocast == torch.float16 and precision.device.type == "cpu":
        return [
            "training.precision or model.dtype is fp16, which cannot be trained on a CPU; set "
            "model.dtype and training.precision to fp32 or bf16, or use a GPU"
        ]
    if precision.autocast == torch.bfloat16 and not has_bf16(precision.device):
        name = torch.cuda.get_device_name(precision.device)
        return [f"training.precision or model.dtype is bf16, which {name} lacks; set fp16 or fp32"]
    return []


def train(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    arguments: Arguments,
    events: EventLog,
) -> TrainResult:
    """Train in place all that wants a gradient, and leave the model as it was but for that.

    Goes on from the newest whole checkpoint in `arguments.output_dir`, if there is one.

    Raises:
        Diverged: a loss or the gradient's norm is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM came; the step was ended and a checkpoint written.
        ValueError: rows are joined, and this model cannot keep them apart.
    """
    folder = Path(str(arguments.output_dir))
    checkpoint = distributed.from_main(lambda: find_newest(folder))
    signals, validations = StopSignals(), Validations(arguments.early_stopping)
    num_tokens = sum(len(e["input_ids"]) for e in examples.train)
    watch = StepWatch(events, signals, validations, num_tokens)
    problem = find_layout_problem(model, [example["input_ids"] for example in examples.all])
    if problem is not None:
        if examples.is_packed:
            raise ValueError(
                f"training.sequence_packing=true cannot keep rows apart on this model: {problem}; "
                "set training.sequence_packing=false"
            )
        log.info("batches are padded: %s", problem)
    arguments.padding_free = problem is None
    if examples.validation:  # by steps also at an epoch's end: before the step's checkpoint
        arguments.eval_steps = steps_between_validations(len(examples.train), arguments)
        arguments.eval_strategy = IntervalStrategy.STEPS
    if arguments.activation_checkpointing and arguments.device.type == "cpu":
        return_freed_memory()
    launched = distributed.is_launched()
    with _base_restored(model), signals.watched():
        trainer = LabelTrainer(
            model=model,
            args=arguments,
            train_dataset=_as_dataset(with_filler(examples.train) if launched else examples.train),
            eval_dataset=_as_dataset(examples.validation) if examples.validation else None,
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        if launched:
            trainer.share_rows(EvenOrder(len(examples.train), arguments))
        if checkpoint is not None:
            log_resume(checkpoint)
            trainer.seconds_before = checkpoint.seconds
        with trainer.laid_out():
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        seconds = trainer.seconds()
    if signals.stop_requested:
        raise KeyboardInterrupt
    steps = trainer.state.global_step
    kept = find_kept(folder, validations, steps, trainer.state.max_steps)
    if kept is not None:
        trainer._load_from_checkpoint(str(kept))
    tokens = watch.num_tokens * trainer.state.epoch
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return TrainResult(
        steps=steps,
        loss=fmean(losses),  # the Trainer's own mean forgets the steps before a resume
        validation_loss=validations.kept_loss,
        train_seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_memory_gib=peak_memory_gib(arguments.device),
        num_trainable_parameters=num_trainable(model),
        layout="end to end" if problem is None else f"padded, since {problem}",
        best_step=validations.best_step,
    )


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
    return Arguments(
        output_dir=str(run.checkpoints),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        activation_checkpointing=training.gradient_checkpointing,
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
        save_total_limit=training.keep_checkpoints,
        eval_strategy=validation if validate else "no",
        eval_steps=training.validate_every,
        early_stopping=training.early_stopping,
        disable_tqdm=True,  # StepWatch shows the progress
        logging_steps=1,
        logging_nan_inf_filter=False,  # on, it would log a NaN loss as 0.0 and go on
        report_to="none",
        max_length=None,  # the rows are cut and counted already
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=precision.device.type == "cuda",
    )


class LabelTrainer(SFTTrainer):
    """SFTTrainer whose head and loss see only the positions that predict a label.

    The objective is the stock one: the sum of the labels' cross-entropies over the number of
    labels in the whole optimizer step.
    """

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.seconds_before = 0.0  # that an interrupted training took already
        self._started = time.monotonic()
        self._order: EvenOrder | None = None  # the Trainer's own where one process has all rows
        trainee = self._trainee = cast(PreTrainedModel | PeftModel, self.model)
        self.trained = {n: p for n, p in trainee.named_parameters() if p.requires_grad}
        for parameter in self.trained.values():  # TRL makes them bf16 on a quantised base
            parameter.data = parameter.data.float()
        self._ranks = ranks(trainee)
        if self._ranks is not None:
            self.add_callback(RankSchedule(self._ranks))
        self._attention = SequenceAttention(base_of(trainee))
        self._losses = LabelLoss(base_of(trainee))
        self._labels_a_row = 0.0  # held out, on average
        if self.eval_dataset is not None:
            held_out = cast(Dataset, self.eval_dataset)["labels"]
            count = sum(label != IGNORED for labels in held_out for label in labels[1:])
            self._labels_a_row = count / len(held_out)

    @contextmanager
    def laid_out(self) -> Iterator[None]:
        """Keep attention inside each sequence, where they lie end to end."""
        if self.padding_free:
            with self._attention.installed():
                yield
        else:
            yield

    def share_rows(self, order: EvenOrder) -> None:
        """Take this process's part of all rows, and drop out unlike the others."""
        self._order = order
        self.add_callback(order)
        torch.manual_seed(self.args.seed + distributed.rank())

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        return self._order or super()._get_train_sampler(train_dataset)

    def seconds(self) -> float:
        """Return the training time so far, over all resumes."""
        return self.seconds_before + time.monotonic() - self._started

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write what a resume needs, whole or not at all, in place of the Trainer's own way.

        The first process writes for all: only their random states differ.
        """
        states = distributed.from_all(self._random_state())
        if not distributed.is_main():
            return

        def fill(folder: Path) -> None:
            tensors = {name: p.detach().contiguous() for name, p in self.trained.items()}
            save_file(tensors, folder / TRAINED)
            if self._ranks is not None:
                torch.save(rank_state(self._ranks), folder / RANKS)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            for name, state in states:
                (folder / name).write_bytes(state)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        keep = self.args.save_total_limit or 1
        best = self.state.best_global_step
        write_checkpoint(folder, step, self.seconds(), fill, keep=keep, best=best)

    def _random_state(self) -> tuple[str, bytes]:
        """Return the file that the Trainer keeps this process's random state in, and its name."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            (file,) = Path(folder).iterdir()
            return file.name, file.read_bytes()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Put back what `_save_checkpoint` wrote; PEFT would cut off AdaLoRA's idle ranks."""
        folder = Path(resume_from_checkpoint)
        saved = load_file(folder / TRAINED)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(saved[name])
        if self._ranks is not None:
            load_rank_state(self._ranks, torch.load(folder / RANKS, weights_only=True))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        assert not return_outputs, "nothing asks this trainer for logits"
        forward = {key: value for key, value in inputs.items() if key != "labels"}
        if self.padding_free:
            starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
            self._attention.lay_out([*starts, inputs["input_ids"].shape[1]])
        # What each place predicts, learned tokens included; the last one of a row predicts nothing.
        labels = F.pad(inputs["labels"], (num_prepended(self._trainee), 1), value=IGNORED)
        predicted = labels[:, 1:].flatten()
        rows = (predicted != IGNORED).nonzero()[:, 0]
        count: torch.Tensor | float | None = num_items_in_batch
        if count is None:  # validation, whose loop takes a mean over rows: make it one over labels
            num_rows = len(starts) if self.padding_free else len(inputs["input_ids"])
            count = self._labels_a_row * num_rows
        weights = torch.ones(len(rows), device=rows.device) / count
        if self.aux_loss_enabled:
            forward["output_router_logits"] = True
        outputs: list[Any] = []

        def answer() -> Any:
            outputs.append(model(**forward, use_cache=False))
            return outputs[0]

        loss = self._losses(answer, rows, predicted[rows], weights, [len(rows)]).sum()
        if num_items_in_batch is not None:  # the labels of all processes, whose gradients are meant
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:  # a mixture of experts' own, a mean over its micro-batches
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs[0].aux_loss / steps
        if self._ranks is not None and model.training:
            # It steers the matrices and is no part of the loss that runs are compared by.
            steer = orthogonality(self._ranks) / self.current_gradient_accumulation_steps
            loss = loss + steer - steer.detach()
        return loss


class RankSchedule(TrainerCallback):
    """Let AdaLoRA shift its ranks after every step, while the gradients are still there."""

    def __init__(self, tuner: AdaLoraModel) -> None:
        self._tuner = tuner

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._tuner.update_and_allocate(state.global_step)


@contextmanager
def _base_restored(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Take off the base, at the end, what TRL and the Trainer put onto it."""
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
        if base.is_activation_checkpointing:
            base.activation_checkpointing_disable()
            base.disable_input_require_grads()
        for name, value in before.items():
            setattr(config, name, value)
        model.eval()


def _as_dataset(examples: list[Example]) -> Dataset:
    return Dataset.from_list([dict(example) for example in examples])
