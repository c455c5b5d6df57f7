"""report.html in a browser: hovering, clicking, sorting, filtering, comparing settings.

They need Debian's Chromium and `pip install playwright`; without either they are skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.reporting.pages import write_report
from tests.test_effects import write_grid
from tests.test_run_facts import write_runs

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

ROWS = "[...document.querySelectorAll('#summary tbody tr[data-run]')]"
MANY = 90  # runs, of which not all rows are in the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def wanted() -> list[str]:
    """Return addresses that the page asked for, filled as it is used."""
    return []


def open_page(browser: Any, folder: Path, wanted: list[str], width: int = 1400) -> Any:
    write_report(folder)
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("request", lambda request: wanted.append(request.url))
    page.on("pageerror", lambda error: wanted.append(f"error: {error}"))
    page.goto((folder / "report.html").as_uri())
    page.evaluate("window.drawn")
    return page


def test_hovering_says_which_run_and_a_click_finds_it_everywhere(
    tmp_path: Path, browser: Any, wanted: list[str]
) -> None:
    """In the tables, in all charts, and in a line at the bottom, which clears it again."""
    folder = write_grid(tmp_path, {"lora.r": ["4", "8", "16"]}, [1, 9, 4])
    page = open_page(browser, folder, wanted)
    point = page.locator("[data-chart^=differences] .mark-symbol path").nth(1)
    point.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "lora.r=8" in page.inner_text("#vg-tooltip-element")
    point.click(force=True)
    page.wait_for_selector("#picked:not([hidden])")
    assert page.inner_text("#picked").startswith("lora.r=8")
    picked = page.evaluate("[...document.querySelectorAll('.picked')].map(r => r.dataset.run)")
    assert picked == ["lora.r=8"] * 3
    page.wait_for_timeout(200)
    faded = "[...document.querySelectorAll('.chart path')].map(p => p.getAttribute('opacity'))"
    assert "0.12" in page.evaluate(faded)
    page.click("#picked button")
    assert page.locator(".picked").count() == 0
    assert wanted == [(folder / "report.html").as_uri()]


def test_a_table_of_many_runs_keeps_only_those_in_view(
    tmp_path: Path, browser: Any, wanted: list[str]
) -> None:
    """Sorting, filtering and scrolling reach all of them."""
    ranks = [str(rank) for rank in range(1, MANY + 1)]
    folder = write_grid(tmp_path, {"lora.r": ranks}, [n % 19 for n in range(MANY)])
    page = open_page(browser, folder, wanted)
    assert page.evaluate(f"{ROWS}.length") < MANY
    page.click("#summary th:nth-child(1)")
    assert page.evaluate(f"{ROWS}[0].cells[0].textContent") == str(MANY)
    page.evaluate("document.querySelector('#summary').closest('.tall').scrollTop = 1e6")
    page.wait_for_timeout(200)
    assert page.evaluate(f"{ROWS}.at(-1).cells[0].textContent") == "1"
    page.fill(".filter", "lora.r=57")
    assert page.evaluate(f"{ROWS}.map(r => r.dataset.run)") == ["lora.r=57"]
    assert not [one for one in wanted if one.startswith("error")]


def test_settings_of_two_runs_are_compared(tmp_path: Path, browser: Any, wanted: list[str]) -> None:
    """Only those that differ between the two."""
    page = open_page(browser, write_runs(tmp_path, seeds=1), wanted)
    assert page.inner_text("#differing tbody").split() == [
        "lora.r", "8", "4", "training.seed", "43", "42"
    ]  # fmt: skip
    page.select_option("#other", label="lora.r=8")
    assert page.inner_text("#differing tbody").strip() == "no setting differs"


@pytest.mark.parametrize("width", [400, 800, 1400])
def test_the_page_fits_its_window(
    tmp_path: Path, browser: Any, wanted: list[str], width: int
) -> None:
    """Wide tables and charts scroll within themselves."""
    swept = {"lora.r": ["4", "8"], "optimizer.lr": ["1e-4", "1e-3"], "training.seed": ["1", "2"]}
    folder = write_grid(tmp_path, swept, [1, 2, 3, 4, 5, 6, 7, 8])
    page = open_page(browser, folder, wanted, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
