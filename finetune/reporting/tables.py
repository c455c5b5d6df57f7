"""Tables on the terminal, their cells shown as they are: no markup, emoji codes or escapes."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from finetune.escaping import for_terminal

GAP = 2  # characters between columns
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


def print_table(table: Table | Group) -> None:
    """Print a table; where the output is no terminal, without colours and line breaks."""
    Console(width=output_width()).print(table)


def output_width() -> int:
    """Return the characters of a line: the terminal's, or COLUMNS; wide in a file."""
    return Console().width if is_narrow() else WIDTH_OF_A_FILE


def is_narrow() -> bool:
    """Return whether the output is a terminal, or COLUMNS is set."""
    return Console().is_terminal or os.environ.get("COLUMNS", "").isdigit()


def find_width(rows: Sequence[Sequence[str]]) -> int:
    """Return the characters of a table of cells, its headings among the rows."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return sum(widths) + GAP * (len(widths) - 1)


def print_text(text: str, file: TextIO | None = None) -> None:
    """Print text, on a terminal broken between words; addresses and commands stay in one piece."""
    width = output_width() if is_narrow() else sys.maxsize
    for line in for_terminal(text).split("\n"):
        lines = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        print("\n".join(lines) if len(line) > width else line, file=file or sys.stdout)


def shorten_keys(keys: Collection[str]) -> dict[str, str]:
    """Return each key without its section, where that leaves the keys distinct."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    ends = {key: key.rpartition(".")[2] for key in keys}
    return {key: end if last[end] == 1 else key for key, end in ends.items()}


def shorten_labels(labels: Sequence[str]) -> list[str]:
    """Return swept values without their keys' sections, where that leaves the keys distinct."""
    found = re.compile(r"(?<!\S)([\w.]+)=")
    short = shorten_keys({key for label in labels for key in found.findall(label)})
    return [for_terminal(found.sub(lambda one: f"{short[one[1]]}=", label)) for label in labels]


def show_size(num_bytes: float) -> str:
    """Return a size in a unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def show_duration(seconds: float) -> str:
    """Return a duration in a unit that suits it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
