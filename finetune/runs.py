"""`python -m finetune.runs`: list runs, or compare any two of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.table import Table

from finetune.comparison import compare
from finetune.results import find_damage, read_sides
from finetune.run_folder import RunFolder
from finetune.streams import keep_streams
from finetune.tables import add_row, build_table, print_table


def main() -> None:
    """List the runs of a folder, or compare two; exit code 2 where there is none."""
    keep_streams()
    parser = argparse.ArgumentParser(prog="python -m finetune.runs", description=__doc__)
    parser.add_argument("compare", nargs="*", type=Path, help="two runs' folders to compare")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where runs lie")
    given = parser.parse_args()
    if given.compare:
        if len(given.compare) != 2:
            parser.error("give two runs to compare, or none to list all")
        runs = [RunFolder(path) for path in given.compare]
        missing = [str(run.path) for run in runs if not is_run(run)]
        if missing:
            print(f"no run in {', '.join(missing)}: config.yaml is missing", file=sys.stderr)
            sys.exit(2)
        tell_damage(runs)
        print_table(render_pair(runs[0], runs[1]))
        return
    found = [run for path in sorted(given.outputs.glob("*")) if is_run(run := RunFolder(path))]
    if not found:
        print(f"no runs in {given.outputs}/", file=sys.stderr)
        sys.exit(2)
    tell_damage(found)
    print_table(render_list(found))


def is_run(folder: RunFolder) -> bool:
    """Return whether a folder is a run's, also where one of its files is lost."""
    return any((folder.path / name).exists() for name in ("status.json", "config.yaml"))


def tell_damage(runs: Sequence[RunFolder]) -> None:
    for line in (line for run in runs for line in find_damage(run)):
        print(line, file=sys.stderr)


def render_list(runs: Sequence[RunFolder]) -> Table:
    """Return a table of runs: state, when, what was set, and scores."""
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
        metrics = run.read_json(f"evaluation/{task}.json")["tuned"]["metrics"]
        shown = [f"{name} {metrics[name]:.4f}" for name in ("acc", "acc_norm") if name in metrics]
        parts.append(f"{task}: {', '.join(shown)}")
    return "; ".join(parts)


def render_pair(one: RunFolder, other: RunFolder) -> Table:
    """Return a table of two runs' scores on the same questions, with what is proven."""
    numbers = (one.name, other.name, "difference", "95 %", "now right / wrong", "p")
    table = build_table("metric", *numbers, right=numbers)
    for task in one.scored_tasks():
        for metric in one.read_json(f"evaluation/{task}.json")["tuned"]["metrics"]:
            first, second = (read_sides(run, task, metric)["tuned"] for run in (one, other))
            name = f"{task}/{metric}"
            if not first or not second:
                continue
            try:
                found = compare({name: (first, second)}).differences[name]
            except ValueError as error:
                add_row(table, name, "", "", str(error), "", "", "")
                continue
            add_row(
                table, name, f"{found.base:.4f}", f"{found.tuned:.4f}", f"{found.value:+.4f}",
                f"{found.low:+.4f} to {found.high:+.4f}", f"{found.gained} / {found.lost}",
                f"{found.p:.4f}",
            )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
