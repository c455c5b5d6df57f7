"""JSON values, decoded one by one from text that is held only as far as a value needs it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

PART = 1 << 20  # characters that are read together, where one value does not need more
CUT = 16  # characters before the end of a part that may be half of a word or of an escape
SPACES = " \t\r\n"


class JsonStream:
    """A text of JSON values; lines come with their numbers, and blank ones may be left out."""

    def __init__(self, lines: Iterable[tuple[int, str]]) -> None:
        self._lines = iter(lines)
        self._decoder = json.JSONDecoder()
        self._text, self._place = "", 0
        self._first: int | None = None  # line that the text begins in
        self._column = 0  # characters of this line before the text
        self._next = 0  # number of the line after the text

    def peek(self) -> str:
        """Return the next character that is no space, without taking it; "" at the end."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in SPACES:
                    return self._text[self._place]
                self._place += 1
            if not self._read():
                return ""

    def value(self) -> Any:
        """Decode the next value.

        Raises:
            ValueError: it is none; the message has its line.
        """
        self.peek()
        while True:
            try:
                value, self._place = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                fault = self.not_json(error.msg, error.pos)
                if self._is_fault(error) or not self._read():
                    raise fault from None
            except RecursionError:
                raise ValueError(
                    f"line {self._where(self._place)[0]} cannot be read: it is nested too deeply"
                ) from None
            else:
                return value

    def values(self) -> Iterator[Any]:
        """Decode all values that are left."""
        while self.peek():
            yield self.value()

    def items(self) -> Iterator[Any]:
        """Decode the items of the list that begins here."""
        assert self.peek() == "[", "a list begins with its bracket"
        self._place += 1
        if self.peek() != "]":
            yield self.value()
        while (sign := self.peek()) == ",":
            self._place += 1
            yield self.value()
        if sign != "]":
            raise self.not_json("Expecting ',' delimiter")
        self._place += 1

    def not_json(self, reason: str, place: int | None = None) -> ValueError:
        """Return the error of a place in the text, by default the next one."""
        line, column = self._where(self._place if place is None else place)
        return ValueError(f"line {line}, column {column} is not JSON: {reason}")

    def _is_fault(self, error: json.JSONDecodeError) -> bool:
        """Return whether text that is still to come cannot mend it."""
        is_open = error.msg.startswith("Unterminated string")
        return not is_open and error.pos < len(self._text) - CUT

    def _read(self) -> bool:
        """Read on, as much again as is held; return whether there was anything."""
        self._first, self._column = self._where(self._place, zero_based=True)
        parts = [self._text[self._place :]]
        wanted = max(PART, len(parts[0]))
        added = 0
        for number, line in self._lines:
            if not self._next:
                self._first = self._next = number
            parts += ["\n" * (number - self._next), line]
            self._next = number + 1
            added += len(line)
            if added >= wanted:
                break
        self._text, self._place = "".join(parts), 0
        return added > 0

    def _where(self, place: int, *, zero_based: bool = False) -> tuple[int, int]:
        """Return line and column (from 1) of a place in the text."""
        before = self._text[:place]
        lines = before.count("\n")
        column = len(before) - before.rfind("\n") - 1 if lines else self._column + place
        return (self._first or 1) + lines, column + (not zero_based)
