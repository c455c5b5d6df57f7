"""AdaLoRA: its orthogonality regulariser, rank allocation after each step, state to resume.

Zhang et al. 2023, arXiv:2303.10512.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.models.adapters import ADAPTER

RANK_STATE = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator


def find_adalora(model: torch.nn.Module) -> AdaLoraModel | None:
    """Return AdaLoRA's tuner, which allocates ranks; None with other methods."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, AdaLoraModel) else None


def orthogonality(tuner: AdaLoraModel) -> torch.Tensor:
    """Return AdaLoRA's regulariser (eq. 4 of the paper), weighted.

    PEFT adds it to the loss of the model; ours is computed outside the model.
    """
    norms = []
    for name, parameter in tuner.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            norms.append(torch.norm(square - torch.eye(len(square), device=square.device)))
    return _settings(tuner).orth_reg_weight * torch.stack(norms).mean()


def rank_state(tuner: AdaLoraModel) -> dict[str, Any]:
    """Return AdaLoRA's state beside its matrices: the importance estimates of its ranks."""
    allocator = tuner.rankallocator
    state = {name: getattr(allocator, name) for name in RANK_STATE}
    return {**state, "rank_pattern": _settings(tuner).rank_pattern}


def load_rank_state(tuner: AdaLoraModel, state: dict[str, Any]) -> None:
    _settings(tuner).rank_pattern = state["rank_pattern"]
    for name in RANK_STATE:
        setattr(tuner.rankallocator, name, state[name])


def _settings(tuner: AdaLoraModel) -> AdaLoraConfig:
    return cast(AdaLoraConfig, tuner.peft_config[ADAPTER])


class RankSchedule(TrainerCallback):
    """Let AdaLoRA reallocate its ranks after every step, before the gradients are cleared."""

    def __init__(self, tuner: AdaLoraModel) -> None:
        self._tuner = tuner

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._tuner.update_and_allocate(state.global_step)
