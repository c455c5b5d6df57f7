"""Quantisation of the base: its checkpoint's own, or `model.quantization` while it loads.

The checkpoint's own settings take precedence wherever the two could differ.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any, cast

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from finetune.config.rules import QUANTIZATIONS
from finetune.config.schema import ModelConfig
from finetune.models.devices import OLDEST_INT8, Capability, render

FOUR_BIT = ("nf4", "fp4")
BITSANDBYTES = (*FOUR_BIT, "int8")
GPTQ_PACKAGES = ("gptqmodel", "optimum")  # as transformers' quantizer_gptq.py asks for them


def as_loaded(model: ModelConfig, config: PreTrainedConfig) -> ModelConfig:
    """Return the settings with the quantisation that the base has once it is loaded."""
    own = _own_settings(config)
    if not own:
        return model
    double = bool(own.get("bnb_4bit_use_double_quant"))
    return replace(model, quantization=find_quantization(model, config), double_quant=double)


def find_quantization(model: ModelConfig, config: PreTrainedConfig) -> str:
    """Return how the loaded base is quantised, by our names or, unknown to us, by transformers'."""
    own = _own_settings(config)
    if not own:
        return model.quantization
    if own.get("load_in_4bit"):
        return str(own.get("bnb_4bit_quant_type", "fp4"))  # transformers' own default
    return "int8" if own.get("load_in_8bit") else str(own.get("quant_method"))


def is_quantised_already(config: PreTrainedConfig) -> bool:
    """Return whether the checkpoint itself is quantised."""
    return bool(_own_settings(config))


def _own_settings(config: PreTrainedConfig) -> dict[str, Any]:
    whole, text = config.to_dict(), config.get_text_config().to_dict()
    return whole.get("quantization_config") or text.get("quantization_config") or {}


def find_problems(model: ModelConfig, config: PreTrainedConfig, device: torch.device) -> list[str]:
    """Return why the base cannot be loaded as it is quantised, with the remedy."""
    found = find_quantization(model, config)
    if found not in QUANTIZATIONS:
        return [
            f"model.path={model.path} is quantised as {found}, which is not among "
            f"{', '.join(QUANTIZATIONS)}; use an unquantised checkpoint and model.quantization=nf4"
        ]
    if model.quantization not in ("none", found):
        return [
            f"model.quantization is {model.quantization}, but {model.path} is quantised as {found} "
            "already; set model.quantization=none, or use an unquantised checkpoint"
        ]
    if found == "int8" and device.type == "cuda" and torch.cuda.is_available():
        return _find_int8_problems(model, torch.cuda.get_device_capability(device))
    if found != "gptq":
        return []
    if not is_quantised_already(config):
        return [
            f"model.quantization is gptq, but {model.path} is not a GPTQ checkpoint, and a base "
            "is not quantised so while it loads; use a GPTQ checkpoint, or set "
            "model.quantization=nf4"
        ]
    missing = [package for package in GPTQ_PACKAGES if find_spec(package) is None]
    if missing:
        return [
            f"model.path={model.path} is a GPTQ checkpoint, which needs {' and '.join(missing)}; "
            f"pip install {' '.join(missing)}, or use an unquantised checkpoint and "
            "model.quantization=nf4"
        ]
    if device.type != "cuda":
        return [
            f"model.path={model.path} is a GPTQ checkpoint, which needs a CUDA device; use a "
            "machine that has one, or an unquantised checkpoint and model.quantization=nf4"
        ]
    return []


def _find_int8_problems(model: ModelConfig, capability: Capability) -> list[str]:
    if capability >= OLDEST_INT8:
        return []
    key = "model.quantization is int8" if model.quantization == "int8" else "model.path is in int8"
    return [
        f"{key}, which needs compute capability {render(OLDEST_INT8)}, and the GPU has "
        f"{render(capability)}; use an unquantised checkpoint and model.quantization=nf4"
    ]


def build_settings(
    model: ModelConfig, config: PreTrainedConfig, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' settings for loading; None where nothing is quantised while loading."""
    if is_quantised_already(config) or model.quantization == "none":
        return None
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization,
        bnb_4bit_use_double_quant=model.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def fit_checkpoint(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Set a quantised checkpoint's compute dtype to ours, and for GPTQ a backend that trains.

    Its config has the dtype of the GPU that it was made on, and a backend for inference.
    """
    own = _own_settings(config)
    if own.get("load_in_4bit"):
        name = str(dtype).removeprefix("torch.")
        config.quantization_config = {**own, "bnb_4bit_compute_dtype": name}
    elif own.get("quant_method") == "gptq":
        config.quantization_config = {**own, "backend": "auto_trainable"}


def gptq_bytes(config: PreTrainedConfig) -> float:
    """Return the bytes of a GPTQ weight: its bits, and its share of a group's scale and zero."""
    own = _own_settings(config)
    weight = own.get("bits", 4) / 8
    group = own.get("group_size", 128)
    return float(weight + (2 + weight) / group if group > 0 else weight)


def keep_4bit_layout(base: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking weights at the first evaluation on an AVX512-BF16 CPU.

    The repacked weights make every later gradient wrong, without an error (0.50.2).
    """
    for module in linears_4bit(base):
        module.support_avx512bf16_for_cpu = False


def linears_4bit(model: torch.nn.Module) -> list[Any]:
    """Return the layers that bitsandbytes holds in 4 bits."""
    from bitsandbytes.nn.modules import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def is_castable(model: torch.nn.Module) -> bool:
    """Return whether a loaded model computes in any dtype: int8 and GPTQ layers have their own."""
    in_8bit = getattr(model, "is_loaded_in_8bit", False)
    return not in_8bit and getattr(model, "quantization_method", None) != "gptq"


def cast_unquantised(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the norms and embeddings of a 4-bit bitsandbytes checkpoint to the compute dtype.

    transformers 5.23 leaves them in the checkpoint's dtype whatever `dtype` it is called with: in
    bf16 on a GPU without bf16, and in bf16 where fp32 is set. The same dtype would round the
    weights that are dequantised, on a GPU and for a merge.
    """
    if not getattr(base, "is_loaded_in_4bit", False):
        return
    for parameter in base.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(dtype)
    for layer in linears_4bit(base):
        layer.weight.quant_state.dtype = dtype


def dequantize(base: PreTrainedModel) -> PreTrainedModel:
    """Return a bitsandbytes base in floats, to be merged into and saved.

    transformers 5.23 leaves its marks, which PEFT's (IA)^3 reads, and for saving the conversions of
    a checkpoint that was quantised already, which cannot be reversed.
    """
    plain: Any = base.dequantize()
    plain.is_loaded_in_4bit = plain.is_loaded_in_8bit = False
    conversions = getattr(plain, "_weight_conversions", None)
    if conversions is not None:
        plain._weight_conversions = [one for one in conversions if _is_reversible(one)]
    return cast(PreTrainedModel, plain)


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def copy_mapped_weights(base: PreTrainedModel) -> None:
    """Copy weights that are views of the mapped checkpoint, so that its memory is freed."""
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
