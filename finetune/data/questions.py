"""A user's own questions (`evaluation.questions`): read from a file, checked, asked in a prompt.

A row is a multiple choice (question, choices, answer), a question with one or several accepted
answers (question, answer), or a conversation whose last turn is the answer (messages). Formats are
those of rows to train on. The columns of ARC (choices with labels, answerKey) are read as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.config.schema import EvaluationConfig
from finetune.data.json_rows import Row
from finetune.data.row_messages import build_messages, find_messages_kind, parse_json_text
from finetune.data.sources import read_file
from finetune.data.templates import BY_NAME, Template, load_template
from finetune.data.turns import Turn, Unusable
from finetune.files import file_digest

ANSWERS = ("answer", "answerKey")  # columns, the first that a row has
TURNS = ("messages", "conversations", "conversation")
MOST_NAMED = 3  # faulty rows named in a problem; the others are counted


@dataclass(frozen=True)
class Question:
    """One question as a file has it."""

    row: int  # its number in the file, from 1
    text: str  # what is asked; of a conversation its last user turn
    choices: tuple[str, ...] = ()  # none where the answer is generated
    gold: int = 0  # of the choices, the index of the right one
    answers: tuple[str, ...] = ()  # that are accepted, where it is generated
    context: str = ""
    category: str = ""
    id: str = ""
    turns: tuple[Turn, ...] = ()  # of a conversation, those before the answer
    columns: Mapping[str, Any] = field(default_factory=dict)  # of the row, for a prompt's file


def read_questions(file: str, key: str) -> list[Question]:
    """Read and check the questions of a file.

    Args:
        file: its path.
        key: the setting that names it, for errors.

    Raises:
        ValueError: the file cannot be read, or rows are no questions; all kinds of faults are
            named, each with its rows.
    """
    questions: list[Question] = []
    faults: dict[str, list[int]] = {}
    for number, row in enumerate(read_file(Path(file).expanduser(), name=f"{key}={file}"), start=1):
        try:
            questions.append(_read(row, number))
        except Unusable as fault:
            faults.setdefault(str(fault), []).append(number)
    for one, first in _find_repeated(questions):
        faults.setdefault(f"it repeats the question of row {first}", []).append(one)
    if faults:
        lines = [f"{_name_rows(rows)}: {fault}" for fault, rows in faults.items()]
        raise ValueError(f"{key}={file}: {'; '.join(lines)}")
    if not questions:
        raise ValueError(f"{key}={file} holds no questions")
    return questions


def find_digests(evaluation: EvaluationConfig) -> list[str]:
    """Return the digests of the files of questions that the settings name."""
    files = evaluation.questions, evaluation.select_questions, evaluation.fewshot_questions
    paths = [Path(file).expanduser() for file in files if file is not None]
    return [file_digest(path) for path in paths if path.is_file()]


def _name_rows(rows: Sequence[int]) -> str:
    named = ", ".join(map(str, rows[:MOST_NAMED]))
    more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
    return f"row{'s' * (len(rows) > 1)} {named}{more}"


def _find_repeated(questions: Sequence[Question]) -> Iterator[tuple[int, int]]:
    """Yield the rows that ask what an earlier one asks, each with the earlier one's row."""
    first: dict[tuple[str, ...], int] = {}
    for one in questions:
        earlier = (f"{turn.role}: {turn.content}" for turn in one.turns[:-1])
        asked = (one.context, *earlier, normalise(one.text), *sorted(one.choices))
        if asked in first:
            yield one.row, first[asked]
        first.setdefault(asked, one.row)


def _read(row: Row, number: int) -> Question:
    """Return a row's question.

    Raises:
        Unusable: it is none; the message says why.
    """
    common: dict[str, Any] = {
        "row": number,
        "context": _text(row, "context"),
        "category": _text(row, "category"),
        "id": _text(row, "id"),
        "columns": row,
    }
    for column in TURNS:
        if row.get(column) is not None:
            return _read_conversation(row, column, common)
    text = _text(row, "question")
    if not text.strip():
        raise Unusable(
            "question is empty" if "question" in row else "it has no column question or messages"
        )
    named = [column for column in ANSWERS if row.get(column) not in (None, "")]
    if not named:
        raise Unusable("answer is missing" if "answer" in row else "it has no column answer")
    answer = row[named[0]]
    if row.get("choices") in (None, ""):  # of a table's empty cell
        return Question(text=text, answers=_read_answers(answer), **common)
    choices, labels = _read_choices(row["choices"])
    gold = find_gold(answer, choices, labels)
    return Question(text=text, choices=choices, gold=gold, **common)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if isinstance(value, Mapping | list):
        raise Unusable(f"{column} is not text")
    return "" if value is None else str(value)


def _read_conversation(row: Row, column: str, common: dict[str, Any]) -> Question:
    if find_messages_kind(row[column]) is None:
        raise Unusable(f"{column} is no conversation")
    messages = build_messages(row[column], column)
    said = [one.get("content") for one in messages if isinstance(one, Mapping)]
    if len(said) < len(messages) or not all(isinstance(one, str) for one in said):
        raise Unusable(f"{column} has a message without text")
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise Unusable(f"{column} does not end with the assistant's answer")
    if messages[-2].get("role") != "user":
        raise Unusable(f"{column} has no user's turn before the answer")
    turns = tuple(Turn(str(one["role"]), one["content"]) for one in messages[:-1])
    answers = _read_answers(messages[-1]["content"])
    return Question(text=turns[-1].content, answers=answers, turns=turns, **common)


