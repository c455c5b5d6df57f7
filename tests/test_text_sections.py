"""Texts encoded by sections, on all cores, have the tokens that the tokenizer's call gives them."""

from __future__ import annotations

import os
import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from finetune.data import text_sections
from finetune.data.text_sections import encode_texts, has_sections, split
from tests.tokenizer_kinds import KINDS

# What a split could take for the beginning or the end of something.
SIGNS = [
    "\n", "\n", "\n\n", "\r\n", " ", "  ", "\t", "\x0b", "\u2028", "a", "Word", "word's", "É", "ʼ",
    "12", "3", ".", "/", "'s", "_", "#", "日本", "\u0301", "🙂", "</s>", "<|im_end|>", "\x1c",
]  # fmt: skip
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def texts() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(SIGNS, k=draw.randrange(14))) for _ in range(3000)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_tokenizers_call(kind: str) -> None:
    """Whatever stands around a newline."""
    tokenizer = KINDS[kind]()
    assert encode_texts(texts(), tokenizer) == tokenizer(texts())["input_ids"]


@pytest.mark.parametrize(
    ("parts", "normalizer"),
    [
        ([pre_tokenizers.Split(Regex(GPT4O), "isolated")], None),
        ([pre_tokenizers.Digits(individual_digits=True)], normalizers.NFC()),
    ],
)
def test_other_splits_of_models_have_sections_too(
    parts: list[pre_tokenizers.PreTokenizer], normalizer: normalizers.Normalizer | None
) -> None:
    """gpt-4o's, and SmolLM2's with Qwen's normalizer."""
    tokenizer = KINDS["byte-level"]()
    backend = tokenizer.backend_tokenizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=len(parts) == 0)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, level])
    if normalizer is not None:
        backend.normalizer = normalizer
    assert has_sections(backend)
    assert encode_texts(texts(), tokenizer) == tokenizer(texts())["input_ids"]


def test_rows_of_one_template_share_the_sections_of_its_prompt() -> None:
    """And a prompt has those of the text that it begins; joined, sections are the text."""
    prompts = [f"Do it.\nQuestion {n}:\nwhat?\n\n### Response:\n" for n in range(50)]
    given = prompts + [f"{prompt}Answer {n}" for n, prompt in enumerate(prompts)]
    sections = {section for text in given for section in split(text)}
    assert len(sections) == 1 + 50 + 1 + 50
    assert all("".join(split(text)) == text for text in [*given, *texts()])


@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_tokenizers_have_sections(kind: str) -> None:
    """Unless one of their tokens takes the space before it; SentencePiece's have none."""
    assert has_sections(KINDS[kind]().backend_tokenizer) == kind.startswith(
        ("byte-level", "no BOS")
    )


def altered(change: str) -> PreTrainedTokenizerBase:
    tokenizer = KINDS["byte-level"]()
    backend: Tokenizer = tokenizer.backend_tokenizer
    match change:
        case "a token that holds a newline":
            backend.add_tokens([AddedToken("\nWord", normalized=False)])
        case "a token that takes the space before it":
            backend.add_tokens([AddedToken("Word", lstrip=True, normalized=False)])
        case "a space before each text":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        case "another pattern":
            split_by = pre_tokenizers.Split(Regex(r"\n\w+|\s+(?!\S)"), "isolated")
            level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([split_by, level])
        case "another normalizer":
            backend.normalizer = normalizers.Replace("\nW", "W")
        case "no split":
            backend.pre_tokenizer = None
        case "another model":
            vocabulary = [(piece, -float(n)) for piece, n in backend.get_vocab().items()]
            backend.model = models.Unigram(vocabulary, unk_id=0)
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        "a token that holds a newline", "a token that takes the space before it",
        "a space before each text", "another pattern", "another normalizer", "no split",
        "another model",
    ],
)  # fmt: skip
def test_a_tokenizer_that_reads_across_lines_gets_whole_texts(change: str) -> None:
    """Its tokens would be others by sections."""
    tokenizer = altered(change)
    assert not has_sections(tokenizer.backend_tokenizer)
    assert encode_texts(texts(), tokenizer) == tokenizer(texts())["input_ids"]


def test_a_tokenizers_settings_are_those_of_its_calls() -> None:
    """Truncation and padding that an earlier call left in the backend cut no row."""
    tokenizer = KINDS["byte-level, BOS"]()
    expected = tokenizer(texts())["input_ids"]
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a b c", "d"], truncation=True, max_length=2, padding="max_length")
    assert encode_texts(texts(), tokenizer) == expected
    tokenizer.split_special_tokens = True
    assert encode_texts(texts(), tokenizer) == tokenizer(texts())["input_ids"] != expected


@pytest.mark.parametrize("given", [None, "false", "true"])
def test_all_cores_encode_and_the_setting_stays(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    """Parallelism is on while texts are encoded, and as it was after that."""
    monkeypatch.delenv(text_sections.PARALLELISM, raising=False)
    if given is not None:
        monkeypatch.setenv(text_sections.PARALLELISM, given)
    with text_sections._all_cores():
        assert os.environ[text_sections.PARALLELISM] == "true"
    assert os.environ.get(text_sections.PARALLELISM) == given
