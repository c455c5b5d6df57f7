"""A sweep's report, `python -m finetune.report FOLDER`: results.csv, report.md, report.html.

Everything comes from the files that the runs left, so it can be written again at any time.
"""

from __future__ import annotations

import base64
import logging
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.comparison import LEVEL, Difference, SeedDifference, compare_seeds
from finetune.pages import build_pages
from finetune.results import VALIDATION, Results, read_outcomes, read_results, write_csv
from finetune.run_folder import RunFolder, write_atomic
from finetune.streams import keep_streams

log = logging.getLogger("finetune")

SEED_KEYS = ("training.seed", "training.data_seed")


@dataclass(frozen=True)
class Line:
    """One run in the table of a metric."""

    label: str
    run: str
    difference: Difference
    chooses: float | None = None  # the score on the questions that choose the best run


def write_report(folder: Path) -> Results:
    """Write all that a report consists of into a sweep's folder.

    Raises:
        ValueError: the folder is not a sweep's.
    """
    from finetune.figures import draw_figures

    results = read_results(folder)
    write_csv(results)
    figures = draw_figures(results)
    shown = _content(results)
    links = {caption: f"figures/{path.name}" for caption, path in figures.items()}
    embedded = {
        caption: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        for caption, path in figures.items()
    }
    for name, images in (("report.md", links), ("report.html", embedded)):
        pages = build_pages(name)
        pages.filters |= {"points": _points, "p_cell": _p_cell, "cell": _cell}
        page = pages.get_template(f"{name}.j2").render(**shown, figures=images)
        write_atomic(folder / name, page.rstrip() + "\n")
    return results


def _content(results: Results) -> dict[str, Any]:
    """Gather what both pages show."""
    rows = results.rows
    return {
        "name": results.record.name,
        "command": f"python -m finetune {shlex.join(results.record.command)}".rstrip()
        + (" --multirun" if results.record.swept else ""),
        "verdict": verdict(results),
        "swept": results.record.swept,
        "tables": {metric: _lines(results, metric) for metric in results.comparisons},
        "comparisons": results.comparisons,
        "seeds": _seeds(results),
        "rows": rows,
        "is_validated": bool(results.validated_rows()),
        "failed": [row for row in rows if row["status"] in ("failed", "diverged", "interrupted")],
        "waiting": [row for row in rows if row["status"] in ("pending", "running")],
        "last_lines": {
            run.name: status.last_lines for run in results.runs if (status := run.status())
        },
        "remarks": results.remarks,
        "label": results.label,
        "samples": _samples(results),
        "provenance": _provenance(results.runs),
    }


def verdict(results: Results) -> str:
    """Say in two sentences what the sweep has shown, and no more than it has."""
    metric = results.main_metric
    if metric is None:
        return _verdict_on_validation(results)
    comparison = results.comparisons[metric]
    lines = {line.run: line for line in _lines(results, metric)}
    best = lines[results.best_run() or comparison.best()]
    found = best.difference
    grid = len(comparison.differences)
    if results.selects and grid > 1:
        return _verdict_on_chosen(best, metric, grid, comparison.detectable)
    proven = sum(line.difference.is_proven and line.difference.value > 0 for line in lines.values())
    interval = f"[{_points(found.low)}, {_points(found.high)}]"
    tested = f"{_p_value(found.p_adjusted)}, adjusted for {grid} {'run' if grid == 1 else 'runs'}"
    if found.is_proven and found.value > 0:
        first = (
            f"{best.label} scores {found.tuned:.4f} in {metric}, {_points(found.value)} points "
            f"{interval} from the base's {found.base:.4f} ({tested})."
        )
        chosen = (
            f"{proven} of {grid} runs are proven better than the base; the best was picked on the "
            "questions it is reported on, so expect a little less of it."
        )
        return f"{first} {chosen}" if grid > 1 else f"{first} {_detectable(comparison.detectable)}"
    first = (
        f"No run is proven better than the base in {metric}: the best, {best.label}, differs by "
        f"{_points(found.value)} points {interval} ({tested})."
    )
    return f"{first} {_detectable(comparison.detectable)}"


