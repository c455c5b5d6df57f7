"""Rewrite overrides for Hydra's grammar where users reasonably type less than it asks for.

Text for a setting that holds a list is a list of one (`evaluation.tasks=arc_easy`), and an
interpolation within another needs no quotes (`lora.alpha=${mul:2,${lora.r}}`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException

from finetune.config.schema import Config

INTERPOLATION = "${"
NO_EXPERIMENT = "experiment=null"  # the one group that may have no option
ELEMENT_STARTS, ELEMENT_ENDS = ("", ",", "(", "[", ":", " "), ("", ",", ")", "]", "}", " ")


def parse(argument: str) -> Override:
    """Parse an override by Hydra's grammar.

    Raises:
        ValueError: it cannot be read; the message is the parser's first line.
    """
    try:
        return OverridesParser.create().parse_override(argument)
    except (HydraException, ValueError) as error:  # ValueError: a number of 5,000 digits
        raise ValueError(str(error).strip().splitlines()[0]) from error


def find_override(argument: str) -> Override | None:
    """Return an override; None where it cannot be read, which is reported where it is checked."""
    with suppress(ValueError):
        return parse(argument)
    return None


def rewrite(argument: str) -> str:
    """Return an override in Hydra's grammar; one that cannot be read is returned as it is."""
    key, equals, value = argument.partition("=")
    argument = f"{key}={quote_nested(value)}" if equals else argument
    override = find_override(argument)
    if override is None or override.key_or_group not in list_settings() or override.is_delete():
        return argument
    return _as_list(override, argument)


def without_null(overrides: Sequence[str]) -> list[str]:
    """Leave out `experiment=null`: Hydra takes null in a defaults list, but not as an override."""
    return [one for one in overrides if one.replace(" ", "") != NO_EXPERIMENT]


def quote_nested(value: str) -> str:
    """Quote interpolations that hold others, which Hydra's grammar reads only in quotes."""
    parts, start = [], 0
    while (place := value.find(INTERPOLATION, start)) >= 0:
        end = _end_of_interpolation(value, place)
        inner = value[place:end]
        before, after = value[:place][-1:], value[end : end + 1]
        is_element = before in ELEMENT_STARTS and after in ELEMENT_ENDS
        is_quoted = value[:place].count("'") % 2 or value[:place].count('"') % 2
        if inner.count(INTERPOLATION) > 1 and is_element and not is_quoted:
            inner = "'" + inner.replace("'", "\\'") + "'"
        parts += [value[start:place], inner]
        start = end
    return "".join([*parts, value[start:]])


def _end_of_interpolation(value: str, place: int) -> int:
    depth = 0
    for found in re.finditer(r"[{}]", value[place:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return place + found.end()
    return len(value)


def list_settings() -> list[str]:
    """Return the settings that hold a list of text."""
    return [key for key, kind in _settings(Config, "") if kind == list[str]]


def _settings(schema: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from _settings(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def _as_list(override: Override, argument: str) -> str:
    value, key = override._value, override.get_key_element()
    if not isinstance(value, ChoiceSweep):
        return f"{key}={_listed(value)}" if _is_text(value) else argument
    if not any(map(_is_text, value.list)):
        return argument
    choices = ",".join(map(_listed, value.list))
    return f"{key}=shuffle({choices})" if value.shuffle else f"{key}={choices}"


def _is_text(value: Any) -> bool:
    text = value.text if isinstance(value, QuotedString) else value
    return isinstance(text, str) and bool(text) and not text.startswith(INTERPOLATION)


def _listed(value: Any) -> str:
    text = Override._get_value_element_as_str(value)
    return f"[{text}]" if _is_text(value) else text


def grid_arguments(params: Mapping[str, Any] | None) -> list[str]:
    """Return the overrides of `hydra.sweeper.params`, where a YAML list is a list of choices.

    For a setting that holds a list it is one value, as Hydra's own sweeper takes it.
    """
    arguments = []
    for key, value in _flat(params or {}, ""):
        is_choices = isinstance(value, list) and key.lstrip("+") not in list_settings()
        text = ",".join(map(_literal, value)) if is_choices else _literal(value)
        arguments.append(rewrite(f"{key}={text}"))
    return arguments


def _flat(params: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys: `+hydra.sweeper.params.lora.r=...` nests what a file writes as lora.r."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    return "null" if value is None else str(value)


def key_of(argument: str) -> str:
    """Return the key that an override sets."""
    return argument.partition("=")[0].lstrip("+~")
