"""Rows of a local file that do not fit a stock task: the columns that it reads and those it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import Config, DataConfig, EvaluationConfig, ModelConfig
from finetune.evaluation.tasks import load_task
from finetune.pipeline import preflight
from tests.conftest import write_rows

# A row of each task's own data set, with the split that it asks.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "sciq": ("test", {"question": "q", "distractor1": "a", "distractor2": "b", "distractor3": "c",
                      "correct_answer": "d", "support": "s"}),
    "arc_easy": ("test", {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
                          "answerKey": "A"}),
    "hellaswag": ("validation", {"activity_label": "x", "ctx_a": "a", "ctx_b": "b",
                                 "endings": ["a", "b"], "label": "0"}),
    "piqa": ("validation", {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}),
    "mmlu_anatomy": ("test", {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1}),
    "gsm8k": ("test", {"question": "q", "answer": "x\n#### 4"}),
    "triviaqa": ("validation", {"question": "q", "answer": {"aliases": ["a", "b"]}}),
    "winogrande": ("validation", {"sentence": "a _ b", "option1": "x", "option2": "y",
                                  "answer": "1"}),
    "boolq": ("validation", {"passage": "p", "question": "q", "label": 1}),
}  # fmt: skip


def load(folder: Path, task: str, rows: list[dict[str, Any]], **settings: Any) -> str:
    """Return what is said of rows; nothing where the task asks them."""
    split, _ = ROWS[task]
    file = str(write_rows(folder / f"{task}.jsonl", list(rows)))
    asked = EvaluationConfig([task], num_fewshot=0, data_files={task: {split: file}}, **settings)
    said = ""
    try:
        load_task(task, asked)
    except ValueError as error:
        said = str(error)
    key, _, fault = said.partition("jsonl: ")
    assert key == (f"evaluation.data_files.{task}.{split}={file[:-5]}" if said else "")
    assert "\n" not in said
    return fault


@pytest.mark.parametrize("task", ROWS)
def test_each_missing_column_is_named_with_those_needed_and_there(
    tmp_path: Path, task: str
) -> None:
    """From templates, names of columns, functions and process_docs alike."""
    _, row = ROWS[task]
    assert load(tmp_path, task, [row, row]) == ""
    for column in row:
        renamed = {f"{key}_" if key == column else key: value for key, value in row.items()}
        missing, reads, has = load(tmp_path, task, [renamed, renamed]).replace(
            ", and the rows have ", "; "
        ).split("; ")  # fmt: skip
        assert missing == f"the column {column} is missing"
        assert set(reads.removeprefix(f"{task} reads the columns ").split(", ")) == set(row)
        assert has == ", ".join(renamed)


@pytest.mark.parametrize("task", ROWS)
def test_a_row_without_a_value_is_named(tmp_path: Path, task: str) -> None:
    """lm-eval would ask and expect the text None, or fail without the row's number."""
    _, row = ROWS[task]
    said = load(tmp_path, task, [row, row, {next(iter(row)): None}])
    assert said.startswith(("row 3", "process_docs: "))
    assert f"{task} reads the columns" in said


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("arc_easy", {"choices": ["a", "b"]}, "row 1: doc_to_"),
        ("arc_easy", {"answerKey": "C"}, "row 1: doc_to_target: "),
        ("mmlu_anatomy", {"choices": ["a", "b"]}, "row 1: doc_to_text: "),
        ("triviaqa", {"answer": "a"}, "row 1: doc_to_target: "),
        ("winogrande", {"sentence": "no gap"}, "row 1: doc_to_"),
        ("hellaswag", {"label": "none"}, "process_docs: "),
    ],
)
def test_a_value_of_another_kind_is_told_with_its_row(
    tmp_path: Path, task: str, change: dict[str, Any], said: str
) -> None:
    """What the template or function says of it, which names neither file nor row."""
    _, row = ROWS[task]
    assert load(tmp_path, task, [{**row, **change}]).startswith(said)


def test_the_chat_template_is_not_blamed_for_a_column(tmp_path: Path) -> None:
    """Before the start, with the setting that names the file."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Say it.", "output": "it"}] * 4)
    file = write_rows(tmp_path / "sciq.jsonl", [{"question": "q", "answer": "a"}])
    config = Config(
        model=ModelConfig(path="random://tiny"),
        data=DataConfig(path=str(rows)),
        evaluation=EvaluationConfig(["sciq"], data_files={"sciq": {"test": str(file)}}),
    )
    (problem,) = preflight.prepare(config).problems
    assert problem.startswith(f"evaluation.data_files.sciq.test={file}: the column ")