def _verdict_on_validation(results: Results) -> str:
    """Say which run has the lowest validation loss, where no task is scored."""
    validated = results.validated_rows()
    if not validated:
        return "No run has been scored beside its base yet, so there is nothing to compare."
    lowest = next(row for row in validated if row["run"] == results.best_run())
    of = f", of {len(validated)} runs" if len(validated) > 1 else ""
    return (
        f"{results.label(lowest)} has the lowest validation loss, {lowest[VALIDATION]:.4f}{of}. "
        "No task compares the runs with their base, so nothing is claimed."
    )


def _verdict_on_chosen(best: Line, metric: str, grid: int, detectable: float) -> str:
    """Say what the run came to that was chosen on other questions than it is reported on.

    It is the only run that is tested, so its own p needs no adjustment for the grid.
    """
    found = best.difference
    told = (
        f"{_points(found.value)} points [{_points(found.low)}, {_points(found.high)}] from the "
        f"base's {found.base:.4f} ({_p_value(found.p)})"
    )
    if found.p < LEVEL and found.value > 0:
        claim = f"{best.label} scores {found.tuned:.4f} in {metric}, {told}."
    else:
        claim = f"No improvement is proven in {metric}: {best.label} differs by {told}."
    return f"{claim} It was chosen from {grid} runs on other questions. {_detectable(detectable)}"


def _detectable(value: float) -> str:
    if value == 0:
        return "Not one answer differs from the base's."
    return f"Differences from {value * 100:.1f} points on would have been seen in 4 of 5 cases."


def _lines(results: Results, metric: str) -> list[Line]:
    differences = results.comparisons[metric].differences
    selects = results.selects if metric == results.main_metric else None
    return [
        Line(
            results.label(row),
            row["run"],
            differences[row["run"]],
            row[selects] if selects else None,
        )
        for row in results.rows
        if row["run"] in differences
    ]


def _seeds(results: Results) -> dict[str, SeedDifference]:
    """Compare settings over their seeds, where seeds were swept."""
    metric = results.main_metric
    keys = [key for key in results.record.swept if key not in SEED_KEYS]
    if metric is None or len(keys) == len(results.record.swept):
        return {}
    task, name = metric.rsplit("/", 1)
    settings: dict[str, list[RunFolder]] = defaultdict(list)
    for run, row in zip(results.runs, results.rows, strict=True):
        if row["run"] in results.comparisons[metric].differences:
            settings[", ".join(f"{key}={row[key]}" for key in keys) or "all seeds"].append(run)
    found = {}
    for label, runs in settings.items():
        pairs = [pair for run in runs if (pair := read_outcomes(run, task, name)) is not None]
        if len(pairs) > 1:
            found[label] = compare_seeds(pairs[0][0], [tuned for _, tuned in pairs])
    return found


def _samples(results: Results) -> list[Mapping[str, str]]:
    """Return prompts with the answers of base and best run, where they were recorded."""
    best = results.best_run()
    if best is None:
        return []
    run = next(run for run in results.runs if run.name == best)
    samples: list[Mapping[str, str]] = run.read_json("samples.json") or []
    return samples


def _provenance(runs: list[RunFolder]) -> dict[str, str]:
    """Return what was compared and where: the same for all runs, or said where it is not."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for run in runs:
        environment = run.read_json("environment.json") or {}
        for package, number in (environment.get("versions") or {}).items():
            found[package][str(number)] = None
        for key in ("python", "platform", "threads", "gpu", "git_commit"):
            if environment.get(key) is not None:
                found[key][str(environment[key])] = None
    return {key: ", ".join(values) for key, values in found.items()}


def _points(value: float) -> str:
    return f"{value * 100:+.1f}"


def _p_value(value: float) -> str:
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".", 1)


def _p_cell(value: float) -> str:
    return "< .0001" if value < 0.0001 else f"{value:.4f}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Write the report of the folder given on the command line."""
    keep_streams()
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m finetune.report multirun_reports/SWEEP", file=sys.stderr)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    try:
        results = write_report(Path(sys.argv[1]))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(verdict(results))
    print(f"written: {results.folder / 'report.html'}, report.md, results.csv, figures/")


if __name__ == "__main__":
    main()
