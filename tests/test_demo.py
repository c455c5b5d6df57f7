"""The demo's data: true to its tables, and fair to the control half."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from finetune.demo import build
from finetune.demo.facts import TOPICS, Topic
from finetune.demo.task import process_results, task_config


def read(name: str) -> list[dict[str, Any]]:
    text = (Path(build.__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_files_are_what_the_tables_give() -> None:
    """Nobody edited the rows or questions by hand."""
    assert read("rows") == build.build_rows()
    assert read("questions") == build.build_questions()


def test_there_are_enough_and_the_halves_are_equal() -> None:
    """Over 500 rows; over 200 questions, half of them taught, answers evenly placed."""
    questions = read("questions")
    assert len(read("rows")) > 500
    assert len(questions) >= 200
    assert Counter(q["taught"] for q in questions) == {
        True: len(questions) // 2, False: len(questions) // 2,
    }  # fmt: skip
    places = Counter(q["answer"] for q in questions)
    assert max(places.values()) - min(places.values()) <= 1


def test_no_question_stands_in_the_rows() -> None:
    """What is asked is never what was learned word for word."""
    rows = " ".join(row["instruction"] + row["output"] for row in read("rows"))
    assert [q for q in read("questions") if q["question"] in rows] == []


@pytest.mark.parametrize("topic", TOPICS, ids=lambda t: t.name)
def test_no_row_teaches_a_control_fact(topic: Topic) -> None:
    """No row holds both a control fact's subject and its answer as words."""
    rows = [f" {' '.join(row.values())} ".replace(".", " ").replace("?", " ") for row in
            read("rows")]  # fmt: skip
    for subject, answer in topic.control.items():
        told = [r for r in rows if f" {subject} " in r and f" {answer} " in r]
        assert told == []


def test_choices_differ_and_only_one_is_true() -> None:
    """A distractor is another subject's answer, never this one's."""
    by_name = {topic.name: topic for topic in TOPICS}
    for question in read("questions"):
        topic_name, _, subject = question["id"].split("-", 2)
        topic = by_name[topic_name]
        assert len(set(question["choices"])) == build.NUM_CHOICES
        right = topic.answer.format(s=subject, a=topic.facts[subject])
        assert question["choices"][question["answer"]] == right


def test_scores_equal_lm_evals_own_multiple_choice() -> None:
    """Acc and acc_norm of our process_results are those of lm-eval's ConfigurableTask."""
    manager = TaskManager(include_defaults=False)
    ours = manager.load([task_config()])["tasks"]["demo_science"]
    plain = task_config()
    del plain["process_results"]
    plain["metric_list"] = plain["metric_list"][:2]
    stock = manager.load([plain])["tasks"]["demo_science"]
    for i, doc in enumerate(ours.test_docs()):
        results = [(-((i * 7 + 13 * j) % 29) / 3, False) for j in range(4)]
        expected = stock.process_results(doc, results)
        got = process_results(doc, results)
        assert (got["acc"], got["acc_norm"]) == (expected["acc"], expected["acc_norm"])
        assert got["acc_taught" if doc["taught"] else "acc_control"] == got["acc"]
        assert len(got) == 3
