"""Tokens of plain prompts and responses, tokenised jointly as TRL's SFTTrainer does.

Prompt and response are one text that ends in the end-of-sequence token (EOS). What this text and
the prompt alone have in common is masked; a token across the border belongs to the response. A BOS
or EOS that both the text and the tokenizer write is kept once, where TRL keeps two.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from finetune.text_sections import encode_texts
from finetune.turns import SURROGATE, Encoded, Unusable, holds_surrogate

NO_EOS = (
    "model.path: the tokenizer has no end-of-sequence token, so that no response would end; use a "
    "model whose tokenizer has one, or save it with one: tokenizer.eos_token = '...'; "
    "tokenizer.save_pretrained(FOLDER)"
)
DOUBLED = "a BOS or EOS that the tokenizer adds as well is kept once"
NEXT = "A"  # begins a response, to see which of a prompt's last tokens a response leaves


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
    ended = [prompt + _end(response, tokenizer) for prompt, response in pairs]
    tokens = _tokenise([*(prompt for prompt, _ in pairs), *ended], tokenizer)
    prompts, texts = tokens[: len(pairs)], tokens[len(pairs) :]
    return [
        _encoded(pair, asked if pair[0] else [], tokens, tokenizer)
        for pair, asked, tokens in zip(pairs, prompts, texts, strict=True)
    ]


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a prompt that stand before its response in training.

    They end in no EOS, begin with one BOS, and leave a last space to the word that follows it.
    """
    tokens, followed = _tokenise([text, text + NEXT], tokenizer)
    if text[-1:].isspace():
        tokens = tokens[: common_prefix_length(tokens, followed)]
    while tokens[-1:] == [tokenizer.eos_token_id] and not _is_ended(text, tokenizer):
        tokens.pop()
    return tokens[_num_doubled(tokens, tokenizer.bos_token_id) :]


def find_plain_problems(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return why responses of the tokenizer could not be ended."""
    return [NO_EOS] if tokenizer.eos_token_id is None else []


def _is_ended(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return text.endswith(str(tokenizer.eos_token))


def _end(response: str, tokenizer: PreTrainedTokenizerBase) -> str:
    return response if _is_ended(response, tokenizer) else f"{response}{tokenizer.eos_token}"


def _tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    try:
        return encode_texts(texts, tokenizer)
    except (TypeError, UnicodeEncodeError):
        if not holds_surrogate(texts):
            raise
        raise Unusable(SURROGATE) from None


def _encoded(
    pair: tuple[str, str],
    prompt: Sequence[int],
    tokens: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> Encoded:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    masked = common_prefix_length(list(prompt), tokens)
    if eos not in tokens[masked:]:  # its text is not read as the token: split_special_tokens
        (tokens,) = _tokenise(["".join(pair)], tokenizer)
        tokens = [*tokens, eos]
        masked = common_prefix_length(list(prompt), tokens)
    first = _num_doubled(tokens, bos)
    last = len(tokens) - _num_doubled(tokens[:first:-1], eos)
    is_response = [place >= masked for place in range(first, last)]
    by_row = first > 0 or (last < len(tokens) and _is_ended(pair[1], tokenizer))
    return Encoded(tokens[first:last], is_response, (DOUBLED,) * by_row)


def _num_doubled(tokens: Sequence[int], special: int | None) -> int:
    """Return how many of the first tokens are a special one that follows once more."""
    count = 0
    while special is not None and list(tokens[count : count + 2]) == [special, special]:
        count += 1
    return count
