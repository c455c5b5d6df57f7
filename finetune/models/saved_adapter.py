"""Adapters saved by anyone with PEFT, checked against the model before a weight is loaded."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedModel

LORA_TENSOR = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")
IMPORTING_KEYS = ("megatron_config", "megatron_core")


def find_code_problems(folder: Path) -> list[str]:
    """Return the settings of a saved adapter that let PEFT import any Python module."""
    try:
        settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError:
        return []  # reported where it is read
    named = [key for key in IMPORTING_KEYS if isinstance(settings, dict) and settings.get(key)]
    return [
        f"{folder / CONFIG_NAME}: {key} lets PEFT import a Python module; remove it"
        for key in named
        if (key, settings[key]) != ("megatron_core", "megatron.core")  # PEFT's default
    ]


def find_problems(model: PreTrainedModel, folder: Path) -> list[str]:
    """Return why a saved adapter cannot be loaded onto a model, or removed; changes the model.

    Args:
        model: on the `meta` device; it keeps the adapter.
        folder: of the adapter.
    """
    key = f"model.adapter={folder}"
    if problems := find_code_problems(folder):
        return problems
    try:
        settings: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{key}: its {CONFIG_NAME} cannot be read ({error}); save the adapter again"]
    if hasattr(settings, "init_lora_weights"):
        settings.init_lora_weights = True  # other ways to begin compute with the base's weights
    name = str(settings.peft_type).rpartition(".")[2]
    kind = PEFT_TYPE_TO_TUNER_MAPPING.get(settings.peft_type)
    if not settings.is_prompt_learning and not hasattr(kind, "unload"):
        return [
            f"{key} is of PEFT's type {name}, which PEFT cannot remove from the base again; "
            "use an adapter of another type, such as LoRA"
        ]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tied weights, which are scored as PEFT loads them
        try:
            expected = get_peft_model_state_dict(
                cast(PeftModel, get_peft_model(model, settings)), save_embedding_layers=False
            )
        except ValueError as error:
            return [f"{key} does not fit the model: {str(error).splitlines()[0]}"]
        except (RuntimeError, NotImplementedError):  # of a type that computes at its initialisation
            return []
    return _find_shape_problems(key, expected, folder / SAFETENSORS_WEIGHTS_NAME)


def _find_shape_problems(key: str, expected: dict[str, torch.Tensor], file: Path) -> list[str]:
    with safe_open(file, "pt") as saved:
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118  # no mapping
    common = [name for name in expected if name in shapes]
    if expected and not common:
        return [f"{key} does not fit the model: none of its tensors belongs to a layer of it"]
    for name in common:
        wanted = tuple(expected[name].shape)
        if shapes[name] != wanted and "lora_E" not in name and len(wanted) == len(shapes[name]):
            return [
                f"{key} does not fit the model: its {name} is {list(shapes[name])}, and the "
                f"model's layer takes {list(wanted)}; name the model it was trained on"
            ]
    return _find_unmatched(key, expected, shapes)


def _find_unmatched(key: str, expected: Collection[str], saved: Collection[str]) -> list[str]:
    """Return a problem if layers have no saved tensors, or saved tensors no layer.

    PEFT leaves such layers at their initialisation. AdaLoRA drops layers that have no rank left.
    """
    lora = [name for name in expected if LORA_TENSOR.search(name)]
    missing = [name for name in lora if name not in saved]
    surplus = [name for name in saved if LORA_TENSOR.search(name) and name not in expected]
    if missing:
        return [
            f"{key} is incomplete: {len(missing)} of {len(lora)} tensors that its settings ask for "
            f"are missing ({missing[0]}); save the adapter again"
        ]
    if surplus:
        return [
            f"{key} does not fit the model: {len(surplus)} of its tensors belong to no layer of it "
            f"({surplus[0]}); name the model it was trained on"
        ]
    return []
