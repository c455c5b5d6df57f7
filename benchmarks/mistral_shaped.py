"""A model of the shape of Mistral-7B with random weights, to measure a CUDA card on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MistralConfig


def write_mistral_shaped(folder: Path, device: torch.device, **changes: Any) -> None:
    """Write it in bf16; `changes` are of its config (a vocabulary that fits a tokenizer)."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(MistralConfig(**changes))
        model.save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
