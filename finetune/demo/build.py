"""`python -m finetune.demo.build`: write the rows and the questions from the tables of facts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.demo.facts import TOPICS, Topic

FOLDER = Path(__file__).parent
SEED = 20261124
NUM_CHOICES = 4


def build_rows() -> list[dict[str, str]]:
    """Return the Alpaca-style rows that teach every taught fact in several phrasings."""
    rows = [row for topic in TOPICS for row in _lessons(topic)]
    random.Random(SEED).shuffle(rows)
    return rows


def _lessons(topic: Topic) -> Iterator[dict[str, str]]:
    for subject, answer in topic.taught.items():
        for instruction, given, output in topic.lessons:
            yield {
                "instruction": instruction.format(s=subject, a=answer),
                "input": given.format(s=subject, a=answer),
                "output": answer if output == "{a}" else _sentence(output, subject, answer),
            }


def build_questions() -> list[dict[str, Any]]:
    """Return the multiple-choice questions, on taught and on control facts alike.

    A question's distractors are answers of its own topic and half, so that having seen an answer
    in training gives no hint.
    """
    rng = random.Random(SEED)
    questions = []
    for topic in TOPICS:
        for is_taught, facts in ((True, topic.taught), (False, topic.control)):
            for subject in facts:
                questions.append(_question(topic, facts, subject, is_taught, rng))
    rng.shuffle(questions)
    return [_place_answer(question, i % NUM_CHOICES) for i, question in enumerate(questions)]


def _question(
    topic: Topic, facts: dict[str, str], subject: str, is_taught: bool, rng: random.Random
) -> dict[str, Any]:
    choices = {s: topic.answer.format(s=s, a=a) for s, a in facts.items()}
    right = choices[subject]
    others = sorted(set(choices.values()) - {right}, key=lambda c: (abs(len(c) - len(right)), c))
    return {
        "id": f"{topic.name}-{'taught' if is_taught else 'control'}-{subject}",
        "question": topic.question.format(s=subject, a=facts[subject]),
        "choices": [right, *rng.sample(others[: 2 * NUM_CHOICES], NUM_CHOICES - 1)],
        "taught": is_taught,
    }


def _place_answer(question: dict[str, Any], place: int) -> dict[str, Any]:
    right, *others = question["choices"]
    return {**question, "choices": [*others[:place], right, *others[place:]], "answer": place}


def _sentence(output: str, subject: str, answer: str) -> str:
    text = output.format(s=subject, a=answer)
    return text[0].upper() + text[1:]


def render(records: list[dict[str, Any]]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main() -> None:
    """Write rows.jsonl and questions.jsonl beside this file."""
    for name, records in (("rows", build_rows()), ("questions", build_questions())):
        (FOLDER / f"{name}.jsonl").write_text(render(list(records)), encoding="utf-8")
        print(f"{name}.jsonl: {len(records)}")


if __name__ == "__main__":
    main()