def _read_answers(value: Any) -> tuple[str, ...]:
    """Return the accepted answers: one, or a list of them."""
    found = parse_json_text(value)
    given = found if isinstance(found, list) else [value]
    answers = tuple(str(one) for one in given if not isinstance(one, Mapping | list | None))
    if len(answers) != len(given) or not answers:
        raise Unusable("answer is not text or a list of texts")
    if not all(normalise(one) for one in answers):
        raise Unusable("answer is empty, or nothing but articles and punctuation")
    return answers


def _read_choices(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the choices' texts and labels; without labels these are A, B, C, ..."""
    if isinstance(value, Mapping):  # as ARC has them; before a table of columns is turned
        found, labels = value.get("text"), value.get("label")
    else:
        found, labels = parse_json_text(value), None
    if not isinstance(found, list) or any(isinstance(one, Mapping | list | None) for one in found):
        raise Unusable("choices is not a list of texts")
    choices = tuple(map(str, found))
    if len(choices) < 2:
        raise Unusable("choices has fewer than two")
    if not all(one.strip() for one in choices):
        raise Unusable("a choice is empty")
    if len(set(choices)) < len(choices):
        raise Unusable("a choice is there twice")
    if isinstance(labels, list) and len(labels) == len(choices):
        return choices, tuple(map(str, labels))
    return choices, tuple(chr(ord("A") + place) for place in range(len(choices)))


def find_gold(answer: Any, choices: Sequence[str], labels: Sequence[str]) -> int:
    """Return the index of the right choice.

    A text is looked for among the choices, then among their labels (letters where they have none);
    then, as a number is at once, it is an index from 0.

    Raises:
        Unusable: it is no choice.
    """
    if isinstance(answer, str):
        for names in (choices, labels):
            for wanted, have in ((answer, names), (answer.strip().casefold(), _folded(names))):
                if wanted in have:
                    return list(have).index(wanted)
    digits = str(answer).strip()
    is_number = not isinstance(answer, bool) and re.fullmatch(r"\d+(\.0)?", digits) is not None
    if is_number and int(float(digits)) < len(choices):
        return int(float(digits))
    shown = str(answer)[:40]
    raise Unusable(f"answer {shown!r} is no choice, no letter of one and no index from 0")


def _folded(names: Sequence[str]) -> list[str]:
    return [name.strip().casefold() for name in names]


def normalise(text: str) -> str:
    """Return a text without case, punctuation, articles and extra spaces (SQuAD's rules).

    Rajpurkar et al. 2016, evaluation script; digits with a comma between them are one number.
    """
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.casefold())
    words = re.sub(r"[^\w\s]|_", " ", text).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


@dataclass(frozen=True)
class QuestionPrompt:
    """The prompt that questions are asked in, and what stands between it and an answer."""

    name: str  # of the template, as the setting names it
    template: Template
    is_trained: bool  # whether it is the one of the rows to train on
    tokenizer: PreTrainedTokenizerBase | None  # has the chat template

    @classmethod
    def load(
        cls, name: str | None, trained: str, tokenizer: PreTrainedTokenizerBase | None
    ) -> QuestionPrompt:
        """Return the prompt of `evaluation.prompt_template`; null is as trained.

        Raises:
            ValueError, FileNotFoundError: there is no such template.
        """
        chosen = name or trained
        if not chosen.endswith(".jinja") and chosen not in BY_NAME:
            raise ValueError(
                f"evaluation.prompt_template is {chosen}; it is one of {', '.join(BY_NAME)}, or a "
                "file that ends with .jinja"
            )
        return cls(chosen, load_template(chosen), chosen == trained, tokenizer)

    @property
    def text(self) -> str:
        """What tells it from other prompts."""
        return self.template.file_text or self.name

    def ask(self, question: Question) -> str:
        """Return the text up to where the answer begins.

        Raises:
            Unusable: the prompt has no place for this question.
        """
        if self.template.has_turns:
            turns = question.turns or (Turn("user", _joined(question)),)
            assert self.tokenizer is not None, "the chat template is some tokenizer's"
            return self.template.ask([*turns, Turn("assistant", "-")], self.tokenizer).text
        if len(question.turns) > 1:
            raise Unusable(
                f"it has several turns, for which {self.name} has no place; set "
                "evaluation.prompt_template=chat"
            )
        if self.name == "text":
            return _joined(question)
        return "".join(turn.content for turn in self.template.render(self._fields(question))[:-1])

    def _fields(self, question: Question) -> dict[str, Any]:
        """Return the fields of the prompt, from the question and the row's own columns."""
        wanted = [name for name in self.template.required if name != "output"]
        own = {
            **question.columns,
            "question": question.text,
            "instruction": question.text,
            "context": question.context,
            "choices": list(question.choices),
            "category": question.category,
        }
        own.setdefault("input", question.context)
        if len(wanted) == 1:
            own.setdefault(wanted[0], question.text)
        if missing := [name for name in wanted if name not in own]:
            raise Unusable(
                f"{self.name} has the variable {missing[0]}, which is no column of the questions"
            )
        # A row's own system text or history is no part of its question.
        optional = {one: own["input"] if one == "input" else None for one in self.template.optional}
        return {**optional, **{name: own[name] for name in wanted}, "output": "-"}

    def delimiter(self, prompt: str) -> str:
        """Return what stands between a prompt and an answer: nothing where it was trained so."""
        is_joined = self.is_trained or self.template.has_turns or prompt[-1:].isspace()
        return "" if is_joined and self.name != "text" else " "


def _joined(question: Question) -> str:
    return f"{question.context}\n\n{question.text}" if question.context else question.text
