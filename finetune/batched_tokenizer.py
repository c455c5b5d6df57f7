"""Tokenise many rows at a time by a function that encodes one, to the same tokens.

A fast tokenizer is several times faster on a list of texts, and takes all cores. The function is
called for each row with a stand-in for the tokenizer that notes the text it is asked for and breaks
off. These texts are tokenised together, and the function is called again, with the answers so far,
until it comes to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from transformers import BatchEncoding, PreTrainedTokenizerBase

MOST_CHARACTERS = 1_000_000  # that are tokenised together
# Settings under which a list of texts has the tokens of each of them alone.
PLAIN_SETTINGS = {
    "add_special_tokens", "split_special_tokens", "verbose", "return_offsets_mapping",
}  # fmt: skip
NOT_ASKED = {"return_attention_mask": False, "return_token_type_ids": False}
CHAT_SETTINGS = {"return_dict", "add_generation_prompt", "tools", "chat_template"}

Row = TypeVar("Row")
Result = TypeVar("Result")
Answer = BatchEncoding | Exception


class _Wanted(BaseException):
    """Breaks off an encoding whose text is not tokenised yet; nothing on its way may catch it."""


def encode_together(
    rows: Sequence[Row],
    encode: Callable[[Row, PreTrainedTokenizerBase], Result],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Result]:
    """Return `encode(row, tokenizer)` of each row; what it raises is raised here."""
    if not tokenizer.is_fast:
        return [encode(row, tokenizer) for row in rows]
    results: dict[int, Result] = {}
    waiting = {place: StandIn(tokenizer) for place in range(len(rows))}
    while waiting:
        for place, stand_in in list(waiting.items()):
            stand_in.start_over()
            try:
                results[place] = encode(rows[place], cast(PreTrainedTokenizerBase, stand_in))
            except _Wanted:
                continue
            del waiting[place]
        _answer(list(waiting.values()), tokenizer)
    return [results[place] for place in range(len(rows))]


class StandIn:
    """A tokenizer for the encoding of one row: gives the answers it has, and notes what it lacks.

    An encoding asks the same in the same order each time that it is called. An answer has ids, and
    offsets where they are asked for; no attention mask.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._place = 0
        self.answers: list[Answer] = []
        self.texts: list[str] = []  # that are wanted
        self.is_single = True
        self.settings: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def start_over(self) -> None:
        self._place = 0

    def __call__(self, text: Any = None, *others: Any, **settings: Any) -> BatchEncoding:
        is_plain = not others and PLAIN_SETTINGS.issuperset(settings)
        if is_plain and (isinstance(text, str) or _is_list_of_texts(text)):
            return self._answered(text, settings)
        found: BatchEncoding = self._tokenizer(text, *others, **settings)
        return found

    def apply_chat_template(self, conversation: Any, **settings: Any) -> Any:
        """Render a conversation, and tokenise it as the tokenizer itself would."""
        asked = {name: value for name, value in settings.items() if value}  # others are off
        if not (CHAT_SETTINGS.issuperset(asked) and "return_dict" in asked):
            return self._tokenizer.apply_chat_template(conversation, **settings)
        if self._place < len(self.answers):
            return self._next_answer()
        text: Any = self._tokenizer.apply_chat_template(conversation, **asked, tokenize=False)
        return self._answered(text, {"add_special_tokens": False})

    def _answered(self, text: str | list[str], settings: dict[str, Any]) -> BatchEncoding:
        if self._place < len(self.answers):
            return self._next_answer()
        self.is_single = isinstance(text, str)
        self.texts = [text] if isinstance(text, str) else text
        self.settings = settings
        raise _Wanted

    def _next_answer(self) -> BatchEncoding:
        answer = self.answers[self._place]
        self._place += 1
        if isinstance(answer, Exception):
            raise answer
        # As a new one, since an encoding may change the lists that it gets.
        copied = {name: _copy(values) for name, values in answer.items()}
        return BatchEncoding(copied, encoding=answer.encodings)


def _copy(values: list[Any]) -> list[Any]:
    is_nested = bool(values) and isinstance(values[0], list)
    return [list(one) for one in values] if is_nested else list(values)


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _answer(asking: Sequence[StandIn], tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenise what the stand-ins want, together where the settings are the same."""
    groups: dict[tuple[tuple[str, Any], ...], list[StandIn]] = {}
    for one in asking:
        groups.setdefault(tuple(sorted(one.settings.items())), []).append(one)
    for settings, group in groups.items():
        for part in _parts(group):
            try:
                _answer_part(part, tokenizer, dict(settings))
            except Exception:  # one text cannot be tokenised: its row's fault alone
                for one in part:
                    _answer_alone(one, tokenizer)


def _parts(group: Sequence[StandIn]) -> Iterator[list[StandIn]]:
    """Yield stand-ins whose texts together are not too long."""
    part: list[StandIn] = []
    size = 0
    for one in group:
        length = sum(map(len, one.texts))
        if part and size + length > MOST_CHARACTERS:
            yield part
            part, size = [], 0
        part.append(one)
        size += length
    if part:
        yield part


def _answer_part(
    part: Sequence[StandIn], tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> None:
    found = tokenizer([text for one in part for text in one.texts], **settings, **NOT_ASKED)
    encodings, start = found.encodings, 0
    assert encodings is not None, "a fast tokenizer gives them"
    for one in part:
        end = start + len(one.texts)
        place = start if one.is_single else slice(start, end)
        own = {name: values[place] for name, values in found.items()}
        one.answers.append(BatchEncoding(own, encoding=encodings[start:end]))
        start = end


def _answer_alone(one: StandIn, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        text = one.texts[0] if one.is_single else one.texts
        one.answers.append(tokenizer(text, **one.settings, **NOT_ASKED))
    except Exception as error:  # as the encoding would have seen it
        one.answers.append(error)
