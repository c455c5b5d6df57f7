"""A few prompts answered by base and tuned model, for a reader's eye: `samples.json` of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_SAMPLES = 3
NEW_TOKENS = 48


@dataclass(frozen=True)
class Sample:
    """One prompt and what each model says to it, by greedy decoding."""

    prompt: str
    base: str
    tuned: str


def answer(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[str]:
    """Answer prompts by greedy decoding."""
    if not prompts:
        return []
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    asked = {name: given[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        said = cast(Any, model).generate(
            **asked, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    new = said[:, asked["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
