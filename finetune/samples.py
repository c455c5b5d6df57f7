"""A few prompts answered by base and tuned model, for a reader's eye: `samples.json` of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

NUM_SAMPLES = 3
NEW_TOKENS = 48


@dataclass(frozen=True)
class Sample:
    """One prompt and what each model says to it, by greedy decoding."""

    prompt: str
    base: str
    tuned: str


def answer_samples(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[Sample]:
    """Answer prompts with the adapter and without it."""
    tuned = _answers(model, tokenizer, prompts)
    with model.disable_adapter():
        base = _answers(model, tokenizer, prompts)
    return [Sample(*parts) for parts in zip(prompts, base, tuned, strict=True)]


def _answers(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    asked = {name: given[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        said = model.generate(
            **asked, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    new = said[:, asked["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
