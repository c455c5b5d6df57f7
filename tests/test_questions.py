"""A user's own questions: read, checked, asked as trained or in lm-eval's words, and scored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from finetune.config import rules
from finetune.config.schema import Config, DataConfig, EvaluationConfig, ModelConfig
from finetune.data.leakage import find_leaks
from finetune.data.questions import Question, QuestionPrompt, find_gold, normalise, read_questions
from finetune.data.turns import Unusable
from finetune.evaluation import question_tasks
from finetune.evaluation.question_tasks import score_choices, score_text, word_f1
from finetune.evaluation.question_texts import describe_questions
from finetune.evaluation.tasks import LoadedTask
from finetune.models import base_model
from finetune.pipeline import preflight
from finetune.pipeline.session import Session
from tests.conftest import write_rows

ARC = {
    "id": "M1", "question": "What is ice?", "answerKey": "2",
    "choices": {"text": ["steam", "water"], "label": ["1", "2"]},
}  # fmt: skip
CHOICE = {"question": "Which is a fruit?", "choices": ["a heavy stone", "apple"], "answer": 1}
TEXT = {"question": "Name a number.", "answer": ["4", "four"], "category": "maths"}
TALK = {
    "messages": [
        {"role": "user", "content": "Who wrote Hamlet?"},
        {"role": "assistant", "content": "Shakespeare"},
    ]
}


def read(folder: Path, *rows: object) -> list[Question]:
    return read_questions(str(write_rows(folder / "questions.jsonl", list(rows))), "questions")


def test_all_kinds_of_rows_are_read(tmp_path: Path) -> None:
    """Multiple choice in our columns and in ARC's, answers to generate, and conversations."""
    arc, choice, text, talk = read(tmp_path, ARC, CHOICE, TEXT, TALK)
    assert (arc.choices, arc.gold, arc.id) == (("steam", "water"), 1, "M1")
    assert (choice.choices, choice.gold) == (("a heavy stone", "apple"), 1)
    assert (text.answers, text.category, text.choices) == (("4", "four"), "maths", ())
    assert (talk.text, talk.answers) == ("Who wrote Hamlet?", ("Shakespeare",))
    assert [turn.role for turn in talk.turns] == ["user"]


def test_a_table_is_read_too(tmp_path: Path) -> None:
    """Choices are JSON in a cell, and an index is digits."""
    path = tmp_path / "questions.csv"
    path.write_text('question,choices,answer\nWhich?,"[""no"", ""yes""]",1\nTwo?,,2\n')
    first, second = read_questions(str(path), "questions")
    assert (first.choices, first.gold) == (("no", "yes"), 1)
    assert (second.answers, second.choices) == (("2",), ())


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("b", 1), ("B", 1), (" 3 ", 2), ("3", 2), (1, 1), (1.0, 1), ("0", 0), ("ONE", 0)],
)
def test_an_answer_is_a_text_a_letter_or_an_index(answer: Any, gold: int) -> None:
    """In this order, so that a choice that is a number is found by its text."""
    assert find_gold(answer, ["one", "two", "3"], ["A", "B", "C"]) == gold


@pytest.mark.parametrize("answer", ["four", "D", 3, -1, True, 1.5, ""])
def test_an_answer_that_is_no_choice_is_refused(answer: Any) -> None:
    """Its question would always be wrong."""
    with pytest.raises(Unusable, match="is no choice"):
        find_gold(answer, ["one", "two", "3"], ["A", "B", "C"])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({}, "no column question"),
        ({"question": " ", "answer": "x"}, "question is empty"),
        ({"question": "x"}, "no column answer"),
        ({"question": "x", "answer": None}, "answer is missing"),
        ({"question": "x", "answer": " The. "}, "answer is empty"),
        ({"question": "x", "answer": [[]]}, "not text or a list"),
        ({"question": "x", "choices": ["a"], "answer": 0}, "fewer than two"),
        ({"question": "x", "choices": ["a", " "], "answer": 0}, "a choice is empty"),
        ({"question": "x", "choices": ["a", "a"], "answer": 0}, "there twice"),
        ({"question": "x", "choices": "a or b", "answer": 0}, "not a list"),
        ({"question": {"a": 1}, "answer": "x"}, "question is not text"),
        ({"messages": "hello"}, "no conversation"),
        ({"messages": TALK["messages"][:1]}, "does not end with the assistant's answer"),
    ],
)
def test_a_row_that_is_no_question_is_refused(
    tmp_path: Path, row: dict[str, Any], fault: str
) -> None:
    """With its number, before anything is loaded; no question is left out in silence."""
    with pytest.raises(ValueError, match=f"questions.jsonl: row 2: .*{fault}"):
        read(tmp_path, TEXT, row)


