"""List runs, or compare two of them: `python -m finetune.runs [RUN OTHER]`."""

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
from finetune.reporting.outcomes import read_answers
from finetune.reporting.results import find_damage
from finetune.reporting.score_tables import NO_DIFFERENCE, show_flips, show_p, show_range
from finetune.reporting.tables import add_row, build_table, print_table
from finetune.reporting.verdict import show_difference
from finetune.statistics.comparison import compare
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import show_score
from finetune.streams import keep_streams
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.score_files import MetricScore


def main() -> None:
    """List the runs of a folder, or compare two; exit code 2 where there is none."""
    keep_streams()
    parser = argparse.ArgumentParser(prog="python -m finetune.runs", description=__doc__)
    parser.add_argument("compare", nargs="*", type=Path, help="two runs' folders to compare")
    parser.add_argument(
        "--outputs", type=Path, default=Path(Config.output_dir), help="folder of the runs"
    )
    args = parser.parse_args()
    if args.compare:
        if len(args.compare) != 2:
            parser.error("name two runs to compare, or none to list all")
        runs = [RunFolder(path) for path in args.compare]
        missing = [str(run.path) for run in runs if not is_run(run)]
        if missing:
            names = ", ".join(missing)
            print(f"no run in {names}: config.yaml is missing; name outputs/RUN", file=sys.stderr)
            sys.exit(2)
        print_damage(runs)
        table = render_pair(runs[0], runs[1])
        if not table.row_count and any(find_damage(run) for run in runs):
            print("nothing can be compared: the damaged files are left out", file=sys.stderr)
            sys.exit(1)
        print_table(table)
        return
    places = [RunFolder(path) for path in sorted(args.outputs.glob("*-????????????"))]
    print_damage([run for run in places if run.find_place_problem()])
    found = [run for path in sorted(args.outputs.glob("*")) if is_run(run := RunFolder(path))]
    if not found:
        print(f"no runs in {args.outputs}/; set --outputs FOLDER", file=sys.stderr)
        sys.exit(2)
    print_damage(found)
    print_table(render_list(found))


def is_run(folder: RunFolder) -> bool:
    """Return whether a folder is a run's, even if one of its files is missing."""
    return any((folder.path / name).exists() for name in ("status.json", "config.yaml"))


def print_damage(runs: Sequence[RunFolder]) -> None:
    for line in (line for run in runs for line in find_damage(run)):
        print(for_terminal(line), file=sys.stderr)


def render_list(runs: Sequence[RunFolder]) -> Table:
    """Return a table of runs: state, end time, overrides and scores."""
    table = build_table("run", "state", "ended", "settings", "scores")
    for run in runs:
        status = run.status()
        state: str = status.state if status else "unknown"
        ended = status.ended if status else None
        when = datetime.fromtimestamp(ended).strftime("%m-%d %H:%M") if ended else ""
        add_row(table, run.name, state, when, " ".join(run.read_overrides()), _scores(run))
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
