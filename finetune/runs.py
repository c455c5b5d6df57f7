"""`python -m finetune.runs`: list runs, or compare any two of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import yaml
from rich.table import Table

from finetune.comparison import compare
from finetune.results import read_sides
from finetune.run_folder import RunFolder
from finetune.tables import add_row, build_table, print_table


def main() -> None:
    """List the runs of a folder, or compare two; exit code 2 where there is none."""
    parser = argparse.ArgumentParser(prog="python -m finetune.runs", description=__doc__)
    parser.add_argument("compare", nargs="*", type=Path, help="two runs' folders to compare")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where runs lie")
    given = parser.parse_args()
    if given.compare:
        if len(given.compare) != 2:
            parser.error("give two runs to compare, or none to list all")
        runs = [RunFolder(path) for path in given.compare]
        missing = [str(run.path) for run in runs if run.status() is None]
        if missing:
            print(f"no run in {', '.join(missing)}: status.json is missing", file=sys.stderr)
            sys.exit(2)
        print_table(render_pair(runs[0], runs[1]))
        return
    found = [RunFolder(path.parent) for path in sorted(given.outputs.glob("*/status.json"))]
    if not found:
        print(f"no runs in {given.outputs}/", file=sys.stderr)
        sys.exit(2)
    print_table(render_list(found))


def render_list(runs: Sequence[RunFolder]) -> Table:
    """Return a table of runs: state, when, what was set, and scores."""
    table = build_table("run", "state", "ended", "settings", "scores")
    for run in runs:
        status = run.status()
        assert status is not None, "the list is of folders with a status"
        ended = datetime.fromtimestamp(status.ended).strftime("%m-%d %H:%M") if status.ended else ""
        settings = " ".join(map(str, _overrides(run)))
        add_row(table, run.name, status.state, ended, settings, _scores(run))
    return table


def _overrides(run: RunFolder) -> list[str]:
    path = run.path / "overrides.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) or [] if path.exists() else []


def _scores(run: RunFolder) -> str:
    parts = []
    for path in sorted(run.evaluation.glob("*.json")):
        metrics = (run.read_json(f"evaluation/{path.name}") or {})["tuned"]["metrics"]
        shown = [f"{name} {metrics[name]:.4f}" for name in ("acc", "acc_norm") if name in metrics]
        parts.append(f"{path.stem}: {', '.join(shown)}")
    return "; ".join(parts)


def render_pair(one: RunFolder, other: RunFolder) -> Table:
    """Return a table of two runs' scores on the same questions, with what is proven."""
    numbers = (one.name, other.name, "difference", "95 %", "now right / wrong", "p")
    table = build_table("metric", *numbers, right=numbers)
    for path in sorted(one.evaluation.glob("*.json")):
        for metric in (one.read_json(f"evaluation/{path.name}") or {})["tuned"]["metrics"]:
            first, second = (read_sides(run, path.stem, metric)["tuned"] for run in (one, other))
            name = f"{path.stem}/{metric}"
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
