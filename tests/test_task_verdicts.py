"""The verdict on each task in a line, and the terms that the tables' headings explain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.reporting.glossary import TERMS, find_term
from finetune.reporting.pages import write_report
from finetune.reporting.rendering import render_term
from finetune.reporting.results import read_results
from finetune.reporting.task_verdicts import build_verdicts
from tests.test_effects import write_grid
from tests.test_results import ACC, BASE, LESS, LOWER, Task, write_sweep

RIGHT = [0.0, 1.0] * 20
MORE_RIGHT = [1.0] * 40


def lines(folder: Path) -> list[list[str]]:
    table = build_verdicts(read_results(folder))
    assert table is not None
    return [[cell.text for cell in row[:3]] for row in table.rows]


def test_every_task_has_its_verdict(tmp_path: Path) -> None:
    """Of the best run: better, worse, the same as the base; lower is better where it is."""
    tasks: dict[str, Task] = {
        "arc": {"acc": (ACC, RIGHT, MORE_RIGHT)},
        "worse": {"acc": (ACC, MORE_RIGHT, RIGHT)},
        "same": {"acc": (ACC, RIGHT, RIGHT)},
        "loss": {"nll": (LOWER, BASE, LESS)},
        "new": {"acc": (ACC, None, RIGHT)},
    }
    assert lines(write_sweep(tmp_path, [tasks])) == [
        ["arc/acc", "significantly better", "+50.0 points"],
        ["worse/acc", "significantly worse", "-50.0 points"],
        ["same/acc", "no detectable difference", ""],
        ["loss/nll (lower is better)", "significantly better", "-1.09"],
        ["new/acc", "no base", ""],
    ]


def test_another_metric_speaks_where_the_main_one_did_not_change(tmp_path: Path) -> None:
    """As the verdict does in words."""
    tasks = {"arc": {"acc": (ACC, RIGHT, RIGHT), "acc_norm": (ACC, RIGHT, MORE_RIGHT)}}
    assert [line[0] for line in lines(write_sweep(tmp_path, [tasks]))] == [
        "arc/acc", "arc/acc_norm"
    ]  # fmt: skip


def test_a_tie_is_called_a_tie(tmp_path: Path) -> None:
    """In the table's title, and in that of all runs."""
    results = read_results(write_grid(tmp_path, {"lora.r": ["4", "8", "16"]}, [3, 3, 1]))
    table = build_verdicts(results)
    assert table is not None
    assert table.title == "Best run: lora.r=4, tied with 1 more"
    assert [row[-1].text for row in table.rows] == ["0 of 3"]


def test_without_scores_there_is_no_table(tmp_path: Path) -> None:
    """The verdict in words says why."""
    folder = write_grid(tmp_path, {"lora.r": ["4"]}, [1])
    for path in tmp_path.glob("run-*/evaluation/*"):
        path.unlink()
    assert build_verdicts(read_results(folder)) is None


@pytest.mark.parametrize("heading", ["acc", "arc_easy/acc_norm", "p, adjusted", "95 %", "tokens/s"])
def test_a_heading_is_explained_on_hover_with_a_link(heading: str) -> None:
    """Whichever task a metric is of."""
    term, shown = find_term(heading), render_term(heading)
    assert term is not None
    assert 'title="' in shown
    assert f'href="#{term.anchor}"' in shown
    assert render_term("a<b/unknown") == "a&lt;b/<wbr>unknown"


def test_each_term_is_in_one_entry_with_a_link() -> None:
    """One line, one name in one entry, an https address."""
    names = [name for term in TERMS for name in term.names]
    assert len(names) == len(set(names))
    assert all(term.link.startswith("https://") and "\n" not in term.meaning for term in TERMS)
    assert len({term.anchor for term in TERMS}) == len(TERMS)


def test_every_link_to_a_term_has_its_entry_in_the_page(tmp_path: Path) -> None:
    """Also those of the notes."""
    folder = write_grid(tmp_path, {"lora.r": ["4", "8"]}, [3, 5])
    write_report(folder)
    page = (folder / "report.html").read_text()
    linked = set(re.findall(r'href="#(term-[^"]+)"', page))
    assert len(linked) > 5
    assert linked <= set(re.findall(r'<dt id="([^"]+)"', page))


def test_the_docs_have_all_terms() -> None:
    """docs/reference/report.md ends with the page's glossary."""
    page = Path(__file__).parents[1] / "docs" / "reference" / "report.md"
    rows = [f"| {', '.join(term.names)} | {term.meaning} [more]({term.link}) |" for term in TERMS]
    assert page.read_text(encoding="utf-8").endswith("\n".join(["|---|---|", *rows, ""]))
