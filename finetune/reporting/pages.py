"""A sweep's report in its folder: results.csv, report.md, report.html and their figures.

Everything is read from the runs' files, so it can be written again at any time.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.files import write_atomic
from finetune.reporting.category_tables import build_category_tables
from finetune.reporting.effects import find_edges
from finetune.reporting.flip_lists import list_flips
from finetune.reporting.rendering import build_pages
from finetune.reporting.results import Results, read_results, write_csv
from finetune.reporting.score_tables import build_score_table, build_summary, describe_methods
from finetune.reporting.seeds import compare_all_seeds
from finetune.reporting.verdict import describe_choice, verdict
from finetune.tracking.run_folder import RunFolder


def write_report(folder: Path) -> Results:
    """Write results.csv, figures, report.md and report.html into a sweep's folder.

    Raises:
        ValueError: the folder is not a sweep's.
    """
    from finetune.reporting.charts import build_charts  # Altair and Vega, which take a second
    from finetune.reporting.figures import draw_figures, read_javascript, sized

    results = read_results(folder)
    write_csv(results)
    charts = build_charts(results)
    shown = _content(results) | {
        "figures": draw_figures(charts, folder),
        "specs": [sized(chart.spec, "container") for chart in charts],
        "vega": read_javascript,
    }
    for name in ("report.md", "report.html"):
        pages = build_pages(name)
        pages.filters |= {"cell": _cell}
        page = pages.get_template(f"{name}.j2").render(**shown)
        write_atomic(folder / name, page.rstrip() + "\n")
    return results


def _content(results: Results) -> dict[str, Any]:
    """Return the variables of both pages' templates."""
    rows = results.rows
    return {
        "name": results.record.name,
        "command": f"python -m finetune {shlex.join(results.record.command)}".rstrip()
        + (" --multirun" if results.record.swept else ""),
        "verdict": verdict(results),
        "choice": describe_choice(results),
        "summary": build_summary(results),
        "edges": find_edges(results),
        "tables": [build_score_table(results, metric) for metric in results.metrics],
        "methods": describe_methods(results),
        "seeds": compare_all_seeds(results),
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
        "category_tables": build_category_tables(results),
        "flips": list_flips(results),
        "provenance": _provenance(results.runs),
    }


def _samples(results: Results) -> list[Mapping[str, str]]:
    """Return prompts with the answers of base and best run, where they were recorded."""
    best = results.best_run()
    if best is None:
        return []
    run = next(run for run in results.runs if run.name == best)
    samples: list[Mapping[str, str]] = run.read_json("samples.json") or []
    return samples


def _provenance(runs: list[RunFolder]) -> dict[str, str]:
    """Return versions and hardware; where runs differ, all of their values."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for run in runs:
        environment = run.read_json("environment.json") or {}
        for package, number in (environment.get("versions") or {}).items():
            found[package][str(number)] = None
        for key in ("python", "platform", "threads", "gpu", "git_commit"):
            if environment.get(key) is not None:
                found[key][str(environment[key])] = None
    return {key: ", ".join(values) for key, values in found.items()}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
