"""Shapes of rows (Alpaca, Dolly, ShareGPT ...): recognised, and mapped onto a template's fields.

`data.format` is the shape of a row, `data.prompt_template` how it is asked. Rows that have the
template's own columns are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain
from typing import Any

from finetune.config.schema import AUTO_FORMAT
from finetune.data.json_rows import CONVERSATIONS, Row
from finetune.data.row_messages import (
    build_messages,
    build_pairs,
    fields_of_messages,
    find_messages_kind,
    messages_of_fields,
    parse_json_text,
)
from finetune.data.templates import Template
from finetune.data.turns import Unusable

ROWS_LOOKED_AT = 200  # the first ones, which say the shape
# A question's and an answer's columns, the first that a row has; each shape with its title.
PAIRS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "alpaca": ("Alpaca", (("instruction", "output"),)),
    "dolly": ("Dolly", (("instruction", "response"),)),
    "prompt_completion": (
        "prompt and completion",
        (
            ("prompt", "completion"), ("prompt", "response"), ("instruction", "completion"),
            ("input", "output"), ("inputs", "targets"),
        ),
    ),
    "question_answer": (
        "question and answer",
        (
            ("question", "answer"), ("question", "response"), ("query", "answer"),
            ("query", "response"),
        ),
    ),
}  # fmt: skip
INPUTS, SYSTEMS = ("input", "context"), ("system", "system_prompt")
# How the titles of conversations begin, by the format that asks for them.
CONVERSATION_TITLES = {
    "sharegpt": ("ShareGPT",),
    "openai": ("OpenAI",),
    "lists": ("list of", "question and answer pairs"),
}
TEXT, MESSAGES = ("text",), ("messages",)  # what the templates `text` and `chat` require
ALPACA_FIELDS = ("instruction", "input", "output", "system", "history")
CHAT_ONLY = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Reading:
    """The mapping of a source's rows onto a template's fields.

    `shape` names it where the rows do not have the template's own columns.
    """

    fields: Callable[[Row], dict[str, Any]]  # raises Unusable
    shape: str = ""
    provided: frozenset[str] = frozenset()  # fields that the shape gives without such a column
    used: frozenset[str] = frozenset()  # columns that fields take
    expected: tuple[str, ...] = ()  # columns that data.columns names for optional fields
    names: tuple[str, ...] = ()  # of the columns of the rows read so far

    @property
    def unused(self) -> tuple[str, ...]:
        """Columns of the rows that no field takes."""
        return tuple(name or "(without a name)" for name in self.names if name not in self.used)

    @property
    def absent(self) -> tuple[str, ...]:
        """Columns of optional fields that no row has."""
        return tuple(name for name in self.expected if name not in self.names and self.names)

    def with_names(self, row: Row) -> Reading:
        """Return the reading of rows that have the columns of another row too."""
        names = dict.fromkeys((*self.names, *map(str, row)))
        return replace(self, names=tuple(names))


@dataclass(frozen=True)
class Wanted:
    """The template that rows are read for, the names of their columns, and their shape."""

    template: Template
    columns: Mapping[str, str]  # field -> the data's column, where their names differ
    shape: str | None = None  # of data.format; None recognises it

    def rename(self, row: Row) -> Row:
        """Return a row that has its values under the fields' names too."""
        if not self.columns:
            return row
        return {**row, **{field: row[c] for field, c in self.columns.items() if c in row}}


@dataclass(frozen=True)
class _Maker:
    """A function that makes fields of a renamed row, and the columns that it uses."""

    title: str
    used: tuple[str, ...]
    make: Callable[[Row], dict[str, Any]]
    provided: frozenset[str] = frozenset()
    needed: frozenset[str] = frozenset()  # columns without which a row is of another shape
    kind: str = ""  # of the shape, also where it has no title


def find_unknown_fields(template: Template, columns: Mapping[str, str]) -> list[str]:
    """Return the keys of `data.columns` that neither the template nor any shape has a field for."""
    pairs = (name for _, pairs in PAIRS.values() for pair in pairs for name in pair)
    known = {*template.required, *template.optional, *ALPACA_FIELDS, *pairs, *INPUTS, *SYSTEMS}
    return [name for name in columns if name not in {*known, *CONVERSATIONS, *TEXT, *CHAT_ONLY}]


