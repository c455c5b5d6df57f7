"""Escape text from outside (values, errors, samples) for terminals, pages and spreadsheets."""

from __future__ import annotations

import logging
import re
import unicodedata
from typing import Any

# Control characters, surrogates and format characters (bidirectional overrides among them).
HIDDEN_CATEGORIES = ("Cc", "Cs", "Cf")
JOINERS = "\u200c\u200d"  # format characters that scripts and emoji need
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet evaluates
# A bracket alone makes no link, an underscore within a word no emphasis.
MARKDOWN = re.compile(r"[`*|~$]|\](?=[(\[:])|\\(?=[!-/:-@\[-`{-~]|$)|(?<![^\W_])_|_(?![^\W_])")
# What opens a block at the start of a line; a signed number does not.
MARKDOWN_START = re.compile(r"^(\s*)([#>]|[-+](?=\s|$)|-(?=--)|=(?==)|\d+(?=[.)]\s))")


def for_terminal(text: str) -> str:
    r"""Escape control and invisible characters, e.g. ESC as `\x1b`; newlines stay."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(
        character
        if character in "\n" + JOINERS or unicodedata.category(character) not in HIDDEN_CATEGORIES
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def keep_logs_plain() -> None:
    """Escape control characters in every line that finetune logs from now on."""
    logging.getLogger("finetune").addFilter(_plain)  # adding it twice changes nothing


def _plain(record: logging.LogRecord) -> bool:
    record.msg, record.args = for_terminal(record.getMessage()), None
    return True


def for_markdown(text: Any) -> str:
    """Escape a value within a line or table cell of Markdown; a newline becomes a space."""
    line = " ".join(for_terminal(str(text)).split("\n"))
    line = MARKDOWN.sub(lambda found: "\\" + found[0], line)
    line = re.sub(r"<(?=[\w/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", line))
    return MARKDOWN_START.sub(_escape_start, line)


def _escape_start(found: re.Match[str]) -> str:
    indent, mark = found.groups()
    return f"{indent}{mark}\\" if mark.isdigit() else f"{indent}\\{mark}"


def for_csv(value: Any) -> Any:
    """Put an apostrophe before text that a spreadsheet would evaluate; numbers stay numbers."""
    if not isinstance(value, str) or _is_number(value):
        return value
    return "'" + value if value.lstrip(" ").startswith(FORMULA_STARTS) else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
