"""Tables on the terminal, their cells shown as they are: no markup, emoji codes or escapes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence

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
    Console(width=output_width()).print(table)


def output_width() -> int:
    """Return the characters of a line: the terminal's, or COLUMNS; wide in a file."""
    console = Console()
    is_set = os.environ.get("COLUMNS", "").isdigit()
    return console.width if console.is_terminal or is_set else WIDTH_OF_A_FILE


def shorten_labels(labels: Sequence[str]) -> list[str]:
    """Return swept values without their keys' sections, where that leaves the keys distinct."""
    keys = {key for label in labels for key in re.findall(r"(?<!\S)([\w.]+)=", label)}
    last = Counter(key.rpartition(".")[2] for key in keys)

    def shorten(found: re.Match[str]) -> str:
        name = found[1].rpartition(".")[2]
        return f"{name}=" if last[name] == 1 else found[0]

    return [for_terminal(re.sub(r"(?<!\S)([\w.]+)=", shorten, label)) for label in labels]


def show_size(num_bytes: float) -> str:
    """Return a size in a unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
