"""Jinja environment of the report pages, which escapes every value for its page."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from finetune.escaping import for_markdown, for_terminal
from finetune.reporting.glossary import find_term

SHORT = 120  # characters of a text within a line


def build_pages(name: str) -> Environment:
    """Return the environment for a page; values are escaped as the ending of its name says.

    In Markdown, a value in a code block is written as `{{ value | code }}`.
    """
    is_html = name.endswith(".html")
    pages = Environment(
        loader=PackageLoader("finetune.reporting"),
        autoescape=is_html,  # noqa: S701  # Markdown has an escape of its own
        finalize=_visible if is_html else _markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"code": _code, "span": _span, "short": _short}
    pages.filters |= {"json": as_json, "markup": Markup, "term": render_term}
    pages.globals["asset"] = read_asset
    return pages


def read_asset(name: str) -> Markup:
    """Return a script, style sheet or licence of the templates' folder, to stand in a page."""
    text = resources.files("finetune.reporting").joinpath("templates", name).read_text("utf-8")
    return Markup(text)  # noqa: S704  # it is our own


def render_term(heading: str) -> Markup:
    """Return a table's heading: explained on hover, with a link to its entry, if it is a term."""
    term = find_term(heading)
    name = re.sub(r", (?=\w+$)", ",\N{NO-BREAK SPACE}", _visible(heading))  # before a unit
    *parts, last = (escape(part) for part in re.split(r"(?<=/)(?=..)", name))
    before = Markup("").join(part + Markup("<wbr>") for part in parts)
    if term is None:
        return before + last
    return before + Markup('<abbr title="{}">{}</abbr><a class="help" href="#{}">?</a>').format(
        term.meaning, last, term.anchor
    )


def as_json(value: Any) -> Markup:
    """Return a value as JSON that ends no script element."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(text)  # noqa: S704


def _visible(value: Any) -> Any:
    return for_terminal(value) if type(value) is str else value


def _markdown(value: Any) -> Any:
    return value if isinstance(value, Markup) else for_markdown(value)


def _code(value: object) -> Markup:
    """Return a value for a block of code, which no line of it ends."""
    return Markup(for_terminal(str(value)).replace("```", "'''"))  # noqa: S704


def _span(value: object) -> Markup:
    """Return a value as code within a line of Markdown."""
    text = for_terminal(str(value)).replace("\n", " ").replace("`", "'").replace("|", "\\|")
    return Markup(f"`{text}`")  # noqa: S704


def _short(value: object) -> str:
    """Return a value as one line of at most SHORT characters."""
    line = " ".join(str(value).split())
    return line if len(line) <= SHORT else f"{line[:SHORT]}..."
