"""Generated texts for lm-eval: greedy requests many at a time, others by lm-eval's HFLM.

lm-eval keeps prompts, tokens, truncation, stop strings and metrics. A short and a long request are
first answered by HFLM too; if the texts differ, HFLM answers all, and the result has the reason.
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm
from transformers import PreTrainedModel

from finetune.evaluation.generation import Generated, Model, Stop, generate
from finetune.evaluation.prefix_tree import Tokens, count_tokens
from finetune.evaluation.scoring import MODEL_ERRORS, TOLERANCE, Scoring
from finetune.models.attention import find_obstacle
from finetune.models.process_memory import is_out_of_memory

log = logging.getLogger("finetune")

MOST_PROMPTS = 64  # generated together: each sees its keys through a mask over those of all
CHECKED_TOKENS = 16  # of each of the check's texts
MEMORY_SHARE = 4  # of the free memory, a cache of keys may take this part
# Settings of a model's generation_config that change no greedy text.
HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p",
    "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_length",
    "use_cache", "cache_implementation", "transformers_version", "_from_model_config",
    "num_return_sequences", "output_attentions", "output_hidden_states", "return_dict_in_generate",
}  # fmt: skip

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one meaning

Plain = Callable[[list[Instance]], list[str]]


class PrefixModel(Model, Protocol):
    """What is needed of the model: lm-eval's HFLM, and its passes over prefix trees."""

    model: PreTrainedModel
    device: torch.device
    base_passed: bool
    max_length: int
    max_gen_toks: int
    truncation: bool
    eot_token_id: int
    cache_hook: Any

    def tok_batch_encode(self, strings: list[str], **more: Any) -> tuple[torch.Tensor, Any]: ...
    def computing(self) -> AbstractContextManager[None]: ...
    def sharing(self) -> AbstractContextManager[None]: ...
    def most_keys(self) -> int: ...
    def plain_answers(
        self, keys: list[tuple[Tokens, Tokens]]
    ) -> dict[tuple[Tokens, Tokens], tuple[float, bool]]: ...


@dataclass(frozen=True)
class Group:
    """Requests with the same generation settings: each prompt once, and its tokens."""

    settings: Mapping[str, Any]
    stop: Stop
    prompts: dict[str, Tokens]


def answer_texts(
    lm: PrefixModel, requests: Sequence[Instance], plain: Plain
) -> tuple[list[str], Scoring]:
    """Answer lm-eval's requests for texts.

    Args:
        lm: the model.
        requests: each with its prompt and generation settings.
        plain: HFLM's own way.

    Returns:
        The texts, and how they were computed.
    """
    by_settings: dict[str, list[Instance]] = defaultdict(list)
    for request in requests:
        by_settings[json.dumps(request.args[1], sort_keys=True, default=str)].append(request)
    scoring, texts = Scoring(), {}
    for some in by_settings.values():
        found, how = _answer(lm, some, plain)
        scoring = scoring.joined(how)
        texts.update({id(request): text for request, text in zip(some, found, strict=True)})
    return [texts[id(request)] for request in requests], scoring


def _answer(lm: PrefixModel, requests: list[Instance], plain: Plain) -> tuple[list[str], Scoring]:
    started = time.monotonic()
    settings = requests[0].args[1]
    stop = _read_stop(lm, settings)
    prompts = dict.fromkeys(request.args[0] for request in requests)
    encoded = {one: _encode(lm, one) for one in prompts}
    room = lm.max_length - stop.most
    truncated = sum(len(tokens) > room for tokens in encoded.values())
    if truncated and room > 0:
        log.warning(
            "%d of %d prompts leave no room for an answer of %d tokens in the model's %d, and "
            "their beginning is cut off", truncated, len(encoded), stop.most, lm.max_length,
        )  # fmt: skip
    group = Group(settings, stop, {one: tokens[-room:] for one, tokens in encoded.items()})
    with lm.computing():
        reason = _find_obstacle(lm, group)
        how = Scoring("plain", reason) if reason else _check(lm, group, requests[0], plain)
        if how.reason is None:
            generated, num_tokens = _generate(lm, group, shown=True)
            how = replace(how, forwarded_tokens=num_tokens)
            found = [_text(lm, generated[request.args[0]], stop) for request in requests]
        else:
            log.warning("generated by lm-eval's HFLM, one batch after another: %s", how.reason)
            found = plain(requests)
    for request, text in zip(requests, found, strict=True):
        lm.cache_hook.add_partial("generate_until", request.args, text)
    return found, replace(how, seconds=time.monotonic() - started)


def _read_stop(lm: PrefixModel, settings: Mapping[str, Any]) -> Stop:
    kwargs = normalize_gen_kwargs(dict(settings), lm.max_gen_toks)
    eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
    texts = handle_stop_sequences(kwargs.get("until"), eos=eos)
    ends = lm.model.generation_config.eos_token_id
    found = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return Stop(found, tuple(texts), int(kwargs["max_gen_toks"]))


def _encode(lm: PrefixModel, prompt: str) -> Tokens:
    """Return the tokens of a prompt as HFLM has them, before it cuts them from the left."""
    ids, _ = lm.tok_batch_encode([prompt], truncation=lm.truncation)
    return tuple(ids[0].tolist())


