"""Tokens of many texts at a time: the sections that texts share are encoded once, on all cores.

A section ends at a newline across which the tokenizer's pre-tokenizer joins nothing, so that it has
the same tokens alone as within its text. The prompts of a template differ in few of their sections,
and a prompt has those of the text that it begins.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, TokenizersBackend
from trl.data_utils import common_prefix_length

Item = TypeVar("Item")

PARALLELISM = "TOKENIZERS_PARALLELISM"
# After a newline that follows no other space, before a letter, a digit or a sign other than a
# slash, which gpt-4o's and Mistral's patterns join to the newline.
BORDER = re.compile(r"\n(?<=[!-~\w]\n)(?=[!-.0-~\w])")
# What pre-tokenizers' patterns are made of. None of these joins a newline to what follows it at a
# border, nor looks behind.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)  # fmt: skip
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ALTERNATIVES = {
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _ENDINGS,
    r"\p{L}+", r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    *_CASED, *(cased + _ENDINGS + "?" for cased in _CASED),
    r"\p{N}", r"\p{N}+", r" ?\p{N}+", r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
}  # fmt: skip
TOGETHER_CHARACTERS = 2**22  # of texts that are held in memory with their tokens


def sized_parts(
    items: Iterable[Item], size: Callable[[Item], int], most: float = math.inf
) -> Iterator[list[Item]]:
    """Yield parts of the items, small enough for one to be held in memory with its tokens.

    Args:
        items: rows or conversations.
        size: returns the characters of an item.
        most: items of a part.
    """
    part: list[Item] = []
    characters = 0
    for item in items:
        part.append(item)
        characters += size(item)
        if len(part) >= most or characters >= TOGETHER_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Return the tokens of each text as a call of the tokenizer does; raises what that raises."""
    plain = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
    if not _has_plain_calls(tokenizer):
        called: list[list[int]] = tokenizer(
            list(texts), add_special_tokens=add_special_tokens, **plain
        )["input_ids"]
        return called
    tokenizer([""], **plain)  # which sets truncation, padding and special tokens for what follows
    backend: Tokenizer = tokenizer.backend_tokenizer
    special = find_special(backend) if has_sections(backend) else None
    with _all_cores():
        if special is None:
            batch = backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
            return [found.ids for found in batch]
        numbers: dict[str, int] = {}
        cut = [[numbers.setdefault(s, len(numbers)) for s in split(text)] for text in texts]
        # "fast" leaves out the tokens' places in the text.
        encoded = backend.encode_batch_fast(list(numbers), add_special_tokens=False)
    ids = [found.ids for found in encoded]
    before, after = special if add_special_tokens else ([], [])
    return [[*before, *chain.from_iterable([ids[n] for n in one]), *after] for one in cut]


def _has_plain_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a call of the tokenizer is one of its backend, and nothing besides."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, TokenizersBackend)
        and kind._encode_plus is TokenizersBackend._encode_plus
        and kind.__call__ is PreTrainedTokenizerBase.__call__
    )


def has_sections(backend: Tokenizer) -> bool:
    """Return whether a text's sections have the tokens that they have within it."""
    model, added = backend.model, backend.get_added_tokens_decoder().values()
    normalizer, splits = (_state(part) for part in (backend.normalizer, backend.pre_tokenizer))
    return (
        isinstance(model, BPE)
        and model.dropout is None
        and not any(token.lstrip or "\n" in token.content for token in added)
        and all(part["type"] == "NFC" for part in _parts(normalizer, "normalizers"))
        and splits.get("type") is not None
        and all(map(_ends_at_borders, _parts(splits, "pretokenizers")))
    )


def _state(part: Any) -> dict[str, Any]:
    """Return the settings of a normalizer or a pre-tokenizer."""
    settings: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return settings


def _parts(state: dict[str, Any], name: str) -> list[dict[str, Any]]:
    if state.get("type") != "Sequence":
        return [state] if state else []
    return [one for part in state[name] for one in _parts(part, name)]


def _ends_at_borders(part: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer splits texts at every border, if they are split at all."""
    match part:
        case {"type": "Digits"}:
            return True
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return True
        case {
            "type": "Split", "behavior": "Isolated", "invert": False,
            "pattern": {"Regex": str(pattern)},
        }:  # fmt: skip
            return set(_alternatives(pattern)) <= ALTERNATIVES
    return False


def _alternatives(pattern: str) -> Iterator[str]:
    """Yield what stands between the bars of a pattern, those in brackets left out."""
    depth, start = 0, 0
    for place, sign in enumerate(pattern):
        depth += (sign == "(") - (sign == ")")
        if sign == "|" and not depth:
            yield pattern[start:place]
            start = place + 1
    yield pattern[start:]


def find_special(backend: Tokenizer) -> tuple[list[int], list[int]] | None:
    """Return what the post-processor writes before and after each text; None if it is unclear."""
    probe = backend.encode("a")
    own = [place for place, added in enumerate(probe.special_tokens_mask) if not added]
    return (probe.ids[: own[0]], probe.ids[own[-1] + 1 :]) if own else None


def split(text: str) -> list[str]:
    """Return the sections of a text; joined they are the text."""
    sections, start = [], 0
    for found in BORDER.finditer(text):
        end = found.end()
        sections.append(text[start:end])
        start = end
    sections.append(text[start:])
    return sections


def count_common(first: list[int], second: list[int]) -> int:
    """Return how many tokens two texts have in common before they differ."""
    if second[: len(first)] == first:  # of nearly all prompts, and ten times as fast
        return len(first)
    return int(common_prefix_length(first, second))


@contextmanager
def _all_cores() -> Iterator[None]:
    """Encode on all cores; elsewhere tokenizers' threads are off, since processes fork."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before
