"""Gold answers that no output of a model can match: their questions would always score 0.0.

A generated answer goes through a task's filters before it is compared; a gold answer that no
filter can extract is never matched. A choice's gold answer must be one of the choices.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.api.task import Task

from finetune.config.schema import EvaluationConfig

EXACT_SETTINGS = ("regexes_to_ignore", "ignore_case", "ignore_punctuation", "ignore_numbers")
# Filters that leave each answer's text as it is, or whose effect on it is known.
PASSED = ("take_first", "take_first_k", "majority_vote")
TRANSFORMS: dict[str, Callable[[str], str]] = {
    "lowercase": str.lower, "uppercase": str.upper, "remove_whitespace": str.strip,
}  # fmt: skip


@dataclass(frozen=True)
class Unmatched:
    """The questions of a task whose gold answers cannot be matched."""

    count: int
    total: int
    first: int  # of these questions, counted from 1
    answer: str  # its gold answer
    wanted: str  # what the task can match

    @property
    def is_all(self) -> bool:
        return self.count == self.total

    def describe(self) -> str:
        return (
            f"{self.count} of {self.total} gold answers cannot be matched and score 0.0 (first: "
            f"question {self.first}, {self.answer!r}; {self.wanted})"
        )


def check_golds(
    members: Mapping[str, Task], name: str, evaluation: EvaluationConfig
) -> Iterator[str]:
    """Yield the gold answers that no output can match, described per task.

    Raises:
        ValueError: no gold answer of a task can be matched; its scores would all be 0.0.
    """
    files = evaluation.data_files.get(name, {})
    for task in members.values():
        found = find_unmatched(task)
        if found is None:
            continue
        split = task.config.test_split or task.config.validation_split
        file = f".{split}={files[split]}" if split in files else ""
        key = f"evaluation.data_files.{name}{file}" if file else f"evaluation.tasks={name}"
        if found.is_all:
            raise ValueError(
                f"{key}: {found.describe()}; write them in the form of the task's own data set"
            )
        yield f"{task.task_name}: {found.describe()}" if len(members) > 1 else found.describe()


def find_unmatched(task: Task) -> Unmatched | None:
    """Return the questions whose gold answers no output can match; None without any."""
    docs = {one.doc_id: one.doc for one in task.instances}
    if callable(task.config.process_results) or not docs:
        return None  # compared by the task's own function
    if task.OUTPUT_TYPE == "multiple_choice":
        wrong = {
            n: gold
            for n, doc in docs.items()
            if not _is_choice(gold := _gold(task, doc), task, doc)
        }
        wanted = "a gold answer must be one of the choices, or its index from 0"
    elif task.OUTPUT_TYPE == "generate_until" and (exact := _exact_settings(task)) is not None:
        filters = task.config.filter_list or []
        golds = {n: _gold(task, doc) for n, doc in docs.items()}
        wrong = {
            n: gold
            for n, gold in golds.items()
            if not _is_met(gold, filters, exact) or _lacks_marker(gold, filters, exact)
        }
        wanted = f"a gold answer must be what {'; '.join(_describe(filters))} can extract"
    else:
        return None
    if not wrong:
        return None
    first = min(wrong)
    text = str(wrong[first])
    return Unmatched(len(wrong), len(docs), first + 1, text[:60] + "..." * (len(text) > 60), wanted)


def _gold(task: Task, doc: Mapping[str, Any]) -> Any:
    """Return a question's gold answer as `process_results` takes it."""
    if task.OUTPUT_TYPE == "multiple_choice" and task.multiple_input:
        return task.doc_to_text(doc)
    gold = task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "generate_until" and task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(doc)
        return choices[gold] if isinstance(gold, int) and gold < len(choices) else None
    return gold


def _is_choice(gold: Any, task: Task, doc: Mapping[str, Any]) -> bool:
    choices = task.doc_to_choice(doc)
    golds = gold if isinstance(gold, list) else [gold]
    return any(
        one in choices
        if isinstance(one, str)
        else isinstance(one, int | float) and 0 <= one < len(choices)
        for one in golds
    )


def _exact_settings(task: Task) -> dict[str, Any] | None:
    """Return the settings of the metric exact_match; None where the task does not use it."""
    for metric in task.config.metric_list or []:
        if metric.get("metric") == "exact_match":
            return {name: metric[name] for name in EXACT_SETTINGS if name in metric}
    return None


