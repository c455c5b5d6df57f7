"""List runs, compare two of them, or watch a sweep: `python -m finetune.runs [RUN OTHER]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from math import isclose
from pathlib import Path

from rich.table import Table

from finetune.config.schema import Config
from finetune.escaping import for_terminal
from finetune.problems import Refused
from finetune.reporting.outcomes import read_answers
from finetune.reporting.results import find_damage
from finetune.reporting.score_tables import NO_DIFFERENCE, show_flips, show_p, show_range
from finetune.reporting.tables import add_row, build_table, print_table
from finetune.reporting.verdict import show_difference
from finetune.statistics.comparison import compare
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import show_score
from finetune.streams import keep_streams
from finetune.sweeps.live import LOST, FindRuns
from finetune.sweeps.watching import find_sweep, runs_of_folder, runs_of_sweep, watch
from finetune.tracking.progress import find_state, read_place
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.score_files import MetricScore

DESCRIPTION = """\
List all runs, with the worker and the host that ran each; compare two of them; or watch
a sweep from a second terminal, whichever machines run it.

States: waiting, running, trained (waits for its score), scoring, finished, failed,
diverged, interrupted, and lost: nobody works on the run any longer, since its process
has ended on this machine, or has not renewed its claim for 90 s under --watch. The
command that made a run resumes it. --watch ends when all runs are finished, failed or
diverged, or at Ctrl-C, with exit code 0; where the output is no terminal it prints a
line for each change."""
PLACE = ("worker", "host")  # columns


def main() -> None:
    """List the runs of a folder, compare two, or watch a sweep; exit code 2 where there is none."""
    keep_streams()
    args = build_parser().parse_args()
    try:
        if args.watch is not None:
            watch(find_watched(args.watch, args.outputs))
        elif args.compare:
            compare_two([RunFolder(path) for path in args.compare])
        else:
            list_runs(args.outputs or Path(Config.output_dir))
    except (Refused, ValueError) as error:
        problems = error.problems if isinstance(error, Refused) else [str(error)]
        print(for_terminal("\n".join(problems)), file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.runs", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("compare", nargs="*", type=Path, help="two runs' folders to compare")
    parser.add_argument(
        "--outputs", type=Path, help=f"folder of the runs (default: {Config.output_dir})"
    )
    parser.add_argument(
        "--watch", nargs="?", const="", metavar="SWEEP",
        help="show a sweep's runs live: its folder or its name (default: the newest one in "
        f"{Config.report_dir}; with --outputs, or without any sweep, all runs in that folder)",
    )  # fmt: skip
    return parser


def find_watched(sweep: str, outputs: Path | None) -> FindRuns:
    """Return what finds the runs to watch.

    Raises:
        Refused: there is no such sweep, or no run.
    """
    if sweep or outputs is None:
        folder = find_sweep(sweep, Path(Config.report_dir))
        if folder is not None:
            return runs_of_sweep(folder)
    outputs = outputs or Path(Config.output_dir)
    find = runs_of_folder(outputs, is_run)
    if not find():
        raise Refused([f"no sweep in {Config.report_dir}/, and no runs in {outputs}/, to watch"])
    return find


def compare_two(runs: Sequence[RunFolder]) -> None:
    """Print the comparison of two runs; exit code 1 where damage leaves nothing to compare.

    Raises:
        Refused: these are not two runs.
    """
    if len(runs) != 2:
        raise Refused(["name two runs to compare, or none to list all"])
    missing = [str(run.path) for run in runs if not is_run(run)]
    if missing:
        names = ", ".join(missing)
        raise Refused([f"no run in {names}: config.yaml is missing; name outputs/RUN"])
    print_damage(runs)
    table = render_pair(runs[0], runs[1])
    if not table.row_count and any(find_damage(run) for run in runs):
        print("nothing can be compared: the damaged files are left out", file=sys.stderr)
        sys.exit(1)
    print_table(table)


def list_runs(outputs: Path) -> None:
    """Print all runs of a folder.

    Raises:
        Refused: there is none.
    """
    places = [RunFolder(path) for path in sorted(outputs.glob("*-????????????"))]
    print_damage([run for run in places if run.find_place_problem()])
    found = [run for path in sorted(outputs.glob("*")) if is_run(run := RunFolder(path))]
    if not found:
        raise Refused([f"no runs in {outputs}/; set --outputs FOLDER"])
    print_damage(found)
    print_table(render_list(found))
    if any(find_state(run) == "lost" for run in found):
        print(LOST, file=sys.stderr)


def is_run(folder: RunFolder) -> bool:
    """Return whether a folder is a run's, even if one of its files is missing."""
    return any((folder.path / name).exists() for name in ("status.json", "config.yaml"))


