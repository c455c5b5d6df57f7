"""The best run's flips against its base, as a report lists them: bounded in number and length."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from finetune.problems import Refused
from finetune.reporting.flips import Answer, Flip, Flips, find_flips
from finetune.reporting.results import Results
from finetune.statistics.metric_names import MetricName
from finetune.tracking.run_folder import RunFolder

MOST = 50  # flips of each kind, gained and lost, in report.html
LONGEST = 2000  # characters of a question or an answer, of a longer one its end
LONGEST_CHOICE = 300
MOST_CHOICES = 20
MARKER = re.compile(r"\s*#+ [^:]{1,40}:\s*$")  # a line of a prompt that only names a part
SHORT = 120  # characters of a question in one line
CHOICES, TEXTS = ("acc", "acc_norm", "margin"), ("exact_match", "contains", "f1")


@dataclass(frozen=True)
class ListedChoice:
    """One choice of a question: both models' log-likelihoods, and who picked it."""

    text: str
    before: str
    after: str
    marks: str  # of right, base, tuned


@dataclass(frozen=True)
class ListedFlip:
    """One question, as a report shows it."""

    sign: str  # + or -
    id: str
    category: str
    heading: str  # the question in one short line
    question: str
    right: str
    base: str
    tuned: str
    choices: list[ListedChoice] = field(default_factory=list)


@dataclass(frozen=True)
class FlipList:
    """The flips of one kind, gained or lost, of which the first are listed."""

    name: str
    count: int
    flips: list[ListedFlip]
    command: str  # prints all of them

    @property
    def more(self) -> int:
        return self.count - len(self.flips)


@dataclass(frozen=True)
class TaskFlips:
    """The flips of one task in one metric."""

    title: str
    total: int  # questions that both models answered
    kinds: list[FlipList]
    reason: str = ""  # why none are listed, though there are some


@dataclass(frozen=True)
class ReportedFlips:
    """The flips of the best run in all its tasks."""

    run: str
    tasks: list[TaskFlips]

    @property
    def is_searchable(self) -> bool:
        return any(kind.flips for task in self.tasks for kind in task.kinds)


def list_flips(results: Results, most: int = MOST) -> ReportedFlips | None:
    """Return the flips of the best run; None where no run is best, or its base was not scored.

    Args:
        results: of the sweep.
        most: flips of each kind and task.
    """
    run = find_best(results)
    if run is None:
        return None
    tasks = []
    for task in results.record.tasks:
        for metric in find_metrics(results, run, task):
            found = find_flips(run, None, task, metric)
            if found.total:
                tasks.append(_list_task(run, task, found, most))
    label = next(results.label(row) for row in results.rows if row["run"] == run.name)
    return ReportedFlips(label, tasks) if tasks else None


def find_best(results: Results) -> RunFolder | None:
    """Return the folder of the best run; None before any is scored."""
    best = results.best_run()
    return next((run for run in results.runs if run.name == best), None)


def find_metrics(results: Results, run: RunFolder, task: str) -> list[str]:
    """Return the metrics that say of a question whether it was answered right.

    That is the main one where it is the task's, else acc or the first; where some questions have
    choices and others do not, also that of the others.
    """
    scores = run.read_scores(task)
    known = [] if scores is None else list(scores.definitions)
    if not known:
        return []
    main = None if results.main_metric is None else MetricName.parse(results.main_metric)
    first = "acc" if "acc" in known else known[0]
    if main is not None and main.task == task and main.name in known:
        first = main.name
    others = [kind[0] for kind in (CHOICES, TEXTS) if first not in kind]
    return [first, *(name for name in others if name in known)]


def _list_task(run: RunFolder, task: str, found: Flips, most: int) -> TaskFlips:
    title = str(MetricName(task, found.metric))
    reason = _explain_no_texts(run) if found.flips and not _have_texts(found.flips) else ""
    kinds = []
    for name, gained in (("gained", True), ("lost", False)):
        flips = [flip for flip in found.flips if flip.gained == gained]
        listed = [] if reason else [list_flip(flip) for flip in flips[:most]]
        words = ("python", "-m", "finetune.flips", os.path.relpath(run.path), f"--{name}")
        command = shlex.join([*words, "--task", task, "--metric", found.metric])
        kinds.append(FlipList(name, len(flips), listed, command))
    return TaskFlips(title, found.total, kinds, reason)


def _have_texts(flips: Sequence[Flip]) -> bool:
    return any(flip.question for flip in flips)


def _explain_no_texts(run: RunFolder) -> str:
    """Return why the questions of a run have no texts."""
    try:
        settings = run.read_settings().get("evaluation")
    except Refused:
        settings = None
    if isinstance(settings, dict) and settings.get("keep_texts") is False:
        return (
            "evaluation.keep_texts=false kept no texts of questions and answers, and no categories."
        )
    return (
        "The scores were stored without the questions' texts; run the same command again to add "
        "them."
    )


def list_flip(flip: Flip) -> ListedFlip:
    """Return a flip with its texts cut to what a page can hold."""
    return ListedFlip(
        sign="+" if flip.gained else "-",
        id=_cut(flip.id, SHORT),
        category=_cut(flip.category, SHORT),
        heading=_cut(" ".join(_drop_markers(flip.question).split())[-2 * LONGEST :], SHORT),
        question=_keep_end(flip.question.strip(), LONGEST),
        right=_keep_end(flip.right, LONGEST),
        base=_keep_end(flip.pick(flip.before), LONGEST),
        tuned=_keep_end(flip.pick(flip.after), LONGEST),
        choices=list(_list_choices(flip)),
    )


def _drop_markers(question: str) -> str:
    """Return a question without its prompt's headings, such as `### Instruction:`."""
    lines = [line for line in question.splitlines() if not MARKER.match(line)]
    return "\n".join(lines) if any(line.strip() for line in lines) else question


def _list_choices(flip: Flip) -> Iterator[ListedChoice]:
    picked = flip.pick(flip.before), flip.pick(flip.after)
    for place, choice in enumerate(flip.choices[:MOST_CHOICES]):
        marks = [
            "right" if place == flip.gold else "",
            "base" if choice == picked[0] else "",
            "tuned" if choice == picked[1] else "",
        ]
        yield ListedChoice(
            text=_cut(choice, LONGEST_CHOICE),
            before=_show_likelihood(flip.before, place, flip),
            after=_show_likelihood(flip.after, place, flip),
            marks=", ".join(filter(None, marks)),
        )


def _show_likelihood(answer: Answer, place: int, flip: Flip) -> str:
    said = answer.said
    if not isinstance(said, list) or len(said) != len(flip.choices):
        return ""
    return f"{said[place]:.2f}" if isinstance(said[place], int | float) else ""


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _keep_end(text: str, length: int) -> str:
    return text if len(text) <= length else f"...{text[-length:]}"
