"""Merge an adapter into the base's weights, and check the log-likelihoods of the written model.

Compared are the log-likelihoods, in nats, of some of the run's own prompts: by base and adapter as
the run was scored, and by the model that is loaded again from the written files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.methods import METHODS
from finetune.data import dataset
from finetune.data.row_prompts import last_prompts
from finetune.data.turns import Prompt
from finetune.inference.trained import Trained, load_as_published
from finetune.models import adapters, base_model, quantization
from finetune.models.precision import compute_dtype
from finetune.problems import Refused

NUM_PROMPTS = 8
# Of a prompt's log-likelihood a token. Measured for SmolLM2-135M, merged: fp32 2e-6, fp16 3e-3,
# bf16 0.13 (it rounds much of a small update away), int8 0.02; tuning moved them by 0.2 to 1.2.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.3}
INT8_TOLERANCE = 0.15  # bitsandbytes rounds the layers' inputs too, and merged weights do not


@dataclass(frozen=True)
class Check:
    """The largest difference of two models' log-likelihoods of the same prompts, and its bound."""

    num_prompts: int
    num_tokens: int
    largest: float  # difference of a prompt's log-likelihood, a token
    tolerance: float
    dtype: str

    @property
    def has_passed(self) -> bool:
        return self.largest <= self.tolerance

    def describe(self) -> str:
        return (
            f"log-likelihoods of {self.num_prompts} of the run's prompts ({self.num_tokens:,} "
            f"tokens, {self.dtype}) differ by at most {self.largest:.1e} a token "
            f"(bound {self.tolerance:.0e})"
        )


def find_merge_problem(run: Trained) -> str | None:
    """Return why a run's method cannot be merged; None where it can."""
    method = METHODS[run.config.peft.method]
    if method.merge_problem is not None:
        return f"--merge: peft.method={method.name} {method.merge_problem}"
    if run.model.quantization == "gptq":
        return "--merge: a GPTQ base cannot be dequantised; export the adapter without --merge"
    return None


def write_merged(run: Trained, folder: Path) -> Check:
    """Write base and adapter as one merged model into an existing folder; return its check.

    A quantised base is dequantised first. The initial adapter that PiSSA and OLoRA subtract from
    the base stays subtracted, as in the run.
    """
    tokenizer = run.load_tokenizer()
    prompts = find_prompts(run, tokenizer)
    adapted = load_as_scored(run)
    before = log_likelihoods(adapted, prompts)
    merged = merge(run, adapted)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del adapted, merged  # before the next one is loaded
    plain = replace(run.model, path=str(folder), revision=None, quantization="none")
    written = base_model.load_base(plain, base_model.find_model(plain), run.device)
    return compare(run, prompts, before, log_likelihoods(written, prompts))


def load_as_scored(run: Trained) -> PeftModel:
    """Load base and adapter as the run was scored, also with PiSSA and OLoRA."""
    return adapters.load(run.load_base(), run.folder.adapter)


def merge(run: Trained, adapted: PeftModel) -> PreTrainedModel:
    """Merge a run's adapter into the base's weights; a quantised base is dequantised."""
    adapters.take_off(adapted)
    base = adapters.base_of(adapted)
    if run.model.quantization != "none":
        base = quantization.dequantize(base)
    merged = load_as_published(base, run.folder.adapter).merge_and_unload(safe_merge=True)
    return cast(PreTrainedModel, merged)


def check_adapter(run: Trained, folder: Path) -> Check:
    """Compare an adapter that was converted to the published base with the run's own."""
    prompts = find_prompts(run, run.load_tokenizer())
    before, after = (
        log_likelihoods(adapters.load(run.load_base(), adapter), prompts)
        for adapter in (run.folder.adapter, folder)
    )
    return compare(run, prompts, before, after)


def find_prompts(run: Trained, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return prompts to check with.

    Raises:
        Refused: the run's rows cannot be read any more, or are too short to compare.
    """
    settings = run.config.data, run.config.training
    try:
        rows = dataset.read_sources(dataset.find_sources(run.config.data))
    except (FileNotFoundError, ValueError) as error:
        raise Refused(
            [f"the export is checked on rows of the run, which cannot be read: {error}"]
        ) from None
    found = last_prompts(rows, *settings, tokenizer, NUM_PROMPTS)
    prompts = [prompt for prompt in found if len(prompt.tokens) > 1]
    if not prompts:
        raise Refused(["the export is checked on prompts of the run, which are all too short"])
    return prompts


def log_likelihoods(model: PreTrainedModel | PeftModel, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Return each prompt's log-likelihood from its second token on, a token."""
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = torch.tensor([prompt.tokens], device=model.device)
            scores = cast(Any, model)(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
            found.append(scores.gather(1, tokens[0, 1:, None]).mean().cpu())
    return torch.stack(found)


def compare(
    run: Trained, prompts: Sequence[Prompt], before: torch.Tensor, after: torch.Tensor
) -> Check:
    """Compare two models' log-likelihoods of the same prompts."""
    dtype = compute_dtype(run.model, run.device)
    differences = (before - after).abs().nan_to_num(float("inf"))
    return Check(
        len(prompts),
        sum(len(prompt.tokens) - 1 for prompt in prompts),
        float(differences.max()),
        max(TOLERANCES[dtype], INT8_TOLERANCE if run.model.quantization == "int8" else 0.0),
        str(dtype).removeprefix("torch."),
    )