def find_reading(
    head: Sequence[Row], template: Template, columns: Mapping[str, str], given: str | None = None
) -> Reading:
    """Recognise the shape of rows by the first of them, or take the one of `data.format`.

    Args:
        head: the first rows.
        template: whose fields are wanted.
        columns: field -> the data's column.
        given: `data.format`.

    Raises:
        ValueError: the rows are not of the given shape.
    """
    renamed = {field: column for field, column in columns.items() if field != column}
    shape = None if given in (None, AUTO_FORMAT) else given
    wanted = Wanted(template, renamed, shape)
    names = _column_names(head)
    maker = _find_maker([wanted.rename(row) for row in head], wanted)
    if maker is None and shape is not None:
        raise ValueError(
            f"data.format is {shape}, but the rows have the columns {', '.join(names)}; set "
            f"++data.columns.FIELD=COLUMN, or data.format={AUTO_FORMAT}"
        )
    maker = maker or _own_columns(wanted)
    used = {*maker.used, *(renamed[name] for name in maker.used if name in renamed)}
    optional = [] if maker.title else [name for name in template.optional if name in columns]

    def fields(row: Row) -> dict[str, Any]:
        named = wanted.rename(row)
        if not maker.needed <= named.keys():
            _refuse_other_shape(named, maker, wanted)
        return maker.make(named)

    return Reading(
        fields,
        maker.title,
        maker.provided,
        frozenset(used),
        tuple(columns[name] for name in optional),
        tuple(names),
    )


def _refuse_other_shape(row: Row, maker: _Maker, wanted: Wanted) -> None:
    """Raise Unusable where a row has the columns of another shape, or none that is read."""
    other = _find_maker([row], replace(wanted, shape=None))
    if other is not None and other.kind != maker.kind:
        raise Unusable(f"it is of another shape than the rows used: {other.kind}")
    if maker.needed.isdisjoint(row):
        raise Unusable(f"it has no column {', '.join(sorted(maker.needed))}")


def _column_names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(str(name) for row in rows for name in row))


def _find_maker(rows: Sequence[Row], wanted: Wanted) -> _Maker | None:
    known, template, shape = set(_column_names(rows)), wanted.template, wanted.shape
    if TEXT in (template.required, (shape,)):
        is_text = template.required == TEXT and shape in (None, "text")
        return _own_columns(wanted) if is_text and "text" in known else None
    has_own = set(template.required) <= known and template.required != MESSAGES
    pair = _find_pair(known, shape)
    if has_own and shape is None:
        return _pair_maker(*pair, known, wanted) if _is_alpaca(template) and pair else None
    column = next((name for name in CONVERSATIONS if name in known), None)
    kinds = (find_messages_kind(row.get(column)) for row in rows) if column else iter(())
    kind = next((kind for kind in kinds if kind), None)
    titles = CONVERSATION_TITLES.get(shape or "", ())
    if column and kind and (shape is None or kind.startswith(titles or "-")):
        return _conversation_maker(column, kind, known, wanted)
    return _pair_maker(*pair, known, wanted) if pair else None


def _is_alpaca(template: Template) -> bool:
    return template.required == ("instruction", "output")


def _find_pair(known: set[str], shape: str | None) -> tuple[str, str, str] | None:
    """Return the title of single questions with answers, and the columns of both."""
    for name, (title, pairs) in PAIRS.items():
        for asked, answer in pairs:
            if shape in (None, name) and {asked, answer} <= known:
                return title, asked, answer
    return None


def _own_columns(wanted: Wanted) -> _Maker:
    """Take the template's fields from the columns of their names."""
    template = wanted.template
    names = (*template.required, *template.optional)
    return _Maker(
        "",
        names,
        lambda row: {name: _value(name, row.get(name)) for name in names},
        # A field of a user's template may be empty, and its column not be there.
        needed=frozenset(() if template.file_text else template.required),
        kind="text" if template.required == TEXT else "",
    )


