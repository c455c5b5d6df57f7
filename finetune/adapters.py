"""Attach a PEFT method to the base model, checked beforehand against the model's own layers."""

from __future__ import annotations

import os
import shutil
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.config import ALL_LINEAR, LoraConfig


def find_target_problems(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """Return the faults of `lora` on this model: unknown layers, or a rank beyond their width.

    PEFT itself ignores an unknown name as long as another one matches.
    """
    widths = _linear_widths(model)
    if lora.target_modules == [ALL_LINEAR]:
        targets = list(widths)
    else:
        targets = [name for name in lora.target_modules if name in widths]
    problems = [
        f"lora.target_modules: the model has no linear layer {name!r}; "
        f"{_hint(name, list(widths))}it has {', '.join(widths)}"
        for name in lora.target_modules
        if name not in widths and name != ALL_LINEAR
    ]
    narrowest = min((widths[name] for name in targets), default=lora.r)
    if lora.r > narrowest:
        name = min(targets, key=lambda target: widths[target])
        problems.append(f"lora.r is {lora.r}; the layer {name} is only {narrowest} wide")
    return problems


def attach(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """Put a fresh LoRA adapter onto the base, its weights in fp32 and drawn from `seed`.

    fp32 whatever the base has, so that a resumed run continues bit by bit (TRL would otherwise
    make them bf16 on a quantised base, but load them back as fp32).
    """
    settings = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.target_modules == [ALL_LINEAR] else lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=cast(Any, True if lora.init == "default" else lora.init),
    )
    torch.manual_seed(seed)
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=True)
    assert isinstance(adapted, PeftModel)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def num_trainable(model: torch.nn.Module) -> int:
    """Return the number of parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _linear_widths(model: PreTrainedModel) -> dict[str, int]:
    """Return the last name of each linear layer but the head, with its smaller dimension."""
    head = model.get_output_embeddings()
    widths: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            short = name.rpartition(".")[2]
            width = min(module.weight.shape)
            widths[short] = min(width, widths.get(short, width))
    return widths


def _hint(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def save(model: PeftModel, folder: Path) -> None:
    """Save the adapter as safetensors, whole or not at all."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(str(temporary), safe_serialization=True)
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter onto the base, for evaluation."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=False)
