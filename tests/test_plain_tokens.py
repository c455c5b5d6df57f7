"""Prompts and responses as tokens: TRL's, for every kind of tokenizer, with one BOS and EOS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.data.plain_tokens import DOUBLED, encode_pair, encode_pairs, encode_prompt
from finetune.data.turns import SURROGATE, Unusable, holds_surrogate
from tests.tokenizer_kinds import KINDS
from tests.trl_preparation import (
    FROZEN,
    Tokens,
    alpaca_pairs,
    as_rows,
    as_texts,
    prepare,
    token_digest,
    vocabulary_digest,
    written_once,
)

PAIRS = [
    ("### Response:\n", "Paris is a city."),
    ("### Response:\n", "\nParis, on a new line"),
    ("### Response:\n", "  indented"),
    ("### Response:\n", "Paris.\n"),
    ("### Response:\n", "trailing space "),
    ("Question: where?\nAnswer: ", "Paris"),
    ("Question: where?\nAnswer:", " Paris"),
    ("Question: where?\nAnswer:", "Paris"),
    ("x = 12", "34 apples"),
    ("Zwölf große ", "Häuser 日本語 🙂"),
    ("### Response:\n", "It ends itself.</s>"),
    ("### Response:\n", "It ends, and a line.</s>\n"),
    ("### Response:\n", "It ends a turn.<|im_end|>"),
    ("<s>[INST] where? [/INST]", "Paris"),
    ("It ends </s> inside. ", "Paris"),
]


def encoded(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    return [(one.tokens, one.is_response) for one in encode_pairs(pairs, tokenizer)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_masks_are_those_of_trl(kind: str) -> None:
    """Of prompts and of texts, at every border, except that a doubled BOS or EOS is kept once."""
    tokenizer = KINDS[kind]()
    once, doubled = written_once(prepare(as_rows(PAIRS), tokenizer), tokenizer)
    assert encoded(PAIRS, tokenizer) == once
    texts = [("", prompt + answer) for prompt, answer in PAIRS]
    once_texts, _ = written_once(prepare(as_texts(PAIRS), tokenizer), tokenizer)
    assert encoded(texts, tokenizer) == once_texts
    by_rows = [place for place, one in enumerate(encode_pairs(PAIRS, tokenizer)) if one.notes]
    assert set(by_rows) <= set(doubled)
    assert all("s>" in "".join(PAIRS[place]) for place in by_rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_alpaca_are_those_that_trl_had(kind: str, shared_data: Path) -> None:
    """Its preparation of all rows, frozen as digests for the tokenizers of this release."""
    frozen, tokenizer = json.loads(FROZEN.read_text())[kind], KINDS[kind]()
    if vocabulary_digest(tokenizer) != frozen["vocabulary"]:
        pytest.skip("this release of tokenizers trains another vocabulary")
    pairs = alpaca_pairs(shared_data / "alpaca_999.jsonl")
    assert token_digest(encoded(pairs, tokenizer)) == frozen["prompts"]
    texts = [("", prompt + answer) for prompt, answer in pairs]
    assert token_digest(encoded(texts, tokenizer)) == frozen["texts"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_begins_where_the_response_did(kind: str) -> None:
    """A prompt alone has the tokens that stand before its response in training."""
    tokenizer = KINDS[kind]()
    for prompt, answer in PAIRS[:1] + PAIRS[5:7] + PAIRS[13:14]:
        row = encode_pair(prompt, answer, tokenizer)
        masked = row.is_response.index(True)
        assert encode_prompt(prompt, tokenizer) == row.tokens[:masked], (prompt, answer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_holds_its_own_bos_and_eos_has_one_of_each(kind: str) -> None:
    """And is counted, where the tokenizer writes them as well."""
    tokenizer = KINDS[kind]()
    bos, eos = tokenizer.bos_token or "", str(tokenizer.eos_token)
    row = encode_pair("", f"{bos}Once upon a time{eos}", tokenizer)
    plain = tokenizer("Once upon a time")["input_ids"]
    writes_bos = bos != "" and plain[0] == tokenizer.bos_token_id
    writes_eos = plain[-1] == tokenizer.eos_token_id
    assert row.tokens.count(tokenizer.eos_token_id) == 1 + (bos == eos)
    assert bos == "" or row.tokens.count(tokenizer.bos_token_id) == 1 + (bos == eos)
    assert row.notes == (DOUBLED,) * (writes_bos or writes_eos)
    assert all(row.is_response)


def test_an_eos_that_is_read_as_text_is_appended() -> None:
    """Where special tokens in texts are split, the response still ends in one."""
    tokenizer = KINDS["byte-level, BOS"]()
    tokenizer.split_special_tokens = True
    row = encode_pair("Where?\n", "Paris", tokenizer)
    expected = tokenizer("Where?\nParis")["input_ids"]
    assert row.tokens == [*expected, tokenizer.eos_token_id]
    assert tokenizer.decode(row.tokens[row.is_response.index(True) :]) == "Paris</s>"


@pytest.mark.parametrize(
    ("value", "held"),
    [
        ("a\ud83d b", True), ({"messages": [{"content": "\udc00"}]}, True), ({"\ud800": 1}, True),
        ("🙂 é", False), ([1, None, 2.5, "x"], False),
    ],
)  # fmt: skip
def test_a_lone_surrogate_is_found_wherever_it_stands(value: object, held: bool) -> None:
    """In a text, a list, a message or a column's name."""
    assert holds_surrogate(value) == held


def test_half_a_character_is_the_rows_fault() -> None:
    """Not a failure of the tokenizer's."""
    with pytest.raises(Unusable) as fault:
        encode_pair("Where?\n", "Paris \ud83d", KINDS["byte-level"]())
    assert str(fault.value) == SURROGATE
