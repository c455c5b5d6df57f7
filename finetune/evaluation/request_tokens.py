"""Tokens of requests: kept beside their text, or found for all texts of a task at once.

lm-eval encodes one text after the other, and a context again for each of its choices; a fast
tokenizer encodes thousands of texts by one call, each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lm_eval.models.huggingface import HFLM

from finetune.evaluation.prefix_tree import Tokens

Key = tuple[Tokens, Tokens]  # context, continuation


class TokenText(str):
    """A text of a request with its tokens, which are not to be found anew."""

    tokens: tuple[int, ...]

    def __new__(cls, text: str, tokens: Sequence[int]) -> TokenText:
        """Keep tokens beside their text, which is for people and must not be empty."""
        made = super().__new__(cls, text or " ")
        made.tokens = tuple(tokens)
        return made


def encode_together(lm: HFLM, requests: Iterable[tuple[str, str]]) -> dict[str, list[int]]:
    """Return the tokens of each text that lm-eval encodes for requests, as `tok_encode` does.

    Args:
        lm: whose tokenizer and settings are used.
        requests: contexts and continuations.
    """
    texts: dict[str, None] = {}
    for context, continuation in requests:
        if not isinstance(context, TokenText) and context:
            texts[context + continuation] = texts[context.rstrip()] = None
    texts.pop("", None)  # a context of spaces alone
    prefix = lm.tokenizer.decode(lm.prefix_token_id)
    plain = [text for text in texts if not text.startswith(prefix)]  # others get no BOS again
    if not plain:
        return {}
    special = {} if lm.add_bos_token is None else {"add_special_tokens": lm.add_bos_token}
    return dict(zip(plain, lm.tokenizer(plain, **special)["input_ids"], strict=True))


def by_context(keys: Sequence[Key]) -> list[list[Key]]:
    """Group requests into questions, those with the shortest longest choice first."""
    questions: dict[Tokens, list[Key]] = {}
    for key in keys:
        questions.setdefault(context_of(key), []).append(key)
    return sorted(questions.values(), key=lambda choices: max(map(length_of, choices)))


def context_of(key: Key) -> Tokens:
    return key[0]


def length_of(key: Key) -> int:
    return len(key[0]) + len(key[1])