def _value(name: str, value: Any) -> Any:
    """Return a field's value; a number that is to be learned is text, as in a csv file."""
    if name == "output":
        return _as_text(value)
    return parse_json_text(value) if name == "tools" else value


def _as_text(value: Any) -> Any:
    """Return a number as text; what is not one, or no finite one, as it is."""
    if value is None or isinstance(value, str):
        return value
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    return str(value) if is_number and not math.isnan(value) else value


def _pair_maker(title: str, asked: str, answer: str, known: set[str], wanted: Wanted) -> _Maker:
    """Make fields of a question with its answer, and of what is given beside them."""
    kind = title
    taken: dict[str, tuple[str, ...]] = {"instruction": (asked,), "output": (answer,)}
    for field, names in {"input": INPUTS, "system": SYSTEMS, "history": ("history",)}.items():
        free = tuple(name for name in names if name not in (asked, answer))
        # Later rows may have what the first ones lack.
        taken[field] = tuple(name for name in free if name in known)[:1] or free
    if title == "Alpaca" and _is_alpaca(wanted.template):
        has_context = taken["input"] == ("context",) and "context" in known
        title = "Alpaca, context as input" if has_context else ""

    def make(row: Row) -> dict[str, Any]:
        fields = {field: _first(row, names) for field, names in taken.items()}
        if _is_turns(fields["instruction"]) or _is_turns(fields["output"]):
            messages = _join(fields["instruction"], fields["output"], asked, answer)
            return _filled(row, wanted, lambda: fields_of_messages(messages), lambda: messages)
        for name in ("input", "output"):
            fields[name] = _as_text(fields[name])
        history = fields["history"]
        fields["history"] = [] if history is None else build_pairs(history)
        return _filled(row, wanted, lambda: fields, lambda: messages_of_fields(fields))

    used = _used(wanted, chain.from_iterable(taken.values()))
    return _Maker(title, used, make, _provided(wanted), frozenset({asked, answer}), kind)


def _first(row: Row, names: Iterable[str]) -> Any:
    for name in names:
        if name in row:
            return row[name]
    return None


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value)


def _join(prompt: Any, completion: Any, asked: str, answer: str) -> list[Any]:
    """Return prompt and completion, each text or messages, as one conversation."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return [*build_messages(prompt, asked), *build_messages(completion, answer)]


def _conversation_maker(column: str, title: str, known: set[str], wanted: Wanted) -> _Maker:
    system = tuple(name for name in SYSTEMS if name in known)[:1] or SYSTEMS

    def make(row: Row) -> dict[str, Any]:
        messages = build_messages(row.get(column), column, _first(row, system))
        return _filled(row, wanted, lambda: fields_of_messages(messages), lambda: messages)

    kind = title
    if (column, title) == ("messages", "OpenAI messages") and wanted.template.required == MESSAGES:
        title = ""
    used = _used(wanted, (column, *system))
    return _Maker(title, used, make, _provided(wanted), frozenset({column}), kind)


def _used(wanted: Wanted, columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that are taken: the shape's, and the template's own."""
    template = wanted.template
    if template.required in (MESSAGES, ("instruction", "output")):
        return (*columns, *template.optional)
    return (*columns, *template.required, *template.optional)


def _provided(wanted: Wanted) -> frozenset[str]:
    return frozenset(MESSAGES if wanted.template.required == MESSAGES else ALPACA_FIELDS)


def _filled(
    row: Row,
    wanted: Wanted,
    fields: Callable[[], Mapping[str, Any]],
    messages: Callable[[], list[Any]],
) -> dict[str, Any]:
    """Return the template's fields: of the shape, and beside them of columns of their names."""
    template = wanted.template
    names = (*template.required, *template.optional)
    if template.required == MESSAGES:
        made: Mapping[str, Any] = {"messages": messages()}
    elif _is_alpaca(template):
        made = fields()
    else:  # a file's, whose own names come first
        made = {name: value for name, value in fields().items() if name not in row}
    return {name: made[name] if name in made else _value(name, row.get(name)) for name in names}