def _is_met(gold: Any, filters: Sequence[Mapping[str, Any]], exact: Mapping[str, Any]) -> bool:
    """Return whether any text, through any filter, equals the gold answer, or one of several."""
    golds = [str(one) for one in (gold if isinstance(gold, list | tuple) else [gold])]
    steps = [one["filter"] for one in filters] or [[]]
    return any(
        _yields(candidate, own, one, exact)
        for one in golds
        if one.strip() and gold is not None
        for candidate in _candidates(one, exact)
        for own in steps
    )


def _lacks_marker(
    gold: Any, filters: Sequence[Mapping[str, Any]], exact: Mapping[str, Any]
) -> bool:
    """Return whether a gold answer lacks a marker that a filter looks for and the metric strips.

    GSM8K's answers end in "#### 4": a model that learns from others never writes it.
    """
    golds = gold if isinstance(gold, list | tuple) else [gold]
    ignored = exact.get("regexes_to_ignore") or []
    sought = [
        step.get("regex_pattern", "").partition("(")[0].strip()
        for one in filters
        for step in one["filter"]
    ]
    markers = [one for one in sought if one and any(one in pattern for pattern in ignored)]
    return any(all(marker not in str(one) for one in golds) for marker in markers)


def _candidates(gold: str, exact: Mapping[str, Any]) -> Iterator[str]:
    """Yield texts that exact_match may take for the gold answer."""
    bare = gold
    for pattern in exact.get("regexes_to_ignore") or []:
        bare = re.sub(pattern, "", bare)
    plain = bare.translate(str.maketrans("", "", string.punctuation))
    for text in dict.fromkeys([gold, bare, plain]):
        yield from dict.fromkeys([text, text.strip(), text.lower(), text.upper()])


def _yields(
    text: str, steps: Sequence[Mapping[str, Any]], gold: str, exact: Mapping[str, Any]
) -> bool:
    """Return whether a filter can extract a text that equals the gold answer."""
    for step in steps:
        name = step["function"]
        if name in TRANSFORMS:
            text = TRANSFORMS[name](text)
        elif name == "regex":
            if not _can_extract(step.get("regex_pattern", r"#### (\-?[0-9\.\,]+)"), text):
                return False
        elif name not in PASSED:
            return True  # a filter that is not known here
    compare: Any = exact_match_hf_evaluate  # untyped
    score = compare(predictions=[text], references=[gold], **exact)
    return bool(score["exact_match"] > 0)


def _can_extract(pattern: str, text: str) -> bool:
    """Return whether a regular expression can extract exactly this text from some answer."""
    groups, bare = _split_groups(pattern)
    flags = re.match(r"\(\?[aiLmsux]+\)", pattern)
    prefix = flags[0] if flags else ""
    try:
        return any(
            re.fullmatch(prefix + _split_groups(group)[1].removeprefix(prefix), around) is not None
            for group in groups or [bare]
            for around in (text, f" {text}", f"{text} ")
        )
    except re.error:  # such as a reference to another group
        return True


def _split_groups(pattern: str) -> tuple[list[str], str]:
    """Return the insides of the capturing groups, and the pattern without its lookarounds."""
    groups: list[str] = []
    open_at: list[int] = []
    around: list[tuple[int, int]] = []
    place, in_class = 0, False
    while place < len(pattern):
        sign = pattern[place]
        if sign == "\\":
            place += 1
        elif in_class:
            in_class = sign != "]"
        elif sign == "[":
            in_class = True
            place += pattern[place + 1 : place + 2] == "]"
        elif sign == "(":
            open_at.append(place)
        elif sign == ")" and open_at:
            start = open_at.pop()
            inside = pattern[start + 1 : place]
            if not inside.startswith("?"):
                groups.append(inside)
            elif named := re.match(r"\?P<\w+>", inside):
                groups.append(inside[named.end() :])
            elif inside.startswith(("?=", "?!", "?<=", "?<!")):
                around.append((start, place + 1))
        place += 1
    bare = pattern
    for start, end in sorted(around, reverse=True):
        bare = bare[:start] + bare[end:]
    return groups, bare


def _describe(filters: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield each filter with the expressions that it looks for."""
    for one in filters:
        sought = [step["regex_pattern"] for step in one["filter"] if "regex_pattern" in step]
        yield f"{one['name']} ({', '.join(sought)})" if sought else str(one["name"])
    if not filters:
        yield "a model's text"
