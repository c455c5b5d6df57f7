"""Questions whose outcome differs between two models, with what was asked and answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.statistics.metrics import AGGREGATES, Metric, guess_metric
from finetune.tracking.items import describe_gold, find_category, find_choices, pick
from finetune.tracking.run_folder import RunFolder

Key = tuple[str, str, str, int]  # task in a group, hashes of question and prompt, how-manieth


@dataclass(frozen=True)
class Answer:
    """One model's answer to a question."""

    outcome: float
    said: Any = None  # each choice's log-likelihood, or the generated text


@dataclass(frozen=True)
class Flip:
    """A question that two models answered with different outcomes."""

    question: str  # empty where texts are not kept
    before: Answer
    after: Answer
    gained: bool  # whether the later one is the better
    choices: Sequence[str] = ()
    gold: Any = None  # index of the right choice, or accepted text or texts
    category: str = ""
    id: str = ""

    def pick(self, answer: Answer) -> str:
        """Return what a model answered: its likeliest choice, or its text."""
        return pick(self.choices, answer.said)

    @property
    def right(self) -> str:
        """The right choice, or what is accepted."""
        return describe_gold(self.choices, self.gold)


@dataclass(frozen=True)
class Flips:
    """The flips of one task in one metric, and of how many questions."""

    metric: str
    total: int
    flips: list[Flip] = field(default_factory=list)

    @property
    def gained(self) -> int:
        return sum(flip.gained for flip in self.flips)


def find_flips(run: RunFolder, other: RunFolder | None, task: str, metric: str) -> Flips:
    """Return the questions that a run's tuned model answers otherwise than its base, or another's.

    Args:
        run: the earlier one; alone, it is its base against its tuned model.
        other: the later one, whose tuned model is compared with the first run's.
        task: as it names the file of its outcomes.
        metric: whose outcome counts, such as acc.
    """
    kind = find_metric(run, task, metric)
    first = _keyed(run.read_items(task))
    second = first if other is None else _keyed(other.read_items(task))
    sides = ("base", "tuned") if other is None else ("tuned", "tuned")
    total, flips = 0, []
    for key, item in first.items():
        pair = [
            _answer(items.get(key, {}), side, metric, kind)
            for items, side in zip((first, second), sides, strict=True)
        ]
        before, after = pair
        if before is None or after is None:
            continue
        total += 1
        if before.outcome != after.outcome:
            rises = after.outcome > before.outcome
            gained = rises == (kind.higher_is_better is not False)
            flips.append(_flip({**second.get(key, {}), **item}, before, after, gained=gained))
    return Flips(metric, total, flips)


def find_metric(run: RunFolder, task: str, metric: str) -> Metric:
    """Return the definition of a metric of a run's task."""
    scores = run.read_scores(task)
    found = None if scores is None else scores.definitions.get(metric)
    return found or guess_metric(metric)


def _keyed(items: Sequence[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    found: dict[Key, Mapping[str, Any]] = {}
    for item in items:
        name, number = (str(item.get("task", "")), item["hash"], item["prompt"]), 1
        while (*name, number) in found:  # the same question may be asked twice
            number += 1
        found[*name, number] = item
    return found


def _answer(item: Mapping[str, Any], side: str, metric: str, kind: Metric) -> Answer | None:
    """Return one side's answer; its outcome is the question's own score, which the metric has."""
    value = item.get(side, {}).get(metric)
    if value is None:
        return None
    try:
        (outcome,) = AGGREGATES[kind.aggregation].scores([value])
    except (KeyError, TypeError, ValueError, IndexError):  # only lm-eval computes it
        return None
    said = item.get("said")
    return Answer(float(outcome), said.get(side) if isinstance(said, Mapping) else None)


def _flip(item: Mapping[str, Any], before: Answer, after: Answer, *, gained: bool) -> Flip:
    return Flip(
        question=str(item.get("question", "")),
        before=before,
        after=after,
        gained=gained,
        choices=find_choices(item),
        gold=item.get("gold"),
        category=find_category(item),
        id=str(item.get("id", "")),
    )


def categories(flips: Sequence[Flip]) -> Iterator[str]:
    """Yield the categories of flips, each once."""
    yield from dict.fromkeys(flip.category for flip in flips if flip.category)
