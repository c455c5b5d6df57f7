"""Sample answers of base and tuned model to a few prompts, for the reader: `samples.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.models.base_model import autocast_dtype, autocast_to

NUM_SAMPLES = 4  # on a CPU faster than three, whose products read the weights at 6 GB/s, not 9
NEW_TOKENS = 32


@dataclass(frozen=True)
class Sample:
    """One prompt and the answer of each model, by greedy decoding."""

    prompt: str
    base: str
    tuned: str
    row: str  # its number, and whether it was trained on


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
) -> list[str]:
    """Answer prompts, given by their tokens, by greedy decoding."""
    if not prompts:
        return []
    longest = max(map(len, prompts))
    before = [longest - len(prompt) for prompt in prompts]  # padding, on the left
    padded = zip(before, prompts, strict=True)
    ids = [[tokenizer.pad_token_id] * num + [*prompt] for num, prompt in padded]
    mask = [[0] * num + [1] * (longest - num) for num in before]
    with (
        torch.inference_mode(),
        autocast_to(model.device, autocast_dtype(model, model.dtype)),
    ):
        said = cast(Any, model).generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = said[:, longest:]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