def test_all_kinds_of_faults_are_named_with_their_rows(tmp_path: Path) -> None:
    """A repeated question, whatever its case, is one."""
    repeated = {**TEXT, "question": "name  a NUMBER"}
    rows = [TEXT, repeated, {}, {}, {}, {}, {"question": "x"}]
    with pytest.raises(ValueError, match="row") as raised:
        read(tmp_path, *rows)
    assert "rows 3, 4, 5 and 1 more: it has no column question" in str(raised.value)
    assert "row 7: it has no column answer" in str(raised.value)
    assert "row 2: it repeats the question of row 1" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The  Eiffel-Tower! ", "eiffel tower"), ("1,000", "1000"), ("a_b", "b"),
        ("É", "é"), ("an apple a day", "apple day"), ("3.5", "3 5"),
    ],
)  # fmt: skip
def test_texts_are_compared_without_case_articles_and_punctuation(text: str, normal: str) -> None:
    """SQuAD's rules; a comma within a number is no punctuation."""
    assert normalise(text) == normal


def prompt(name: str, trained: str = "alpaca", tokenizer: Any = None) -> QuestionPrompt:
    return QuestionPrompt.load(name, trained, tokenizer)


def test_questions_are_asked_as_trained(tmp_path: Path) -> None:
    """Without a template of their own, in the training's, joined as there."""
    (question,) = read(tmp_path, {**TEXT, "context": "Only digits."})
    as_trained = QuestionPrompt.load(None, "alpaca", None)
    text = as_trained.ask(question)
    assert "### Instruction:\nName a number.\n\n### Input:\nOnly digits.\n\n" in text
    assert text.endswith("### Response:\n")
    assert as_trained.delimiter(text) == ""


def test_a_file_asks_in_its_own_words(tmp_path: Path) -> None:
    """Its variables are columns of the questions; a space comes before an answer on its line."""
    file = tmp_path / "exam.jinja"
    file.write_text("{{ level }}: {{ question }}\nAnswer:")
    (question,) = read(tmp_path, {**TEXT, "level": "easy"})
    own = prompt(str(file))
    text = own.ask(question)
    assert (text, own.delimiter(text)) == ("easy: Name a number.\nAnswer:", " ")
    assert prompt(str(file), trained=str(file)).delimiter(text) == ""
    (other,) = read(tmp_path, TEXT)
    with pytest.raises(Unusable, match="has the variable level"):
        own.ask(other)


def test_an_unknown_prompt_is_refused() -> None:
    """With what there is."""
    with pytest.raises(ValueError, match="one of alpaca, chat, text, or a file"):
        prompt("vicuna")


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


def load(session: Session, folder: Path, *rows: object, **changes: Any) -> LoadedTask:
    """Return the task of rows, asked of the tiny model."""
    file = write_rows(folder / "questions.jsonl", list(rows))
    asked = EvaluationConfig(["questions"], questions=str(file), **changes)
    config = Config(model=ModelConfig(path="random://tiny"), evaluation=asked)
    (task,) = session.tasks(config, base_model.find_model(config.model))
    return task


def test_both_kinds_are_one_task(session: Session, tmp_path: Path) -> None:
    """A group with the metrics of both; texts and right answers are kept."""
    task = load(session, tmp_path, CHOICE, TEXT, TALK)
    assert set(task.tasks) == {"questions_choice", "questions_text"}
    described = list(describe_questions(task).values())
    assert described[0]["question"] == "Which is a fruit?"
    assert (described[0]["choices"], described[0]["gold"]) == (["a heavy stone", "apple"], 1)
    assert (described[1]["gold"], described[1]["category"]) == (["4", "four"], "maths")
    alone = load(session, tmp_path, CHOICE)
    assert set(alone.tasks) == {"questions"}


