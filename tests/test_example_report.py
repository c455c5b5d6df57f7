"""The example report in the repository: small, nothing of this machine, JavaScript in a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.reporting.figures import JAVASCRIPT
from finetune.reporting.pages import write_report
from tests.test_effects import write_grid

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "multirun_reports" / "example"


def test_the_example_is_small_and_loads_its_javascript() -> None:
    """A change of the report rewrites some 100 kB, and not the 900 kB that draw its charts."""
    files = [path for path in EXAMPLE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.5e6
    page = (EXAMPLE / "report.html").read_text(encoding="utf-8")
    assert len(page) < 200_000
    assert re.findall(r'<script src="(.*?)"', page) == [JAVASCRIPT]
    assert (EXAMPLE / JAVASCRIPT).is_file()


def test_the_example_names_no_folder_of_a_machine() -> None:
    """Its runs are named relative to the report."""
    for path in EXAMPLE.rglob("*"):
        if path.suffix in (".html", ".md", ".csv", ".yaml"):
            found = re.findall(r"(?<![\w.])/(?:home|tmp|root|work|Users)/", path.read_text("utf-8"))
            assert found == [], path


def test_its_command_is_that_of_the_makefile() -> None:
    """`make example` writes it anew."""
    written = re.search(r"^    (python -m .*)$", (EXAMPLE / "report.md").read_text("utf-8"), re.M)
    made = re.search(
        r"^example:.*\n\t(.*)\\\n\s*(.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M
    )
    assert written is not None
    assert made is not None
    assert written[1] == f"{made[1].strip()} {made[2]}".replace("$(BIN)/", "")


@pytest.mark.parametrize("has_file", [True, False])
def test_the_page_holds_its_javascript_unless_it_is_beside_it(
    tmp_path: Path, has_file: bool
) -> None:
    """One file by default; a file vega.js in the folder is loaded instead."""
    folder = write_grid(tmp_path, {"lora.r": ["4", "8"]}, [1, 3])
    if has_file:
        (folder / JAVASCRIPT).write_text("window.vegaEmbed = () => {};")
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert (len(page) < 200_000) == has_file
    assert (f'<script src="{JAVASCRIPT}">' in page) == has_file


def test_pictures_of_the_docs_are_small() -> None:
    """Each below 150 kB."""
    pictures = list((ROOT / "docs" / "pictures").glob("*.png"))
    assert pictures
    assert all(path.stat().st_size < 150_000 for path in pictures)