def print_damage(runs: Sequence[RunFolder]) -> None:
    for line in (line for run in runs for line in find_damage(run)):
        print(for_terminal(line), file=sys.stderr)


def render_list(runs: Sequence[RunFolder]) -> Table:
    """Return a table of runs: state, worker and host, end time, overrides and scores.

    Worker and host have a column where any run has recorded one.
    """
    places = [read_place(run) for run in runs]
    columns = [n for n, _ in enumerate(PLACE) if any(place[n] for place in places)]
    table = build_table("run", "state", *(PLACE[n] for n in columns), "ended", "settings", "scores")
    for run, place in zip(runs, places, strict=True):
        status, where = run.status(), [place[n] for n in columns]
        ended = status.ended if status else None
        when = datetime.fromtimestamp(ended).strftime("%m-%d %H:%M") if ended else ""
        settings = " ".join(run.read_overrides())
        add_row(table, run.name, find_state(run), *where, when, settings, _scores(run))
    return table


def _scores(run: RunFolder) -> str:
    parts = []
    for task in run.scored_tasks():
        scores = run.read_scores(task)
        metrics = scores.tuned.metrics if scores else {}
        shown = [f"{name} {show_score(metric.value)}" for name, metric in metrics.items()]
        parts.append(f"{task}: {', '.join(shown)}")
    return "; ".join(parts)


def render_pair(one: RunFolder, other: RunFolder) -> Table:
    """Return a table of two runs' scores on the same questions: difference, interval and p."""
    numbers = (one.name, other.name, "difference", "95 %", "gained / lost", "p")
    table = build_table("metric", *numbers, right=numbers)
    for task in one.scored_tasks():
        first, second = one.read_scores(task), other.read_scores(task)
        if first is None or second is None:
            continue
        for name, score in first.tuned.metrics.items():
            if name in second.tuned.metrics:
                metric, scores = MetricName(task, name), (score, second.tuned.metrics[name])
                if cells := _pair_cells(one, other, metric, scores):
                    add_row(table, str(metric), *cells)
    return table


def _pair_cells(
    one: RunFolder, other: RunFolder, metric: MetricName, scores: tuple[MetricScore, MetricScore]
) -> list[str]:
    """Return the cells of a metric's row; none where a run's outcomes are not stored."""
    first, second = (read_answers(run, metric.task, metric.name) for run in (one, other))
    if not (first.tuned and second.tuned):
        return []
    values, definition = [score.value for score in scores], scores[0].definition
    plain = [*map(show_score, values), f"{values[1] - values[0]:+.4g}"]
    if scores[1].definition != definition:
        return [*plain[:2], "the runs define this metric differently", "", "", ""]
    if not definition.is_known:
        return [*plain, "", "", ""]  # only a run and its base are resampled at scoring
    try:
        pairs = {other.name: (first.tuned, second.tuned)}
        comparison = compare(pairs, definition, first.members)
    except ValueError as error:
        return ["", "", str(error), "", "", ""]
    found = comparison.differences[other.name]
    if not isclose(found.base, values[0], rel_tol=1e-6, abs_tol=1e-9):
        return [*plain, "", "", ""]  # scored by an older version, without its outcomes
    if not found.changed:
        return [*plain[:2], NO_DIFFERENCE, "", "", ""]
    interval, flips = show_range(found, comparison), show_flips(found)
    return [
        *plain[:2], show_difference(found.value, comparison), interval, flips, show_p(found.p)
    ]  # fmt: skip


if __name__ == "__main__":
    main()
