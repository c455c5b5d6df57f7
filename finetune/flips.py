"""Print questions that two models answer differently: `python -m finetune.flips RUN [OTHER]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.escaping import for_terminal
from finetune.problems import Refused, nearest
from finetune.reporting.flips import Flip, Flips, categories, find_flips
from finetune.streams import keep_streams
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.run_names import find_run

DESCRIPTION = """\
Print the questions that a run's tuned model answers otherwise than its base, with the
choices and both answers; of two runs, those that the second one answers otherwise than
the first.

+ a question that is answered better, - one that is answered worse. Each answer's
log-likelihood stands behind its choice. Exit codes: 0 printed, 2 there is nothing to
compare."""
RIGHT_OR_WRONG = ("acc", "exact_match")  # metrics of single questions
SHORTEST = 2000  # characters of a text that are printed, of a longer one its end


@dataclass(frozen=True)
class Part:
    """The flips of one task in one metric, and those of them that are asked for."""

    task: str
    found: Flips
    shown: list[Flip]


def main() -> None:
    """Print the flips of a run."""
    keep_streams()
    args = build_parser().parse_args()
    run, other = RunFolder(args.run), None if args.other is None else RunFolder(args.other)
    try:
        parts = find_parts(run, other, args)
    except Refused as refused:
        print(for_terminal("\n".join(refused.problems)), file=sys.stderr)
        sys.exit(2)
    names = ("base", "tuned") if other is None else (run.name, other.name)
    for part in parts:
        for flip in part.shown:
            print(for_terminal(render(flip)), end="\n\n")
        print(for_terminal(summarise(part, names)))


def find_parts(run: RunFolder, other: RunFolder | None, args: argparse.Namespace) -> list[Part]:
    """Return the flips of each task and metric that is asked for.

    Raises:
        Refused: there is nothing to compare, or no such task, metric or category.
    """
    tasks = find_tasks(run, other, args.task)
    asked = [(task, metric) for task in tasks for metric in find_metrics(run, task, args.metric)]
    found = [(task, find_flips(run, other, task, metric)) for task, metric in asked]
    found = [(task, flips) for task, flips in found if flips.total]
    if not found:
        second = "its base" if other is None else other.name
        named = ", ".join(tasks)
        raise Refused([f"{run.name} and {second} have no answers to {named} in common"])
    known = list(dict.fromkeys(name for _, one in found for name in categories(one.flips)))
    if args.category is not None and args.category not in known:
        named = nearest(args.category, known) if known else "no flip has a category"
        raise Refused([f"no flip of the category {args.category!r}; {named}"])
    return [Part(task, flips, select(flips.flips, args)) for task, flips in found]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.flips", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", type=find_run, help="a run's folder, or its id")
    parser.add_argument("other", type=find_run, nargs="?", help="another run's folder, or its id")
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--gained", action="store_true", help="only questions answered better")
    side.add_argument("--lost", action="store_true", help="only questions answered worse")
    parser.add_argument("--category", metavar="X", help="only questions of this category")
    parser.add_argument("--task", help="of several tasks (default: all)")
    parser.add_argument(
        "--metric", help="whose outcome counts (default: acc and exact_match, else the first one)"
    )
    return parser


def find_tasks(run: RunFolder, other: RunFolder | None, asked: str | None) -> list[str]:
    """Return the tasks to compare in, in the order in which the run was scored on them.

    Raises:
        Refused: a folder is not a run's, or was not scored on it.
    """
    for one in (run, other) if other else (run,):
        assert one is not None
        settings = one.read_settings()
        known = one.scored_tasks()
        if not known:
            raise Refused([f"{one.path} has no scores yet; repeat the command that made the run"])
        if asked is not None and asked not in known:
            raise Refused([f"{one.name} has no task {asked!r}; {nearest(asked, known)}"])
    order = list((settings.get("evaluation") or {}).get("tasks") or [])
    reported = [task for task in run.scored_tasks() if not task.endswith(".select")]
    reported.sort(key=lambda task: order.index(task) if task in order else len(order))
    return reported if asked is None else [asked]


def find_metrics(run: RunFolder, task: str, asked: str | None) -> list[str]:
    """Return the metrics whose outcomes are compared: by default those that are right or wrong.

    Raises:
        Refused: the task has no such metric.
    """
    scores = run.read_scores(task)
    known = [] if scores is None else list(scores.definitions)
    if not known:
        raise Refused([f"the scores of {task} in {run.path} cannot be read"])
    if asked is not None and asked not in known:
        raise Refused([f"{task} has no metric {asked!r}; {nearest(asked, known)}"])
    if asked is not None:
        return [asked]
    return [name for name in known if name in RIGHT_OR_WRONG] or known[:1]


def select(flips: Sequence[Flip], args: argparse.Namespace) -> list[Flip]:
    """Return the flips that are asked for."""
    return [
        flip
        for flip in flips
        if (args.category is None or flip.category == args.category)
        and not (args.gained and not flip.gained)
        and not (args.lost and flip.gained)
    ]


def render(flip: Flip) -> str:
    """Return a flip as lines: the question, and for each choice or text who said it."""
    heading = " ".join(filter(None, (f"[{flip.category}]" if flip.category else "", flip.id)))
    lines = [f"{'+' if flip.gained else '-'} {heading}".rstrip()]
    lines += _indent(flip.question or "(its text is not kept: evaluation.keep_texts)")
    if not flip.choices:
        lines += _labelled("right:", flip.right)
        lines += _labelled("before:", flip.pick(flip.before))
        lines += _labelled("after:", flip.pick(flip.after))
        return "\n".join(lines)
    said = [_likelihoods(answer.said, len(flip.choices)) for answer in (flip.before, flip.after)]
    for place, choice in enumerate(flip.choices):
        marks = [
            "right" if place == flip.gold else "",
            "before" if choice == flip.pick(flip.before) else "",
            "after" if choice == flip.pick(flip.after) else "",
        ]
        numbers = "  ".join(one[place] for one in said)
        lines.append(f"    {numbers}  {choice}  {' '.join(filter(None, marks))}".rstrip())
    return "\n".join(lines)


def _likelihoods(said: object, count: int) -> list[str]:
    values = said if isinstance(said, list) and len(said) == count else [None] * count
    return [" " * 8 if value is None else f"{value:8.2f}" for value in values]


def _labelled(label: str, text: str) -> list[str]:
    first, *rest = _indent(text or "(nothing)")
    return [f"    {label:8}{first.strip()}", *rest]


def _indent(text: str) -> list[str]:
    shown = text if len(text) <= SHORTEST else f"...{text[-SHORTEST:]}"
    return [f"    {line}" for line in shown.strip().splitlines()] or ["    "]


def summarise(part: Part, names: tuple[str, str]) -> str:
    """Return a line on all flips, and how many of them are above."""
    found, shown = part.found, len(part.shown)
    lost = len(found.flips) - found.gained
    line = (
        f"{part.task}/{found.metric}, {names[0]} -> {names[1]}: {found.gained} gained and {lost} "
        f"lost of {found.total} questions"
    )
    return line if shown == len(found.flips) else f"{line}; {shown} shown"


if __name__ == "__main__":
    main()
