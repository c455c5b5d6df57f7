"""Rows of results.csv: a run's settings, status, scores, losses and costs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.escaping import for_csv
from finetune.statistics.metric_names import STDERR, MetricName
from finetune.statistics.objective import VALIDATION
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.score_files import ModelScore, TaskScores

ENERGY = "energy_wh"  # of the GPU while training; a column where any run knows it
COSTS = ("train_seconds", "tokens_per_second", "peak_memory_gib", "num_trainable_parameters")
MEAN_LOSS = "train/mean_loss"

Row = dict[str, Any]  # one row of results.csv


def build_row(
    run: RunFolder, swept: Mapping[str, str], scored: Mapping[str, TaskScores | None]
) -> Row:
    """Return one row of `results.csv`, with the columns that the run has so far.

    The caller adds the last loss, which is in the run's events, and the MLflow run.
    """
    status = run.status()
    row: Row = {
        "run": run.name,
        **swept,
        "status": status.state if status else "pending",
        "reason": status.reason if status else None,
    }
    trained = run.read_json("training.json") or {}
    seconds = 0.0
    for task, scores in scored.items():
        if scores is None:
            continue
        chosen = run.read_scores(f"{task}.select")
        row.update(_task_columns(task, scores))
        seconds += scores.tuned.seconds
        if chosen is not None:
            row.update(_selection_columns(task, chosen.tuned))
            seconds += chosen.tuned.seconds
    row["train/loss"] = None
    row[MEAN_LOSS] = trained.get("mean_loss", trained.get("loss"))  # its name until 0.1
    row[VALIDATION] = trained.get("validation_loss")
    row["evaluation_seconds"] = seconds or None
    row.update({name: trained.get(name) for name in COSTS})
    if trained.get("power_watts") is not None:
        row[ENERGY] = trained["power_watts"] * trained["train_seconds"] / 3600
    row["mlflow_run_id"] = None
    return row


def _task_columns(task: str, scores: TaskScores) -> Row:
    """Return a task's tuned metrics, and for each the base's and the difference to it."""
    columns: Row = {}
    for name, one in scores.tuned.metrics.items():
        column = MetricName(task, name)
        columns[str(column)] = one.value
        if one.stderr is not None:
            columns[column.stderr] = one.stderr
    for name, one in scores.base.metrics.items() if scores.base else ():
        column, tuned = MetricName(task, name), scores.tuned.value(name)
        columns[column.base] = one.value
        columns[column.difference] = None if tuned is None else tuned - one.value
    return columns


def _selection_columns(task: str, chosen: ModelScore) -> Row:
    """Return the metrics on the questions that choose the best run."""
    columns: Row = {}
    for name, one in chosen.metrics.items():
        column = MetricName(task, name).selection
        columns[column] = one.value
        if one.stderr is not None:
            columns[f"{column}{STDERR}"] = one.stderr
    return columns


def render_csv(rows: Sequence[Row]) -> str:
    """Return `results.csv`: one line a run, the columns of all runs, in the order they come."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list_columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: for_csv(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def list_columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns of all rows: run, settings and status, then scores, then costs and ids."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # Costs and ids go last, also where a run that failed early brings them first.
    energy = [ENERGY] if ENERGY in columns else []
    last = [
        "train/loss", MEAN_LOSS, VALIDATION, "evaluation_seconds", *COSTS, *energy, "mlflow_run_id"
    ]  # fmt: skip
    first = [name for name in columns if name not in last and "/" not in name]
    return [*first, *(name for name in columns if name not in (*first, *last)), *last]