def test_a_task_is_the_same_in_every_process(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What names its stored scores holds no address of this process's memory."""
    monkeypatch.setattr("finetune.evaluation.tasks.digest", str)
    text = load(session, tmp_path, CHOICE, TEXT).digest
    assert "def _prompt" in text
    assert not re.search(r"at 0x[0-9a-f]+", text)


def test_equally_long_choices_are_told(session: Session, tmp_path: Path) -> None:
    """acc_norm divides by what is the same for all of them."""
    same = {"question": "Which?", "choices": ["x", "y"], "answer": 0}
    assert "acc_norm adds little" in load(session, tmp_path, same).notes
    assert load(session, tmp_path, CHOICE).notes == ""


def test_solved_examples_come_from_a_file_of_their_own(session: Session, tmp_path: Path) -> None:
    """Or from the other questions of the same file."""
    solved = write_rows(tmp_path / "solved.jsonl", [{**CHOICE, "question": "Is it solved?"}])
    task = load(session, tmp_path, CHOICE, num_fewshot=1, fewshot_questions=str(solved))
    context = task.requests[0].args[0]
    assert "Is it solved?" in context
    assert context.index("apple") < context.index("Which is a fruit?")
    other = {**CHOICE, "question": "Which one of the others?"}
    assert "the others" in load(session, tmp_path, CHOICE, other, num_fewshot=1).requests[0].args[0]


def test_stops_follow_the_accepted_answers(session: Session, tmp_path: Path) -> None:
    """An answer of one line ends with it; one of several with its paragraph."""
    one, two = {**TEXT, "answer": "4"}, {**TEXT, "answer": "4\n5"}
    assert load(session, tmp_path, one).requests[0].args[1]["until"] == ["\n"]
    assert load(session, tmp_path, two).requests[0].args[1]["until"] == ["\n\n"]


def test_a_choice_is_scored_as_by_lm_eval() -> None:
    """The margin is how far the right choice is ahead of the best other one."""
    doc = {"choices": ["long one", "b"], "gold": 1}
    scores = score_choices(doc, [(-4.0, False), (-3.0, True)])
    assert scores == {"acc": 1.0, "acc_norm": 0.0, "margin": 1.0}


@pytest.mark.parametrize(
    ("said", "exact", "contains", "f1"),
    [
        ("The Eiffel Tower.", 1.0, 1.0, 1.0),
        ("It is the Eiffel Tower", 0.0, 1.0, 2 / 3),
        ("towering Eiffel", 0.0, 0.0, 0.5),
        ("", 0.0, 0.0, 0.0),
    ],
)
def test_a_text_is_scored_by_its_words(said: str, exact: float, contains: float, f1: float) -> None:
    """Against the best of what is accepted."""
    scores = score_text({"answers": ["eiffel tower", "tour Eiffel"]}, [said])
    assert scores == pytest.approx({"exact_match": exact, "contains": contains, "f1": f1})
    assert word_f1("a b", "c") == 0.0


def test_questions_in_the_rows_are_found() -> None:
    """As a text of a row, in whatever column or turn; a longer one within a text, too."""
    questions = [
        Question(1, "Name a number."),
        Question(2, "What is the capital city of France?"),
        Question(3, "Say it."),
    ]
    rows: list[dict[str, Any]] = [
        {"instruction": "name a NUMBER", "output": "1"},
        {"messages": [{"content": "Tell me: what is the capital city of France? Thanks."}]},
        {"text": "Do say it now."},
    ]
    assert [one.row for one in find_leaks(questions, rows)] == [1, 2]


@pytest.mark.parametrize("refuses", [False, True])
def test_leakage_is_told_or_refused(tmp_path: Path, refuses: bool, module_cache: None) -> None:
    """With its count; `evaluation.refuse_leakage` makes it a problem."""
    rows = [{"instruction": f"Say {n} words.", "input": "", "output": "word"} for n in range(9)]
    file = write_rows(tmp_path / "rows.jsonl", list(rows))
    asked = write_rows(tmp_path / "asked.jsonl", [TEXT, {**TEXT, "question": "Say 3 words."}])
    config = Config(
        model=ModelConfig(path="random://tiny"),
        data=DataConfig(path=str(file)),
        evaluation=EvaluationConfig(
            ["questions"], questions=str(asked), refuse_leakage=refuses, base=False
        ),
    )
    plan = preflight.prepare(config)
    lines = plan.problems if refuses else plan.forecasts
    assert any("1 of its questions stands in the rows to train on (row 2)" in x for x in lines)


def test_settings_of_questions_are_checked(tmp_path: Path) -> None:
    """A file that is missing, and one that nothing asks."""

    def problems(tasks: list[str], **changes: Any) -> list[str]:
        asked = EvaluationConfig(tasks, **changes)
        return rules.find_problems(Config(data=DataConfig(path="rows.jsonl"), evaluation=asked))

    assert problems(["questions"]) == [
        "evaluation.questions has no value; set evaluation.questions=FILE"
    ]
    assert "there is no file gone.jsonl" in problems(["questions"], questions="gone.jsonl")[0]
    assert "evaluation.tasks is ['sciq']" in problems(["sciq"], questions="gone.jsonl")[0]
    assert "evaluation.max_new_tokens is 0" in problems([], max_new_tokens=0)[0]


def test_the_version_of_the_task_is_recorded(session: Session, tmp_path: Path) -> None:
    """So that scores of another way to ask are not compared."""
    assert load(session, tmp_path, TEXT).tasks["questions"].VERSION == question_tasks.VERSION


def test_arcs_file_asks_what_arc_easy_asks(session: Session, tmp_path: Path) -> None:
    """In its template, the same requests: so every score is the same."""
    rows = [
        {**ARC, "id": f"M{n}", "question": f"What is number {n}?", "answerKey": str(1 + n % 2)}
        for n in range(5)
    ]
    file = write_rows(tmp_path / "arc.jsonl", list(rows))
    template = tmp_path / "arc.jinja"
    template.write_text("Question: {{ question }}\nAnswer:")
    asked = [
        EvaluationConfig(["questions"], questions=str(file), prompt_template=str(template)),
        EvaluationConfig(["arc_easy"], data_files={"arc_easy": {"test": str(file)}}),
    ]
    model = ModelConfig(path="random://tiny")
    source = base_model.find_model(model)
    own, stock = (session.tasks(Config(model=model, evaluation=one), source)[0] for one in asked)
    assert [one.args for one in own.requests] == [one.args for one in stock.requests]
    (mine,), (theirs,) = own.tasks.values(), stock.tasks.values()
    assert [mine.doc_to_target(one.doc) for one in mine.instances] == [
        theirs.doc_to_target(one.doc) for one in theirs.instances
    ]
