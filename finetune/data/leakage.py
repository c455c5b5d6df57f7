"""Questions that stand in the rows to train on: their scores say what was learned by heart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finetune.data.json_rows import Row
from finetune.data.questions import Question, normalise

WORDS = 5  # a question of as many is found within a longer text; a shorter one as a whole text only


def find_leaks(questions: Sequence[Question], rows: Iterable[Row]) -> list[Question]:
    """Return the questions whose text is one of a row's, or stands in one; compared normalised.

    Args:
        questions: to be asked.
        rows: to train on, all columns and turns of which are searched.
    """
    short: dict[str, list[Question]] = defaultdict(list)
    long: dict[tuple[str, ...], list[tuple[list[str], Question]]] = defaultdict(list)
    for question in questions:
        words = normalise(question.text).split()
        if len(words) < WORDS:
            short[" ".join(words)].append(question)
        else:
            long[tuple(words[:WORDS])].append((words, question))
    found: dict[int, Question] = {}
    for text in (text for row in rows for text in _texts(row)):
        normal = normalise(text)
        for question in short.get(normal, ()):
            found[question.row] = question
        words = normal.split()
        for start in range(len(words) - WORDS + 1) if long else ():
            for wanted, question in long.get(tuple(words[start : start + WORDS]), ()):
                if words[start : start + len(wanted)] == wanted:
                    found[question.row] = question
    return [found[row] for row in sorted(found)]


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts of a row, those of its turns too."""
    match value:
        case str():
            yield value
        case Mapping():
            for one in value.values():
                yield from _texts(one)
        case list():
            for one in value:
                yield from _texts(one)
