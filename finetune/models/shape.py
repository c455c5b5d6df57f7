"""The sizes of a base model, from its config and on the `meta` device: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.config.paths import conf_dir
from finetune.config.schema import ModelConfig
from finetune.models import base_model
from finetune.models.quantization import gptq_bytes


@dataclass(frozen=True)
class Shape:
    """A model's sizes; widths are numbers of features."""

    hidden: int
    layers: int
    attention: int  # features of all query heads
    keys: int  # features of all key heads; values have as many
    inner: int  # of the MLP
    vocabulary: int
    num_linear: int  # parameters of the linear layers but the head
    num_other: int  # of all else: embeddings, head, norms
    largest: int  # parameters of the largest linear layer
    targets: dict[str, tuple[int, int, int]]  # last name -> how many, in, out
    gptq: float  # bytes per weight of a GPTQ checkpoint


def find_shape(model: ModelConfig) -> Shape:
    """Read a model's sizes from its config, or from the dimensions that ship with it.

    Raises:
        FileNotFoundError: neither is there.
    """
    return describe_shape(base_model.load_meta_model(model, load_config(model)))


def load_config(model: ModelConfig) -> PreTrainedConfig:
    """Return the model's own config, or where it is out of reach the dimensions of its YAML."""
    try:
        return base_model.load_config(model, base_model.find_model(model))
    except (OSError, ValueError):
        if not model.dimensions or _are_of_another_model(model):
            raise
    config: PreTrainedConfig = AutoConfig.for_model(**model.dimensions)
    return config


def _are_of_another_model(model: ModelConfig) -> bool:
    """Return whether the dimensions are those of a shipped model whose path was replaced."""
    options = [yaml.safe_load(file.read_text()) for file in (conf_dir() / "model").glob("*.yaml")]
    named = [one for one in options if one.get("dimensions") == model.dimensions]
    return bool(named) and all(one["path"] != model.path for one in named)


def describe_shape(meta: PreTrainedModel) -> Shape:
    """Count a model's parameters and widths."""
    config = meta.config.get_text_config()
    head = meta.get_output_embeddings()
    targets: dict[str, tuple[int, int, int]] = {}
    num_linear = largest = 0
    for name, layer in meta.named_modules():
        if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head:
            rows, columns = layer.weight.shape
            wide = (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)
            short = name.rpartition(".")[2]
            targets[short] = (targets.get(short, (0, 0, 0))[0] + 1, *wide)
            num_linear += layer.weight.numel()
            largest = max(largest, layer.weight.numel())
    total = sum(parameter.numel() for parameter in meta.parameters())
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        attention=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        num_linear=num_linear,
        num_other=total - num_linear,
        largest=largest,
        targets=targets,
        gptq=gptq_bytes(meta.config),
    )
