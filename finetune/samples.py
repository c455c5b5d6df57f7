"""A few prompts answered by base and tuned model, for a reader's eye: `samples.json` of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from finetune.prompts import Prompt

NUM_SAMPLES = 3
NEW_TOKENS = 48


@dataclass(frozen=True)
class Sample:
    """One prompt and what each model says to it, by greedy decoding."""

    prompt: str
    base: str
    tuned: str


def answer_samples(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
) -> list[Sample]:
    """Answer prompts with the adapter and without it."""
    if not prompts:
        return []
    tuned = _answers(model, tokenizer, prompts)
    with model.disable_adapter():
        base = _answers(model, tokenizer, prompts)
    asked = [prompt.text for prompt in prompts]
    return [Sample(*parts) for parts in zip(asked, base, tuned, strict=True)]


def _answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
) -> list[str]:
    longest = max(len(prompt.tokens) for prompt in prompts)
    before = [longest - len(prompt.tokens) for prompt in prompts]  # padding, on the left
    padded = zip(before, prompts, strict=True)
    ids = [[tokenizer.pad_token_id] * num + prompt.tokens for num, prompt in padded]
    mask = [[0] * num + [1] * (longest - num) for num in before]
    asked = {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }
    with torch.inference_mode():
        said = model.generate(
            **asked, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    new = said[:, asked["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
