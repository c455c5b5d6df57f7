"""A run's questions and answers as a table artifact of MLflow, in the layout of `mlflow.log_table`.

The table is made of `evaluation/<task>.items.jsonl` when the run's scores are sent. MLflow's
evaluation view lists the artifacts that the tag `mlflow.loggedArtifacts` names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.tracking.items import describe_gold, find_category, find_choices, pick
from finetune.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG = "mlflow.loggedArtifacts"
MOST_ROWS = 1000
LONGEST = 2000  # characters of a cell, of a longer text its end
SIDES = ("base", "tuned")
COLUMNS = ("id", "category", "question", "choices", "gold", *SIDES)


def send_item_tables(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Send a table for each task whose questions have texts, and name them in the run's tag."""
    run = RunFolder(folder)
    paths = []
    for task in run.scored_tasks():
        table = build_table(run.read_items(task))
        if table is not None:
            paths.append(f"evaluation/{task}.table.json")
            client.log_dict(run_id, table, paths[-1])
    if paths:
        _name_tables(client, run_id, paths)


def build_table(items: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the first questions with both models' answers; None where no texts were kept."""
    shown = items[:MOST_ROWS]
    if not any(item.get("question") for item in shown):
        return None
    metrics = dict.fromkeys(
        metric
        for item in shown
        for side in SIDES
        for metric, value in item.get(side, {}).items()
        if isinstance(value, int | float)
    )
    outcomes = [(metric, side) for metric in metrics for side in SIDES]
    columns = [*COLUMNS, *(f"{side} {metric}" for metric, side in outcomes)]
    rows = [
        [*_describe(item), *(_number(item.get(side, {}).get(metric)) for metric, side in outcomes)]
        for item in shown
    ]
    return {"columns": columns, "data": rows}


def _describe(item: Mapping[str, Any]) -> Iterator[str]:
    """Yield a question's cells of COLUMNS."""
    texts = find_choices(item)
    said = item.get("said")
    yield _cut(str(item.get("id", "")))
    yield _cut(find_category(item))
    yield _cut(str(item.get("question", "")))
    yield _cut("\n".join(texts))
    yield _cut(describe_gold(texts, item.get("gold")))
    for side in SIDES:
        yield _cut(pick(texts, said.get(side) if isinstance(said, Mapping) else None))


def _number(value: Any) -> float | None:
    """Return an outcome that is a number; JSON, as MLflow's page reads it, has no NaN."""
    return value if isinstance(value, int | float) and isfinite(value) else None


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"...{text[-LONGEST:]}"


def _name_tables(client: MlflowClient, run_id: str, paths: Sequence[str]) -> None:
    """Add tables to the run's tag, beside what somebody else logged."""
    try:
        named = json.loads(client.get_run(run_id).data.tags.get(TAG, "[]"))
    except ValueError:
        named = []
    known = named if isinstance(named, list) else []
    tables = [{"path": path, "type": "table"} for path in paths]
    new = [table for table in tables if table not in known]
    if new:
        client.set_tag(run_id, TAG, json.dumps([*known, *new]))
