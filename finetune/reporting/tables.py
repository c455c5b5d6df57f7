"""Tables on the terminal, their cells shown as they are: no markup, emoji codes or escapes."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.escaping import for_terminal

WIDTH_OF_A_FILE = 200  # characters, where the output is no terminal


def build_table(*names: str, right: Collection[str] = ()) -> Table:
    """Return an empty table.

    Args:
        names: the columns' headings.
        right: those of them that are aligned to the right.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(
            Text(for_terminal(name)), overflow="fold", justify="right" if name in right else "left"
        )
    return table


def add_row(table: Table, *cells: str) -> None:
    """Add a row of plain text to a table."""
    table.add_row(*(Text(for_terminal(cell)) for cell in cells))


def print_table(table: Table) -> None:
    """Print a table; where the output is no terminal, without colours and line breaks."""
    console = Console()
    Console(width=None if console.is_terminal else WIDTH_OF_A_FILE).print(table)
