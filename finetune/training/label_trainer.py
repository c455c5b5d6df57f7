"""TRL's SFTTrainer with per-sequence attention, logits only at labels, and atomic checkpoints.

Axes: a batch is [sequence, token]; a padding-free one is one concatenated sequence.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
)
from transformers.trainer import OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME
from trl.trainer.sft_trainer import SFTTrainer

from finetune import distributed
from finetune.data.token_rows import IGNORED
from finetune.models.adapters import base_of, num_prepended
from finetune.tracking.claims import Claim
from finetune.training.adalora import (
    RankSchedule,
    find_adalora,
    load_rank_state,
    orthogonality,
    rank_state,
)
from finetune.training.fsdp import (
    full_optimizer_state,
    full_tensors,
    load_full_tensor,
    trained_parameters,
    use_fsdp,
)
from finetune.training.label_loss import LabelLoss
from finetune.training.row_order import EvenOrder
from finetune.training.sequence_attention import SequenceAttention
from finetune.training.steps import save_step

TRAINED, RANKS = "trained.safetensors", "ranks.pt"


class LabelTrainer(SFTTrainer):
    """SFTTrainer that computes logits and loss only at positions that predict a label.

    The objective is the stock one: the sum of the labels' cross-entropies over the number of
    labels in the whole optimizer step.
    """

    def __init__(self, *args: Any, num_rows: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._num_rows = num_rows  # to train on, without the filler
        self.seconds_before = 0.0  # of training before it was interrupted
        self.claim: Claim | None = None  # under which checkpoints are written
        self._started = time.monotonic()
        trainee = self._trainee = cast(PreTrainedModel | PeftModel, self.model)
        if self.is_fsdp_enabled:  # which puts only a shard of it on each GPU
            cast(torch.nn.Module, trainee).to("cpu")
        # TRL makes them bf16 on a quantised base.
        for parameter in trained_parameters(trainee).values():
            parameter.data = parameter.data.float()
        self._adalora = find_adalora(trainee)
        if self._adalora is not None:
            self.add_callback(RankSchedule(self._adalora))
        self._attention = SequenceAttention(base_of(trainee))
        with self.accelerator.autocast():  # as in training, where adapters may stay in fp32
            self._losses = LabelLoss(base_of(trainee))
        self._labels_a_row = 0.0  # of the validation rows, on average
        if self.eval_dataset is not None:
            held_out = cast(Dataset, self.eval_dataset)["labels"]
            count = sum(label != IGNORED for labels in held_out for label in labels[1:])
            self._labels_a_row = count / len(held_out)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            use_fsdp(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    @contextmanager
    def per_sequence_attention(self) -> Iterator[None]:
        """Install per-sequence attention where batches are padding-free."""
        if self.padding_free:
            with self._attention.installed():
                yield
        else:
            yield

    def _autocast(self) -> AbstractContextManager[None]:
        """Autocast under FSDP, where accelerate does not wrap the model's forward in it."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        """Return the row order of our own loop; at a resume, that of its epoch."""
        order = EvenOrder(self._num_rows, self.args)
        self.add_callback(order)
        return order

    def seconds(self) -> float:
        """Return the training time so far, over all resumes."""
        return self.seconds_before + time.monotonic() - self._started

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write what a resume needs, atomically, in place of the Trainer's own checkpoint.

        Rank 0 writes for all ranks: only their random states differ.
        """
        states = distributed.from_all(self._random_state())
        tensors = full_tensors(trained_parameters(self._trainee))
        optimizer = None
        if self.is_fsdp_enabled:
            assert self.optimizer is not None
            optimizer = full_optimizer_state(self._trainee, self.optimizer)
        if not distributed.is_main():
            return

        def fill(folder: Path) -> None:
            save_file(tensors, folder / TRAINED)
            if self._adalora is not None:
                torch.save(rank_state(self._adalora), folder / RANKS)
            if optimizer is None:
                self._save_optimizer_and_scheduler(str(folder))
            else:  # which the Trainer would write from all ranks
                assert self.lr_scheduler is not None
                torch.save(optimizer, folder / OPTIMIZER_NAME_BIN)
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
            self._save_scaler(str(folder))
            for name, state in states:
                (folder / name).write_bytes(state)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

        step, best = self.state.global_step, self.state.best_global_step
        save_step(self.args, step, self.seconds(), fill, best=best, claim=self.claim)

    def _random_state(self) -> tuple[str, bytes]:
        """Return name and bytes of the Trainer's file with this rank's random state."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            (file,) = Path(folder).iterdir()
            return file.name, file.read_bytes()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Load what `_save_checkpoint` wrote; PEFT would drop AdaLoRA's idle ranks."""
        folder = Path(resume_from_checkpoint)
        saved = load_file(folder / TRAINED)
        for name, parameter in trained_parameters(self._trainee).items():
            load_full_tensor(parameter, saved[name])
        if self._adalora is not None:
            load_rank_state(self._adalora, torch.load(folder / RANKS, weights_only=True))

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
        # The label of each position, virtual tokens included; the last one of a row predicts none.
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

        def run_model() -> Any:
            with self._autocast():
                outputs.append(model(**forward, use_cache=False))
            return outputs[0]

        loss = self._losses(run_model, rows, predicted[rows], weights, [len(rows)]).sum()
        if num_items_in_batch is not None:  # of all ranks, whose gradients are averaged
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:  # of a mixture of experts, a mean over micro-batches
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs[0].aux_loss / steps
        if self._adalora is not None and model.training:
            # Its gradient counts; its value stays out of the loss that runs are compared by.
            penalty = orthogonality(self._adalora) / self.current_gradient_accumulation_steps
            loss = loss + penalty - penalty.detach()
        return loss