def _find_obstacle(lm: PrefixModel, group: Group) -> str | None:
    """Return why HFLM has to generate the texts."""
    kwargs = normalize_gen_kwargs(dict(group.settings), lm.max_gen_toks)
    others = sorted(kwargs.keys() - {"until", "max_gen_toks", "do_sample", "temperature"})
    if kwargs["do_sample"] or others:
        return f"the task sets {', '.join(others) or 'do_sample'}, which is not greedy decoding"
    changed = sorted(lm.model.generation_config.to_diff_dict().keys() - HARMLESS)
    if changed:
        return f"the model's generation_config sets {', '.join(changed)}"
    if not all(group.prompts.values()) or lm.max_length <= group.stop.most:
        return "a prompt has no tokens"
    longest = max(map(len, group.prompts.values())) + group.stop.most
    return find_obstacle(lm.model, longest)


def _check(lm: PrefixModel, group: Group, request: Instance, plain: Plain) -> Scoring:
    """Compare the first tokens of the shortest and of the longest prompt with HFLM's.

    Of the longest alone where the model's base has passed.
    """
    started = time.monotonic()
    ordered = sorted(group.prompts, key=lambda prompt: len(group.prompts[prompt]))
    sample = list(dict.fromkeys(ordered[-1:] if lm.base_passed else [ordered[0], ordered[-1]]))
    most = min(CHECKED_TOKENS, group.stop.most)
    prompts = {prompt: group.prompts[prompt] for prompt in sample}
    short = Group(group.settings, replace(group.stop, most=most), prompts)
    try:
        found, _ = _generate(lm, short, shown=False)
    except MODEL_ERRORS as error:
        if is_out_of_memory(error):
            raise
        fault = str(error).splitlines()[0][:200] if str(error) else ""
        fault = f"the model cannot take a prefix tree: {type(error).__name__}: {fault}"
        return Scoring("plain", fault)
    keys = {prompt: (prompts[prompt], tuple(found[prompt].tokens)) for prompt in sample}
    likelihoods = lm.plain_answers(list(keys.values()))
    difference = max(
        abs(likelihoods[key][0] - found[prompt].log_likelihood) for prompt, key in keys.items()
    )
    theirs = plain([_shortened(request, prompt, most) for prompt in sample])
    pairs = zip(sample, theirs, strict=True)
    other = [prompt for prompt, text in pairs if text != _text(lm, found[prompt], group.stop)]
    dtype = lm.model.dtype
    ties = [prompt for prompt in other if found[prompt].gap <= TOLERANCE[dtype]]
    how = Scoring(
        "shared", compared=len(sample), ties=len(ties),
        differences={str(dtype).removeprefix("torch."): difference},
        check_seconds=time.monotonic() - started,
    )  # fmt: skip
    if not difference <= TOLERANCE[dtype]:
        reason = f"log-likelihoods of texts differ from HFLM's by {difference:.3g} in {dtype}"
        return replace(how, path="plain", reason=reason)
    if len(ties) < len(other):
        return replace(how, path="plain", reason="a text of the check differs from HFLM's")
    return how


def _shortened(request: Instance, prompt: str, most: int) -> Instance:
    """Return a request for a few tokens after a prompt."""
    settings = {key: value for key, value in request.args[1].items() if key not in LENGTHS}
    return Instance("generate_until", request.doc, (prompt, {**settings, "max_gen_toks": most}), 0)


def _generate(lm: PrefixModel, group: Group, *, shown: bool) -> tuple[dict[str, Generated], int]:
    """Return what was generated by prompt, and how many tokens were computed."""
    prompts_of: dict[Tokens, list[str]] = defaultdict(list)
    for prompt, tokens in group.prompts.items():
        prompts_of[tokens].append(prompt)
    generated: dict[str, Generated] = {}
    num_tokens = 0
    hidden = {} if shown else {"disable": True}  # False would outdo TQDM_DISABLE
    bar = tqdm(total=len(prompts_of), desc="generate", unit="question", **hidden)
    with lm.sharing(), bar:
        for batch, found in _batches(lm, sorted(prompts_of), group.stop, bar.update):
            num_tokens += count_tokens(batch) + sum(len(one.tokens) for one in found)
            for tokens, one in zip(batch, found, strict=True):
                generated |= dict.fromkeys(prompts_of[tokens], one)
    return generated, num_tokens


def _text(lm: PrefixModel, generated: Generated, stop: Stop) -> str:
    """Return the text of tokens up to a stop string."""
    text: str = postprocess_generated_text(lm.tok_decode(generated.tokens), list(stop.texts), None)
    return text


def _batches(
    lm: PrefixModel, prompts: Sequence[Tokens], stop: Stop, ended: Callable[[int], object]
) -> Iterator[tuple[Sequence[Tokens], list[Generated]]]:
    """Yield prompts that were generated together; halves of those that are too many."""
    keys = count_tokens(prompts) + len(prompts) * stop.most
    fits = len(prompts) <= MOST_PROMPTS and keys <= lm.most_keys() // MEMORY_SHARE
    if fits or len(prompts) == 1:
        try:
            found = generate(prompts, stop, lm, ended)
        except (RuntimeError, MemoryError) as error:
            if len(prompts) == 1 or not is_out_of_memory(error):
                raise
            log.warning("out of memory: generating fewer than %d texts at a time", len(prompts))
            if lm.device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            yield prompts, found
            return
    half = (len(prompts) + 1) // 2
    yield from _batches(lm, prompts[:half], stop, ended)
    yield from _batches(lm, prompts[half:], stop, ended)
