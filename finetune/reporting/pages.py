"""A sweep's report in its folder: results.csv, report.md, report.html and their figures.

Everything is read from the runs' files, so it can be written again at any time.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

from finetune.files import write_atomic
from finetune.reporting.category_tables import build_category_tables
from finetune.reporting.costs import build_costs
from finetune.reporting.effects import find_edges
from finetune.reporting.flip_lists import list_flips
from finetune.reporting.glossary import find_terms
from finetune.reporting.links import find_links
from finetune.reporting.rendering import build_pages
from finetune.reporting.results import Results, read_results, write_csv
from finetune.reporting.run_facts import describe_runs
from finetune.reporting.score_tables import build_score_table, build_summary, describe_methods
from finetune.reporting.seeds import compare_all_seeds
from finetune.reporting.settings import find_differences, read_settings
from finetune.reporting.task_verdicts import build_verdicts
from finetune.reporting.verdict import describe_choice, main_verdict, verdict
from finetune.tracking.run_folder import RunFolder

# Terms of charts and notes, beside those of the tables' headings.
ALWAYS_EXPLAINED = (
    "significant", "minimum detectable difference", "share of the variance", "training loss",
    "learning rate", "gradient norm",
)  # fmt: skip
SEEN = ", trained on"  # ends the label of a sample whose row the run has learned from


def write_report(folder: Path) -> Results:
    """Write results.csv, figures, report.md and report.html into a sweep's folder.

    Where the folder has a file vega.js, the page loads that instead of holding the JavaScript.

    Raises:
        ValueError: the folder is not a sweep's.
    """
    from finetune.reporting.charts import build_charts  # Altair and Vega, which take a second
    from finetune.reporting.figures import JAVASCRIPT, draw_figures, read_javascript, sized

    results = read_results(folder)
    write_csv(results)
    charts = build_charts(results)
    settings = read_settings(results)
    differing = find_differences(results, settings)
    shown = _content(results) | {
        "facts": describe_runs(results, settings),
        "charts": charts,
        "figures": draw_figures(charts, folder),
        "differing": differing,
        "page_data": {
            "specs": {chart.name: sized(chart.spec, "container") for chart in charts},
            "settings": differing,
        },
        "javascript_file": JAVASCRIPT if (folder / JAVASCRIPT).is_file() else None,
        "vega": read_javascript,
    }
    for name in ("report.md", "report.html"):
        page = build_pages(name).get_template(f"{name}.j2").render(**shown)
        write_atomic(folder / name, page.rstrip() + "\n")
    return results


def _content(results: Results) -> dict[str, Any]:
    """Return the variables of both pages' templates that need no chart and no setting."""
    tables = [build_score_table(results, metric) for metric in results.metrics]
    summary, costs, verdicts = build_summary(results), build_costs(results), build_verdicts(results)
    headings = [*summary.columns, *costs.columns, *(verdicts.columns if verdicts else [])]
    headings += [column for table in tables for column in table.columns]
    return {
        "name": results.record.name,
        "command": f"python -m finetune {shlex.join(results.record.command)}".rstrip()
        + (" --multirun" if results.record.swept else ""),
        "headline": main_verdict(results),
        "verdict": verdict(results),
        "verdicts": verdicts,
        "choice": describe_choice(results),
        "summary": summary,
        "edges": find_edges(results),
        "tables": tables,
        "costs": costs,
        "links": find_links(results),
        "methods": describe_methods(results),
        "seeds": compare_all_seeds(results),
        "rows": results.rows,
        "failed": [
            row for row in results.rows if row["status"] in ("failed", "diverged", "interrupted")
        ],
        "waiting": [row for row in results.rows if row["status"] in ("pending", "running")],
        "last_lines": {
            run.name: status.last_lines for run in results.runs if (status := run.status())
        },
        "remarks": results.remarks,
        "label": results.label,
        "samples": _samples(results),
        "category_tables": build_category_tables(results),
        "flips": list_flips(results),
        "provenance": _provenance(results.runs),
        "terms": find_terms([*ALWAYS_EXPLAINED, *headings]),
    }


def _samples(results: Results) -> list[dict[str, Any]]:
    """Return prompts with the answers of base and best run; rows that it has not seen first."""
    best = results.best_run()
    if best is None:
        return []
    run = next(run for run in results.runs if run.name == best)
    samples = [{"row": "", **one} for one in run.read_json("samples.json") or []]
    for one in samples:
        one["is_unseen"] = bool(one["row"]) and not one["row"].endswith(SEEN)
    return sorted(samples, key=lambda one: not one["is_unseen"])


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
