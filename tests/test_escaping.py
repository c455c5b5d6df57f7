"""Text from outside: neither terminal, page nor spreadsheet takes it for more than text."""

from __future__ import annotations

import logging

import pytest

from finetune.escaping import for_csv, for_markdown, for_terminal, keep_logs_plain
from finetune.reporting.rendering import build_pages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora.r=4", "lora.r=4"),
        ("a\nb", "a\nb"),
        ("é 漢 👩‍👧", "é 漢 👩‍👧"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\tc\x7f\x9b1m", "a\\rb\\tc\\x7f\\x9b1m"),
        ("a\u202eb", "a\\u202eb"),
        ("bad\udcffbyte", "bad\\udcffbyte"),
    ],
)
def test_control_characters_are_written_out_for_a_terminal(text: str, expected: str) -> None:
    """Escapes, bells, carriage returns, bidirectional overrides and stray bytes are visible."""
    assert for_terminal(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora.target_modules=[q_proj,v_proj]", "lora.target_modules=[q_proj,v_proj]"),
        ("a|b", "a\\|b"),
        ("a\nb", "a b"),
        ("`x` *y* _z_", "\\`x\\` \\*y\\* \\_z\\_"),
        ("[x](http://y)", "[x\\](http://y)"),
        ("![x][y]", "![x\\][y]"),
        ("<b>&lt;", "&lt;b>&amp;lt;"),
        ("a\\|b\\", "a\\\\\\|b\\\\"),
        ("# x", "\\# x"),
        ("- x", "\\- x"),
        ("1. x", "1\\. x"),
        ("-1.5", "-1.5"),
        ("+1.5 points", "+1.5 points"),
    ],
)
def test_markdown_shows_a_value_as_it_is(text: str, expected: str) -> None:
    """Pipes, newlines, emphasis, links, tags and list marks are text in a cell."""
    assert for_markdown(text) == expected


@pytest.mark.parametrize("text", ["=1+1", "+SUM(A1)", "-cmd|x", "@x", "\t=1", " =1"])
def test_a_formula_is_text_in_a_spreadsheet(text: str) -> None:
    """A cell that a spreadsheet would evaluate begins with an apostrophe."""
    assert for_csv(text) == "'" + text


@pytest.mark.parametrize("value", ["-1", "+1e-3", "-inf", -0.5, None, 3, "[q_proj]", "a=b"])
def test_numbers_and_plain_text_stay_as_they_are(value: object) -> None:
    """A negative number is no formula."""
    assert for_csv(value) == value


@pytest.mark.parametrize(
    ("page", "expected"),
    [("x.md", "a\\|\\x1b&lt;b>"), ("x.html", "a|\\x1b&lt;b&gt;")],
)
def test_pages_escape_every_value(page: str, expected: str) -> None:
    """No template has to remember to escape."""
    assert build_pages(page).from_string("{{ x }}").render(x="a|\x1b<b>") == expected


def test_code_in_markdown_is_not_escaped_and_does_not_end_its_block() -> None:
    """Commands are copied from a report."""
    template = build_pages("x.md").from_string("{{ x | code }} {{ x | span }}")
    assert template.render(x="a*b```") == "a*b''' `a*b'''`"


def test_a_log_line_is_plain(caplog: pytest.LogCaptureFixture) -> None:
    """A reason or a path with escapes reaches neither the terminal nor the run's log."""
    keep_logs_plain()
    keep_logs_plain()
    with caplog.at_level(logging.INFO, logger="finetune"):
        logging.getLogger("finetune").info("%s failed: %s", "a", "\x1b[2J")
    assert [record.getMessage() for record in caplog.records] == ["a failed: \\x1b[2J"]
