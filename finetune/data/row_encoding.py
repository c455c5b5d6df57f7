"""Encode rows by a template and a tokenizer: tokens and labels, or the reason to drop a row."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from finetune.config.schema import DataConfig, TrainingConfig
from finetune.data.chat_tokens import encode_chat, encode_chats, find_learned
from finetune.data.templates import Template, encode_plain, encode_plain_rows
from finetune.data.text_pieces import fit_length
from finetune.data.token_cache import RowTokens
from finetune.data.token_rows import IGNORED, Example
from finetune.data.turns import Encoded, Turn, Unusable


def tokenise_rows(
    rows: Sequence[Sequence[Turn]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template,
    data: DataConfig,
    training: TrainingConfig,
) -> list[RowTokens]:
    """Return each row's tokens, or why it is dropped; `token_cache` keeps them by all arguments."""
    return [
        _row_tokens(encoded, tokenizer, data, training)
        for encoded in _encode_rows(rows, template, tokenizer)
    ]


def encode_row(
    turns: Sequence[Turn],
    template: Template,
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Example:
    """Return a row's tokens and labels, before it is cut.

    Raises:
        Unusable: it cannot be learned from.
    """
    return _label(template.encode(turns, tokenizer), tokenizer, data, training)


def _encode_rows(
    rows: Sequence[Sequence[Turn]], template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[Encoded | Unusable]:
    if template.encode is encode_plain:
        return encode_plain_rows(rows, tokenizer)

    assert template.encode is encode_chat, "each way of encoding has one for many rows"
    return encode_chats(rows, tokenizer)


def _row_tokens(
    encoded: Encoded | Unusable,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    training: TrainingConfig,
) -> RowTokens:
    try:
        if isinstance(encoded, Unusable):
            raise encoded
        example = _label(encoded, tokenizer, data, training)
    except Unusable as fault:
        return RowTokens([], fault=str(fault))
    pieces = fit_length(example, data, training)
    return RowTokens(pieces, len(example["input_ids"]), encoded.notes)


def _mask(tokens: list[int], is_learned: list[bool]) -> list[int]:
    first = is_learned.index(True) if True in is_learned else len(tokens)
    if False not in is_learned[first:]:  # nearly all rows, and ten times as fast
        return [IGNORED] * first + tokens[first:]
    return [
        token if learned else IGNORED for token, learned in zip(tokens, is_learned, strict=True)
    ]


def _label(
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    training: TrainingConfig,
) -> Example:
    if True not in encoded.is_response[: training.max_length]:
        raise Unusable(f"prompt alone fills training.max_length={training.max_length}")
    is_learned = find_learned(
        encoded, tokenizer, prompt=not data.mask_prompt, empty_think=not data.mask_empty_think
    )
    labels = _mask(encoded.tokens, is_learned)
    labels[0] = IGNORED  # it has no predecessor to be predicted from
    within = labels[: training.max_length]
    if within[-1] == IGNORED and within.count(IGNORED) == len(within):
        raise Unusable("it has no token to learn")
    return Example(input_ids=encoded.tokens, labels=labels)
