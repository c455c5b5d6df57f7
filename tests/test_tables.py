"""The tables on the terminal show every cell as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.reporting.tables import add_row, build_table, print_table, print_text

PACKAGE = Path(__file__).parents[1] / "finetune"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("[q_proj]", "[q_proj]"),
        ("[q_proj,v_proj]", "[q_proj,v_proj]"),
        ("rows[/v2].jsonl", "rows[/v2].jsonl"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("[link=http://x]y[/link]", "[link=http://x]y[/link]"),
        (":smile:", ":smile:"),
        ("\\[x]", "\\[x]"),
        ("\x1b[2Jx", "\\x1b[2Jx"),
    ],
)
def test_a_cell_is_shown_as_it_is(
    value: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets are no markup, colons no emoji, escapes no commands; headings neither."""
    table = build_table("data.path", value, "run")
    add_row(table, value, value, value)
    print_table(table)
    assert capsys.readouterr().out.count(shown) == 4


def test_numbers_stand_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    """A column is aligned by its heading."""
    table = build_table("name", "number", right=("number",))
    add_row(table, "a", "1")
    print_table(table)
    assert capsys.readouterr().out.splitlines()[1] == "a          1"


def test_all_tables_are_built_in_one_place() -> None:
    """Rich's own rows would read markup in their cells."""
    users = {p.name for p in PACKAGE.rglob("*.py") if {" Table(", ".add_row("} & set_of(p)}
    assert users == {"tables.py"}


def set_of(path: Path) -> set[str]:
    """Return which of the two calls a file makes."""
    text = path.read_text(encoding="utf-8")
    return {call for call in (" Table(", ".add_row(") if call in text}


@pytest.mark.parametrize("is_narrow", [True, False])
def test_text_is_broken_between_words_on_a_terminal_alone(
    is_narrow: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An address stays in one piece, to be copied; a file has each sentence on its line."""
    if is_narrow:
        monkeypatch.setenv("COLUMNS", "20")
    else:
        monkeypatch.delenv("COLUMNS", raising=False)
    print_text("some words and http://an-address/that-is-long here\n\nend")
    expected = "some words and\nhttp://an-address/that-is-long\nhere\n\nend\n"
    if not is_narrow:
        expected = "some words and http://an-address/that-is-long here\n\nend\n"
    assert capsys.readouterr().out == expected
