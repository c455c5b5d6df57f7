"""Turns of a row, its encoded tokens and its prompt: what templates and tokenizers exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

SURROGATE = "it holds a lone surrogate (half of a character), which is not text"


class Unusable(ValueError):
    """A row that cannot be learned from; it is dropped and counted under the message."""


class Turn(NamedTuple):
    """One turn of a conversation; plain text has at most a user's and the assistant's."""

    role: str
    content: str
    extra: Mapping[str, Any] | None = None  # other fields of a message; content: None if null
    is_learned: bool = True

    @property
    def message(self) -> dict[str, Any]:
        """The message as a chat template gets it."""
        return {"role": self.role, "content": self.content, **(self.extra or {})}


@dataclass(frozen=True)
class Encoded:
    """A row's tokens; `is_response` is as long, and true where the assistant speaks."""

    tokens: list[int]
    is_response: list[bool]
    notes: tuple[str, ...] = ()  # counted, such as fields that the tokens do not show
    unlearned: tuple[tuple[int, int], ...] = ()  # spans without labels, even where all is learned


@dataclass(frozen=True)
class Prompt:
    """A prompt, as text and as tokens."""

    text: str
    tokens: list[int]


def holds_surrogate(value: object) -> bool:
    """Return whether any text in a value has a lone surrogate, which no tokenizer takes."""
    match value:
        case str():
            return not value.isascii() and any("\ud800" <= one <= "\udfff" for one in value)
        case dict():
            return any(holds_surrogate(one) for pair in value.items() for one in pair)
        case list() | tuple():
            return any(map(holds_surrogate, value))
    return False
