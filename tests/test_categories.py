"""Scores by category: paired within each, adjusted over all, and the flips of the command."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from finetune import flips as command
from finetune.reporting import categories
from finetune.reporting.categories import compare_categories, score_categories
from finetune.reporting.pages import write_report
from finetune.reporting.results import read_results
from finetune.statistics.comparison import mid_p
from finetune.statistics.metrics import Metric
from tests.report_cases import Line, ask, write_sweep


def subject(name: str, *counts: int, key: str = "category") -> list[Line]:
    """Return a category's items: how many were gained, lost, right twice and wrong twice."""
    pairs = [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)]
    outcomes = [pair for count, pair in zip(counts, pairs, strict=True) for _ in range(count)]
    texts: Line = {"question": "?", "choices": ["a"], key: name}
    return [
        ask(int.from_bytes(name.encode()) + n, *pair, **texts) for n, pair in enumerate(outcomes)
    ]


ITEMS = [*subject("law", 12, 1, 10, 7), *subject("art", 3, 2, 5, 10), *subject("zoo", 0, 0, 4, 4)]


def test_each_category_is_compared_over_its_questions() -> None:
    """Scores, flips and an interval of its own; p by McNemar, adjusted by Holm over three."""
    found = compare_categories([*ITEMS, ask(0, 0.0, 1.0)], "acc", Metric())
    assert found is not None
    art, law, zoo = (one.difference for one in found.scores)
    assert [one.name for one in found.scores] == ["art", "law", "zoo"]
    assert (law.questions, law.base, law.tuned) == (30, 11 / 30, 22 / 30)
    assert (law.gained, law.lost) == (12, 1)
    assert law.low is not None
    assert law.low < law.value < (law.high or 0)
    assert law.p_adjusted == pytest.approx(3 * mid_p(12, 1))
    assert art.p_adjusted == pytest.approx(min(1.0, 2 * mid_p(3, 2)))
    assert (zoo.low, zoo.p_adjusted) == (None, 1.0)
    assert found.without == 1


def test_the_tasks_of_a_group_are_categories() -> None:
    """Unless the questions name their own; the two kinds of own questions are none."""
    members = [*subject("mmlu_law", 1, 0, 1, 1, key="task"), *subject("art", 1, 0, 1, 1)]
    found = compare_categories(members, "acc", Metric(grouping="by_size"))
    assert found is not None
    assert [one.name for one in found.scores] == ["art", "mmlu_law"]
    kinds = [
        *subject("questions_choice", 1, 0, 1, 1, key="task"),
        *subject("questions_text", 1, 0, 1, 1, key="task"),
    ]
    assert compare_categories(kinds, "acc", Metric()) is None


def test_another_aggregate_is_resampled() -> None:
    """Such as a perplexity, of which lower is better."""
    items = [
        ask(n, -2.0 - n / 9, -1.0 - n / 7, "ppl", category="even" if n % 2 else "odd")
        for n in range(20)
    ]
    found = compare_categories(items, "ppl", Metric("perplexity", higher_is_better=False))
    assert found is not None
    assert all(one.difference.value < 0 and one.difference.gained == 10 for one in found.scores)
    assert not found.comparison.is_share


def test_the_smallest_categories_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number is said; p is adjusted over those that are shown."""
    monkeypatch.setattr(categories, "MOST", 2)
    found = compare_categories(ITEMS, "acc", Metric())
    assert found is not None
    assert ([one.name for one in found.scores], found.left_out) == (["art", "law"], 1)
    assert found.scores[1].difference.p_adjusted == pytest.approx(2 * mid_p(12, 1))


@pytest.mark.parametrize("items", [[], subject("law", 1, 1, 1, 1), [ask(1, 0.0, 1.0)]])
def test_fewer_than_two_categories_are_no_table(items: list[Line]) -> None:
    """The task's own table has these numbers already."""
    assert compare_categories(items, "acc", Metric()) is None


def test_the_report_shows_what_the_command_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gained and lost of a category are the flips that `--category` prints."""
    attack = subject("<img onerror=x>|", 1, 0, 0, 0)
    folder = write_sweep(tmp_path, [*ITEMS, *attack])
    write_report(folder)
    short, page = ((folder / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert re.search(
        r"^\| law \| 30 \| 0.3667 \| 0.7333 \| \*\*\+36.7\*\* \| .* \| 12 / 1 \|", short, re.M
    )
    assert "adjusted over these 4 categories (Holm)" in short
    assert "adjusted over these 4 categories (Holm)" in page
    assert "<img" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    (found,) = score_categories(read_results(folder))
    for one in found.scores:
        if one.name == "zoo":
            continue
        run = str(tmp_path / "outputs" / "run")
        monkeypatch.setattr(sys, "argv", ["flips", run, "--category", one.name])
        command.main()
        out = capsys.readouterr().out
        counts = [len(re.findall(rf"^\{sign} ", out, re.M)) for sign in "+-"]
        assert counts == [one.difference.gained, one.difference.lost]
