"""Small tokenizers of the kinds that models bring, trained in process on the demo's rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from importlib.resources import files

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

# The split of Llama-3 and Qwen, for which newlines and the signs before them are one piece.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{number:02X}>" for number in range(256)]


@cache
def _texts() -> tuple[str, ...]:
    lines = files("finetune").joinpath("demo/rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return tuple(f"### Response:\n{row['instruction']}\n\n{row['output']}" for row in rows)


def _byte_level(split: str | None = None) -> Tokenizer:
    """Return a BPE over bytes, split as GPT-2 does or by a pattern."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    parts = [pre_tokenizers.Split(Regex(split), "isolated"), level] if split else [level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _sentencepiece(scheme: str) -> Tokenizer:
    """Return a BPE with byte fallback over words that begin with their space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in _texts()], trainer)
    # As transformers converts them: whole texts, not words, so that pieces may cross a line.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return tokenizer


def _normalised() -> Tokenizer:
    """Return what older conversions of Llama's have: spaces rewritten by a normalizer."""
    tokenizer = _sentencepiece("never")
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def _unigram() -> Tokenizer:
    """Return pieces by their likelihood, as T5's and XGLM's, which write an EOS themselves."""
    trained = _sentencepiece("first").get_vocab()
    pieces = [piece for piece in sorted(trained, key=trained.__getitem__) if piece not in BYTES]
    scores = [(piece, -math.log(rank)) for rank, piece in enumerate(pieces, start=1)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def _writing(tokenizer: Tokenizer, form: str) -> Tokenizer:
    """Let the post-processor write special tokens around a text, which `form` calls $A."""
    special = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>") if name in form]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=form, pair=f"{form} $B", special_tokens=special
    )
    return tokenizer


def _wrapped(tokenizer: Tokenizer, **special: str | None) -> PreTrainedTokenizerFast:
    given = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)


def _with_end_of_turn() -> PreTrainedTokenizerFast:
    built = _wrapped(_byte_level(LLAMA3))
    end = AddedToken("<|im_end|>", special=True, lstrip=True, rstrip=True, normalized=False)
    built.add_tokens([AddedToken("<|im_start|>", special=True), end])
    built.eos_token = str(end)
    return built


def _without_eos() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level(LLAMA3), unk_token="<unk>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": lambda: _wrapped(_byte_level()),
    "byte-level, newlines joined": lambda: _wrapped(_byte_level(LLAMA3)),
    "byte-level, BOS": lambda: _wrapped(_writing(_byte_level(LLAMA3), "<s> $A")),
    "byte-level, BOS is EOS": lambda: _wrapped(
        _writing(_byte_level(), "</s> $A"), bos_token="</s>"
    ),
    "SentencePiece, prefix space": lambda: _wrapped(_writing(_sentencepiece("always"), "<s> $A")),
    "SentencePiece, first space": lambda: _wrapped(_writing(_sentencepiece("first"), "<s> $A")),
    "SentencePiece, no prefix space": lambda: _wrapped(_writing(_sentencepiece("never"), "<s> $A")),
    "SentencePiece, normalised": lambda: _wrapped(_writing(_normalised(), "<s> $A")),
    "post-processor EOS": lambda: _wrapped(_writing(_sentencepiece("always"), "<s> $A </s>")),
    "Unigram, EOS, no BOS": lambda: _wrapped(_writing(_unigram(), "$A </s>"), bos_token=None),
    "no BOS": lambda: _wrapped(_byte_level(LLAMA3), bos_token=None),
    "end-of-turn tokens": _with_end_of_turn,
}
WITHOUT_EOS: Callable[[], PreTrainedTokenizerFast] = _without_eos
