"""What a sweep came to, read from its runs' folders: `results.csv` and the table on screen."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finetune.runs import RunFolder, write_atomic

COSTS = ("train_seconds", "tokens_per_second", "peak_memory_gib", "num_trainable_parameters")
MAIN_METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Entry:
    """One run of a sweep: its folder, its place in the grid, and its MLflow run."""

    folder: RunFolder
    swept: Mapping[str, str]
    mlflow_run_id: str | None = None


Result = dict[str, Any]  # one row of results.csv


def read_result(entry: Entry, tasks: Sequence[str]) -> Result:
    """Return one row of `results.csv`; what a run has not come to is absent."""
    status = entry.folder.status()
    row: Result = {
        "run": entry.folder.name,
        **entry.swept,
        "status": status.state if status else "pending",
        "reason": status.reason if status else None,
    }
    trained = entry.folder.read_json("training.json") or {}
    seconds = 0.0
    for task in tasks:
        scores = entry.folder.read_json(f"evaluation/{task}.json")
        if scores:
            row.update(_task_columns(task, scores))
            seconds += scores["tuned"]["seconds"]
    row["train/loss"] = trained.get("loss")
    row["validation/loss"] = trained.get("validation_loss")
    row["evaluation_seconds"] = seconds or None
    row.update({name: trained.get(name) for name in COSTS})
    row["mlflow_run_id"] = entry.mlflow_run_id
    return row


def _task_columns(task: str, scores: Mapping[str, Any]) -> Result:
    """Return a task's tuned metrics, and for each the base's and the difference to it."""
    tuned = scores["tuned"]["metrics"]
    base = scores["base"]["metrics"] if "base" in scores else {}
    columns: Result = {f"{task}/{name}": value for name, value in tuned.items()}
    for name, value in base.items():
        if not name.endswith("_stderr"):
            columns[f"{task}/base_{name}"] = value
            columns[f"{task}/{name}_diff"] = tuned[name] - value
    return columns


def write_results(path: Path, rows: Sequence[Result]) -> None:
    """Write `results.csv`: one line a run, the columns of all runs, in the order they come."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # Costs and ids go last, also where a run that failed early brings them first.
    last = ["train/loss", "validation/loss", "evaluation_seconds", *COSTS, "mlflow_run_id"]
    columns = [name for name in columns if name not in last] + last
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def render_table(rows: Sequence[Result], swept: Sequence[str], tasks: Sequence[str]) -> Table:
    """Return the table of a sweep's end: swept values, base and tuned scores, difference, time."""
    metrics = [f"{task}/{name}" for task in tasks for name in _shown_metrics(task, rows)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for key in swept or ["run"]:
        table.add_column(key, overflow="fold")
    table.add_column("status")
    for metric in metrics:
        task, name = metric.rsplit("/", 1)
        table.add_column(f"{task}\n{name}", justify="right")
    table.add_column("train\nloss", justify="right")
    table.add_column("train\ntime", justify="right")
    for row in rows:
        cells = [str(row.get(key, "")) for key in swept or ["run"]]
        cells += [row["status"], *(_score_cell(row, metric) for metric in metrics)]
        cells += [_number(row["train/loss"], ".3f"), _number(row["train_seconds"], ".0f", " s")]
        table.add_row(*cells)
    return table


def _shown_metrics(task: str, rows: Sequence[Result]) -> list[str]:
    """Return a task's metrics that have a base beside them, acc and acc_norm first."""
    prefix = f"{task}/base_"
    names = dict.fromkeys(
        name.removeprefix(prefix) for row in rows for name in row if name.startswith(prefix)
    )
    without_base = [name for name in MAIN_METRICS if any(f"{task}/{name}" in row for row in rows)]
    return sorted(names, key=lambda name: name not in MAIN_METRICS) or without_base


def _score_cell(row: Result, metric: str) -> str:
    task, name = metric.rsplit("/", 1)
    tuned, base = row.get(metric), row.get(f"{task}/base_{name}")
    if tuned is None:
        return ""
    if base is None:
        return f"{tuned:.4f}"
    return f"{base:.4f} -> {tuned:.4f}\n{tuned - base:+.4f}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def print_table(table: Table) -> None:
    """Print a table to the terminal, or whole and uncoloured where there is none."""
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)
