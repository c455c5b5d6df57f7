"""The report lists the best run's flips: readable, searchable, bounded, and nothing but text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from finetune.reporting.flip_lists import LONGEST, MOST, list_flips
from finetune.reporting.pages import write_report
from finetune.reporting.results import read_results
from finetune.tracking.run_folder import RunFolder
from tests.report_cases import Line, ask, write_sweep

ATTACK = "</script><img src=x onerror=alert(1)> `|**x** \x1b[2J"
CHOICES: Line = {
    "question": f"Which is a fruit? {ATTACK}",
    "choices": ["stone", f"apple {ATTACK}"],
    "gold": 1,
    "category": f"food {ATTACK}",
    "id": f"q1 {ATTACK}",
    "said": {"base": [-1.5, -3.0], "tuned": [-4.25, -2.5]},
}
TEXT: Line = {
    "question": "Name the capital of France.",
    "gold": ["Paris", "city of Paris"],
    "category": "geography",
    "said": {"base": "Paris", "tuned": f"London {ATTACK}"},
}


def test_gained_and_lost_questions_are_listed_with_both_answers(tmp_path: Path) -> None:
    """Of choices and of generated answers, in the metric of each."""
    items = [
        ask(1, 0.0, 1.0, **CHOICES), ask(2, 1.0, 1.0, **CHOICES),
        ask(3, 1.0, 0.0, "exact_match", **TEXT),
    ]  # fmt: skip
    found = list_flips(read_results(write_sweep(tmp_path, items)))
    assert found is not None
    assert [task.title for task in found.tasks] == ["questions/acc", "questions/exact_match"]
    (gained,) = found.tasks[0].kinds[0].flips
    assert (gained.base, gained.tuned, gained.right) == ("stone", *[CHOICES["choices"][1]] * 2)
    assert [one.marks for one in gained.choices] == ["base", "right, tuned"]
    assert [one.before for one in gained.choices] == ["-1.50", "-3.00"]
    (lost,) = found.tasks[1].kinds[1].flips
    assert (lost.right, lost.base) == ("Paris or city of Paris", "Paris")
    assert (found.tasks[0].total, found.tasks[1].total) == (2, 1)


def test_whatever_a_question_holds_is_text_in_the_pages(tmp_path: Path) -> None:
    """No tag, no script, no Markdown and no control character comes of it."""
    items = [ask(1, 0.0, 1.0, **CHOICES), ask(2, 1.0, 0.0, "exact_match", **TEXT)]
    folder = write_sweep(tmp_path, items)
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 5
    assert page.count("</script>") == len(re.findall("<script[ >]", page))
    assert "\x1b" not in page
    assert page.count('<details class="flip">') == 2
    assert 'type="search"' in page
    short = (folder / "report.md").read_text()
    assert "1 gained, 0 lost of 1 questions" in short
    assert "- gained: Which is a fruit? &lt;/script>&lt;img src=x" in short
    assert "\\`\\|\\*\\*x\\*\\*" in short
    assert "\x1b" not in short


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no browser")
def test_the_search_field_hides_what_does_not_match(tmp_path: Path) -> None:
    """By question, choices, answers, category and id; all words, in any case, of a local file."""
    items = [
        ask(1, 0.0, 1.0, **CHOICES), ask(2, 1.0, 0.0, "exact_match", **TEXT),
        ask(3, 0.0, 1.0, **CHOICES | {"id": "q-3", "question": "Which flies?"}),
    ]  # fmt: skip
    folder = write_sweep(tmp_path, items)
    write_report(folder)
    page = folder / "report.html"
    words = ["", "STONE fruit", "paris", "geography london", "q-3", "-4.25", "nothing"]
    page.write_text(page.read_text().replace("</body>", PROBE % json.dumps(words)))
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    found = subprocess.run(
        ["chromium", *arguments], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "<title>3 1 1 1 1 0 0</title>" in found


PROBE = """<script>
document.title = %s.map(function (words) {
  var field = document.getElementById("flip-search");
  field.value = words;
  field.dispatchEvent(new Event("input"));
  return document.querySelectorAll(".flip:not([hidden])").length;
}).join(" ");
</script></body>"""


def test_long_lists_and_texts_are_cut_and_the_command_prints_the_rest(tmp_path: Path) -> None:
    """Of each kind the first are shown; how many more there are is said."""
    texts = TEXT | {"question": "x" * 10_000, "said": {"base": "y" * 10_000, "tuned": "z" * 10_000}}
    folder = write_sweep(tmp_path, [ask(n, 0.0, 1.0, **texts) for n in range(MOST + 7)])
    found = list_flips(read_results(folder))
    assert found is not None
    gained, lost = found.tasks[0].kinds
    assert (gained.count, len(gained.flips), gained.more, lost.more) == (MOST + 7, MOST, 7, 0)
    assert len(gained.flips[0].question) == len(gained.flips[0].tuned) == LONGEST + 3
    assert re.fullmatch(
        r"python -m finetune\.flips \S+/run --gained --task questions --metric acc", gained.command
    )
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "7 more gained" in page
    assert gained.command in page
    assert len((folder / "report.md").read_text()) < 10_000
    assert gained.command in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("keep_texts", "reason"),
    [(False, "evaluation.keep_texts=false kept no texts"), (True, "run the same command again")],
)
def test_without_texts_the_reason_is_shown(tmp_path: Path, keep_texts: bool, reason: str) -> None:
    """The numbers of flips stay; no list, no field to search."""
    folder = write_sweep(tmp_path, [ask(1, 0.0, 1.0)], keep_texts=keep_texts)
    write_report(folder)
    for name in ("report.html", "report.md"):
        page = (folder / name).read_text()
        assert "1 gained, 0 lost of 1 questions" in page
        assert reason in page
        assert "flip-search" not in page


def test_a_base_that_was_not_scored_has_no_flips(tmp_path: Path) -> None:
    """`evaluation.base=false`: the section is left out."""
    folder = write_sweep(tmp_path, [ask(1, 0.0, 1.0, **TEXT)])
    line = json.dumps({"hash": "h1", "prompt": "p1", "tuned": {"acc": 1.0}, **TEXT}) + "\n"
    RunFolder(tmp_path / "outputs" / "run").write_text("evaluation/questions.items.jsonl", line)
    assert list_flips(read_results(folder)) is None


@pytest.mark.parametrize(
    "harm",
    [
        {"choices": [1, None]}, {"choices": "stone"}, {"gold": -7}, {"gold": {"a": 1}},
        {"said": {"base": [None, "x"], "tuned": 3}}, {"said": []}, {"question": None}, {"id": 5},
    ],
)  # fmt: skip
def test_items_of_other_types_are_shown_as_text(tmp_path: Path, harm: Line) -> None:
    """A file that another program wrote makes no report fail."""
    folder = write_sweep(tmp_path, [ask(1, 0.0, 1.0, **CHOICES | harm), ask(2, 1.0, 0.0, **TEXT)])
    found = list_flips(read_results(folder))
    assert found is not None
    assert [kind.count for kind in found.tasks[0].kinds] == [1, 1]


@pytest.mark.parametrize(
    ("question", "heading"),
    [
        ("### Instruction:\nWho found it?\n\n### Response:\n", "Who found it?"),
        ("# A title\nWhy?", "# A title Why?"),
        ("### Instruction:\n", "### Instruction:"),
        ("Question: Who?\nAnswer:", "Question: Who? Answer:"),
    ],
)
def test_a_heading_leaves_out_the_prompts_own_headings(
    tmp_path: Path, question: str, heading: str
) -> None:
    """Lines that only name a part of the prompt; a question of nothing else stays."""
    items = [ask(1, 0.0, 1.0, question=question, choices=["a", "b"], gold=1), ask(2, 1.0, 1.0)]
    found = list_flips(read_results(write_sweep(tmp_path, items)))
    assert found is not None
    assert [one.heading for one in found.tasks[0].kinds[0].flips] == [heading]
