"""Attach a PEFT method to the base model, checked beforehand against the model's own layers."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.config import ALL_LINEAR, LoraConfig

ADAPTER = "default"  # PEFT's name for the only one


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


@dataclass(frozen=True)
class LoraLayer:
    """One layer's update, `scaling * B A`: A [r, in], B [out, r], both fp32."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scaling: float


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA adapter apart from its base."""

    settings: PeftLoraConfig
    layers: dict[str, LoraLayer]  # by the name of the base's layer
    tensors: dict[str, torch.nn.Parameter]  # by the name that PEFT saves them under


def draw(model: PreTrainedModel, lora: LoraConfig, seed: int) -> LoraWeights:
    """Draw a fresh LoRA adapter for the base, as `attach` does, and leave the base as it was."""
    adapted = attach(model, lora, seed)
    layers = {
        name.removeprefix("base_model.model."): LoraLayer(
            cast(torch.nn.Parameter, module.lora_A[ADAPTER].weight),
            cast(torch.nn.Parameter, module.lora_B[ADAPTER].weight),
            module.scaling[ADAPTER],
        )
        for name, module in adapted.named_modules()
        if isinstance(module, PeftLoraLayer)
    }
    tensors = {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    settings = cast(PeftLoraConfig, adapted.peft_config[ADAPTER])
    adapted.unload()
    return LoraWeights(settings, layers, tensors)


def save_weights(weights: LoraWeights, folder: Path) -> None:
    """Save an adapter's files, as PEFT does, into a folder that is there."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.tensors.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    settings = copy.copy(weights.settings)
    settings.inference_mode = True
    settings.save_pretrained(str(folder))


def load_weights(weights: LoraWeights, folder: Path) -> None:
    """Put a saved adapter's values into one of the same settings."""
    saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    with torch.no_grad():
        for name, tensor in weights.tensors.items():
            tensor.copy_(saved[name])


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


def save(adapter: PeftModel | LoraWeights, folder: Path) -> None:
    """Save the adapter as safetensors, whole or not at all."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        if isinstance(adapter, PeftModel):
            adapter.save_pretrained(str(temporary), safe_serialization=True)
        else:
            save_weights(adapter, temporary)
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter onto the base, for evaluation."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=False)
