"""Tokens of plain prompts and responses, tokenised jointly as TRL's SFTTrainer does.

Prompt and response are one text that ends in the end-of-sequence token (EOS). What this text and
the prompt alone have in common is masked; a token across the border belongs to the response. A BOS
or EOS that both the text and the tokenizer write is kept once, where TRL keeps two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from finetune.data.text_sections import count_common, encode_texts
from finetune.data.turns import SURROGATE, Encoded, Unusable, holds_surrogate

NO_EOS = (
    "model.path: the tokenizer has no end-of-sequence token, so that no response would end; use a "
    "model whose tokenizer has one, or save it with one: tokenizer.eos_token = '...'; "
    "tokenizer.save_pretrained(FOLDER)"
)
DOUBLED = "a BOS or EOS that the tokenizer adds as well is kept once"
NEXT = "A"  # begins a response, to see which of a prompt's last tokens a response leaves


class _Ends(NamedTuple):
    """A tokenizer's special tokens, looked up once for many rows."""

    bos: int | None
    eos: int
    eos_text: str


def encode_pair(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode a prompt, which may be empty, and its response; raises what `encode_pairs` does."""
    return encode_pairs([(prompt, response)], tokenizer)[0]


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded]:
    """Encode pairs of prompt and response, which a fast tokenizer does on all cores.

    Raises:
        Unusable: one of them holds what cannot be tokenised.
    """
    ends = _Ends(tokenizer.bos_token_id, tokenizer.eos_token_id, str(tokenizer.eos_token))
    ended = [p + (r if r.endswith(ends.eos_text) else r + ends.eos_text) for p, r in pairs]
    tokens = _tokenise([*(prompt for prompt, _ in pairs), *ended], tokenizer)
    prompts, texts = tokens[: len(pairs)], tokens[len(pairs) :]
    return [
        _encoded(pair, asked if pair[0] else [], text, ends, tokenizer)
        for pair, asked, text in zip(pairs, prompts, texts, strict=True)
    ]


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a prompt that stand before its response in training.

    They end in no EOS, begin with one BOS, and leave a last space to the word that follows it.
    """
    tokens, followed = _tokenise([text, text + NEXT], tokenizer)
    if text[-1:].isspace():
        tokens = tokens[: count_common(tokens, followed)]
    is_ended = text.endswith(str(tokenizer.eos_token))
    while tokens[-1:] == [tokenizer.eos_token_id] and not is_ended:
        tokens.pop()
    return tokens[_num_doubled(tokens, tokenizer.bos_token_id) :]


def find_plain_problems(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a problem if the tokenizer has no end-of-sequence token."""
    return [NO_EOS] if tokenizer.eos_token_id is None else []


def _tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    try:
        return encode_texts(texts, tokenizer)
    except (TypeError, UnicodeEncodeError):
        if not holds_surrogate(texts):
            raise
        raise Unusable(SURROGATE) from None


def _encoded(
    pair: tuple[str, str],
    prompt: list[int],
    tokens: list[int],
    ends: _Ends,
    tokenizer: PreTrainedTokenizerBase,
) -> Encoded:
    masked = count_common(prompt, tokens)
    if ends.eos not in tokens[masked:]:  # its text is not read as the token: split_special_tokens
        (tokens,) = _tokenise(["".join(pair)], tokenizer)
        tokens = [*tokens, ends.eos]
        masked = count_common(prompt, tokens)
    first, last = _num_doubled(tokens, ends.bos), len(tokens)
    if tokens[-2:] == [ends.eos, ends.eos]:
        last -= _num_doubled(tokens[:first:-1], ends.eos)
    num_masked = min(max(masked, first), last) - first
    is_response = [False] * num_masked + [True] * (last - first - num_masked)
    by_row = first > 0 or (last < len(tokens) and pair[1].endswith(ends.eos_text))
    return Encoded(tokens[first:last], is_response, (DOUBLED,) * by_row)


def _num_doubled(tokens: list[int], special: int | None) -> int:
    """Return how many of the first tokens are a special one that follows once more."""
    count = 0
    while special is not None and tokens[count : count + 2] == [special, special]:
        count += 1
    return count
