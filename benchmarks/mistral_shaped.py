"""A model of the shape of Mistral-7B with random weights in 4-bit, to measure a CUDA card on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MistralConfig,
    PreTrainedTokenizerBase,
)

from finetune.config.schema import ModelConfig
from finetune.files import replaced
from finetune.home import cache_dir
from finetune.models.base_model import find_model, load_tokenizer


def mistral_shaped(tokenizer: Path | None = None) -> Path:
    """Return the model's folder, written once; by default with the demo's tokenizer."""
    folder = cache_dir() / "models" / "mistral-shaped-nf4"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        chosen = (
            load_tokenizer(ModelConfig(), find_model(ModelConfig()))
            if tokenizer is None
            else AutoTokenizer.from_pretrained(tokenizer)
        )
        with replaced(folder) as temporary:
            write_mistral_shaped(temporary, chosen, torch.device("cuda", 0))
    return folder


def write_mistral_shaped(
    folder: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device, **changes: Any
) -> None:
    """Write the model in nf4 with its tokenizer, as pre-quantised checkpoints are.

    Args:
        folder: to write into.
        tokenizer: whose vocabulary the model gets.
        device: to draw the weights on, 15 GB of them in bf16.
        changes: of its config.
    """
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=len(tokenizer), **changes)
    with tempfile.TemporaryDirectory() as whole:
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                AutoModelForCausalLM.from_config(config).save_pretrained(whole)
        finally:
            torch.set_default_dtype(torch.float32)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(
            whole, quantization_config=quantised, dtype=torch.bfloat16, device_map={"": device}
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
