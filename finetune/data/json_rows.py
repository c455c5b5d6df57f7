"""Rows of JSON files by their content: JSON Lines, a list, pretty-printed or wrapped rows, columns.

JSON Lines are read line by line, a list of rows item by item. Another text is held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from finetune.data.json_stream import JsonStream

Row = Mapping[str, Any]

# Keys that hold a file's rows, in files of one object.
WRAPPERS = (
    "data", "rows", "examples", "instances", "items", "records", "samples", "dataset",
)  # fmt: skip
SPLITS = ("train", "validation", "valid", "dev", "eval", "test")  # likewise, several in one file
CONVERSATIONS = ("messages", "conversations", "conversation")  # lists that one row holds
LIST_COLUMN = "messages"  # of a row that is a list
TEXT_COLUMN = "text"  # of a row that is a string


def read_json_rows(lines: Iterable[str], split: str) -> Iterator[Row]:
    """Yield the rows of a JSON file, whatever its layout.

    Args:
        lines: of the file, with their ends; a long one may come in pieces.
        split: the key that is read where a file holds several splits.

    Raises:
        ValueError: it is not JSON, or not rows; the message says the line or the row.
    """
    pieces = _number(lines)
    first = next(pieces, None)
    if first is None:
        return
    if first[1].lstrip().startswith("[") and not first[1].endswith("\n"):
        yield from _read_documents(chain([first], pieces), split)  # a list in one line
        return
    numbered = _join(chain([first], pieces))
    head = next(numbered)
    second = next(numbered, None)
    if second is None or not _is_value(head[1]):
        rest = [] if second is None else [second]
        try:
            yield from _read_documents(chain([head], rest, numbered), split)
        except ValueError:
            if second is not None and _is_value(second[1].strip()):
                _parse(head[1].strip(), head[0])  # JSON Lines whose first line is at fault
            raise
        return
    for number, line in chain([head, second], numbered):
        yield as_row(_parse(line.strip(), number), f"line {number}")


def holds_splits(lines: Iterable[str], split: str) -> bool:
    """Return whether a JSON file is one object with rows below the names of splits."""
    text = JsonStream(_number(lines))
    if text.peek() != "{":
        return False
    first = text.value()
    if text.peek():  # JSON Lines
        return False
    return _holds_rows(first.get(split)) or any(_holds_objects(first.get(n)) for n in SPLITS)


def _number(pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield pieces of lines that are not blank, with the number of their line."""
    number, begins = 1, True
    for piece in pieces:
        ends = piece.endswith("\n")
        if piece.strip() or not begins:
            yield number, piece
        number, begins = number + ends, ends


def _join(pieces: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yield lines of their pieces."""
    begun: list[str] = []
    for number, piece in pieces:
        if begun or not piece.endswith("\n"):
            begun.append(piece)
        if not begun:
            yield number, piece
        elif piece.endswith("\n"):
            yield number, "".join(begun)
            begun = []
    if begun:
        yield number, "".join(begun)


def _is_value(line: str) -> bool:
    """Return whether a line is an object or a list in itself, as those of JSON Lines are."""
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _read_documents(numbered: Iterable[tuple[int, str]], split: str) -> Iterator[Row]:
    """Yield the rows of a text that is one JSON value, or several one after the other."""
    text = JsonStream(numbered)
    if text.peek() == "[":
        items = text.items()
        head = list(islice(items, 1))
        if head and _is_row(head[0]):
            yield from _as_rows(chain(head, items))
            if text.peek():
                raise text.not_json("more follows the list of rows")
            return
        first = [*head, *items]
    else:
        first = text.value()
    several = bool(text.peek())
    yield from _as_rows(chain([first], text.values()) if several else _rows_of(first, split))


def _as_rows(values: Iterable[Any]) -> Iterator[Row]:
    for number, value in enumerate(values, start=1):
        yield as_row(value, f"row {number}")


def _is_row(item: Any) -> bool:
    """Return whether the first item of a list is surely a row, and no part of a conversation."""
    return isinstance(item, dict) and not ("role" in item or "from" in item)


def _parse(text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(error, line) from None


def _not_json(error: Exception, line: int) -> ValueError:
    if isinstance(error, json.JSONDecodeError):
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        return ValueError(f"{where} is not JSON: {error.msg}")
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return ValueError(f"line {line} cannot be read: {reason}")


def as_row(value: Any, where: str) -> Row:
    """Return a value as a row of named columns; a list is a conversation, a string is a text."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(isinstance(v, dict | list | str) for v in value):
        return {LIST_COLUMN: value}
    if isinstance(value, str):
        return {TEXT_COLUMN: value}
    raise ValueError(f"{where} is not a row of named fields")


def _rows_of(document: Any, split: str) -> Iterable[Any]:
    """Return the rows of the one value that a file holds."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict) or any(name in document for name in CONVERSATIONS):
        return [document]
    names = document.get("columns")
    if isinstance(names, list) and _holds_lists(document.get("data")):  # pandas, orient="split"
        return (dict(zip(names, row, strict=False)) for row in document["data"])
    for name in (split, *WRAPPERS):
        if _holds_rows(document.get(name)):
            return list(document[name])
    splits = [name for name in SPLITS if _holds_objects(document.get(name))]
    if splits:
        raise ValueError(
            f"data.split is {split}, but the file holds {', '.join(splits)}; set data.split to one "
            "of them"
        )
    lists = [value for value in document.values() if _holds_objects(value)]
    if lists and _are_turns(lists):
        return [document]
    if len(lists) == 1 and not any(isinstance(value, str) for value in document.values()):
        return list(lists[0])
    return _rows_of_columns(document)


def _holds_lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, list) for item in value)


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict | list) for item in value)


def _holds_objects(value: Any) -> bool:
    return bool(value) and isinstance(value, list) and all(isinstance(v, dict) for v in value)


def _are_turns(lists: Iterable[list[Any]]) -> bool:
    """Return whether lists are of one row's messages, such as of its prompt and completion."""
    return all("role" in item or "from" in item for items in lists for item in items)


def _rows_of_columns(document: dict[str, Any]) -> Iterable[Any]:
    """Return the rows of columns: lists of one length, or pandas' objects of index to value."""
    values = list(document.values())
    if values and all(isinstance(value, list) for value in values):
        if len({len(value) for value in values}) == 1:
            return (dict(zip(document, row, strict=True)) for row in zip(*values, strict=True))
        return [document]
    if not values or not all(isinstance(value, dict) for value in values):
        return [document]
    if all(key.isdigit() for key in document):  # pandas, orient="index"
        return values
    keys = values[0].keys()
    if keys and all(key.isdigit() for key in keys) and all(v.keys() == keys for v in values):
        return ({name: column[key] for name, column in document.items()} for key in keys)
    return [document]
