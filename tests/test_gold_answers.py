"""Gold answers: those that nothing can match are counted, and refused where there are no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import EvaluationConfig
from finetune.evaluation.forecast import Speeds
from finetune.evaluation.gold_answers import _can_extract, _is_met
from finetune.evaluation.tasks import load_task
from tests.conftest import write_rows
from tests.test_tasks import arc_rows, gsm8k_rows, hellaswag_rows, local, mmlu_rows

GSM8K: list[dict[str, Any]] = [
    {"name": "strict-match", "filter": [
        {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
        {"function": "take_first"}]},
    {"name": "flexible-extract", "filter": [
        {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
        {"function": "take_first"}]},
]  # fmt: skip
IGNORED = {"regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"], "ignore_case": True}


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ("so #### 4", True), ("4", True), ("#### 1,600", True), ("$12", True), ("-3.5", True),
        ("The answer is 4", False), ("four", False), ("#### four", False), ("4 apples", False),
        ("", False), (" ", False), (["none", "7"], True), (["none", ""], False), (None, False),
    ],
)  # fmt: skip
def test_gsm8k_can_match_numbers_only(gold: Any, expected: bool) -> None:
    """What its two filters can extract, after what its metric ignores."""
    assert _is_met(gold, GSM8K, IGNORED) is expected


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("(?<=the answer is )(.*)(?=.)", "False", True),
        ("(?<=the answer is )(.*)(?=.)", "two\nlines", False),
        (r"(?<=The answer is )[A-D]", "B", True),
        (r"(?<=The answer is )[A-D]", "E", False),
        (r"answer is \(?([A-J])\)?", "J", True),
        (r"answer is \(?([A-J])\)?", "(J)", False),
        (r"(?i)answer: (yes|no)", "YES", True),
        (r"[(\])] ([ab]+)", "ab", True),
        (r"(?P<letter>[A-D])", "D", True),
        (r"(\d)\1", "1", True),
        (r"(a)|(b)", "b", True),
        (r"\((\w)\)", "x", True),
        ("[", "anything", True),
    ],
)
def test_what_an_expression_can_extract(pattern: str, text: str, expected: bool) -> None:
    """A capturing group's text, or all that matches, whatever stands around it."""
    assert _can_extract(pattern, text) is expected


@pytest.mark.parametrize(
    ("steps", "gold", "expected"),
    [
        ([{"function": "lowercase"}], "Paris", False),
        ([{"function": "lowercase"}], "paris", True),
        ([{"function": "remove_whitespace"}, {"function": "take_first"}], "Paris", True),
        ([{"function": "remove_whitespace"}], " Paris", False),
        ([{"function": "regex", "regex_pattern": "([A-Z])"}, {"function": "lowercase"}], "b", True),
        ([{"function": "multi_choice_regex"}], "whatever", True),
    ],
)
def test_other_filters_are_followed_or_trusted(
    steps: list[dict[str, str]], gold: str, expected: bool
) -> None:
    """A filter that is not known raises no alarm."""
    assert _is_met(gold, [{"name": "one", "filter": steps}], {}) is expected


def gsm(tmp_path: Path, *answers: str) -> EvaluationConfig:
    rows: list[object] = [
        {"question": f"{n} + {n}?", "answer": one} for n, one in enumerate(answers)
    ]
    file = str(write_rows(tmp_path / "gsm.jsonl", rows))
    return EvaluationConfig(["gsm8k"], num_fewshot=0, data_files={"gsm8k": {"test": file}})


@pytest.mark.parametrize("answers", [("It is 4", "five"), ("", ""), ("#### none",), ("4", "5")])
def test_a_task_that_no_answer_of_can_be_matched_is_refused(
    answers: tuple[str, ...], tmp_path: Path
) -> None:
    """The file, the count, the first answer and what the filters look for, in one line."""
    with pytest.raises(ValueError, match=f"{len(answers)} of {len(answers)} gold") as caught:
        load_task("gsm8k", gsm(tmp_path, *answers))
    text = str(caught.value)
    assert text.startswith(f"evaluation.data_files.gsm8k.test={tmp_path / 'gsm.jsonl'}: ")
    assert r"strict-match (#### (\-?[0-9\.\,]+))" in text
    assert repr(answers[0]) in text
    assert "\n" not in text


def test_some_that_cannot_be_matched_are_counted(tmp_path: Path) -> None:
    """The line that tells a task's size says so before it is scored."""
    task = load_task("gsm8k", gsm(tmp_path, "#### 4", "five", "#### 6"))
    assert task.notes.startswith("1 of 3 gold answers cannot be matched and score 0.0 (first: ")
    assert "question 2, 'five'" in task.notes
    assert task.notes in Speeds(tmp_path / "none.json").forecast(task)


@pytest.mark.parametrize("labels", [["4", "4"], ["-1", "-1"], ["1", "9"]])
def test_choices_that_are_none_are_found_too(labels: list[str], tmp_path: Path) -> None:
    """A label beyond the choices, or the -1 of a hidden test set, scores 0.0 as well."""
    rows = [
        {**row, "label": label}
        for row, label in zip(hellaswag_rows()["validation"], labels, strict=False)
    ]
    settings = local(tmp_path, "hellaswag", {"validation": rows}, num_fewshot=0)
    if "1" in labels:
        assert load_task("hellaswag", settings).notes.startswith("1 of 2 gold answers")
        return
    with pytest.raises(
        ValueError, match=r"hellaswag.*(2 of 2 gold answers|the gold answer of the first)"
    ):
        load_task("hellaswag", settings)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("gsm8k", gsm8k_rows()), ("arc_easy", arc_rows()), ("hellaswag", hellaswag_rows()),
        ("mmlu_anatomy", mmlu_rows(("anatomy",))),
        ("triviaqa", {"validation": [
            {"question": "q", "answer": {"aliases": ["the", "a"], "value": "the"}}]}),
        ("gsm8k_cot", gsm8k_rows()),
        ("bbh_cot_fewshot_boolean_expressions", {"test": [{"input": "1 is", "target": "False"}]}),
        ("nq_open", {"validation": [{"question": "who", "answer": ["Paris", "City"]}]}),
        ("sciq", {"test": [{"support": "s", "question": "q", "distractor1": "a", "distractor2": "b",
                            "distractor3": "c", "correct_answer": "d"}]}),
        ("cola", {"validation": [{"sentence": "s", "label": 1, "idx": 0}]}),
    ],
)  # fmt: skip
def test_stock_rows_raise_no_alarm(name: str, rows: Any, tmp_path: Path) -> None:
    """Tasks whose gold answers are not in the form that a model is to answer in."""
    shots = None if name == "bbh_cot_fewshot_boolean_expressions" else 0
    settings = local(tmp_path, name, rows, num_fewshot=shots)
    assert load_task(name, settings).notes == ""
