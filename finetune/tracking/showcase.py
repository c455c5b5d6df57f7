"""Save a chart view of a sweep's runs in MLflow.

The view's format is internal to MLflow's UI (as of 3.17); another UI shows the same runs by the
filter alone.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient


def save_view(client: MlflowClient, run_id: str, sweep: str, state: dict[str, Any]) -> str:
    """Save a view of one sweep's runs (parallel coordinates, curves, bars); return its link.

    Args:
        client: the store.
        run_id: the sweep's MLflow run, the parent of the others.
        sweep: the sweep's name.
        state: the view, of `build_view`.

    Returns:
        The address below the UI's root.
    """
    experiment_id = client.get_run(run_id).info.experiment_id
    now = int(time.time() * 1000)
    key = f"finetune-{sweep}"
    view = {"name": sweep, "createdAt": now, "updatedAt": now, "state": _packed(state)}
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{key}", json.dumps(view))
    return (
        f"#/experiments/{experiment_id}/runs?viewStateShareKey={key}"
        "&compareRunsMode=CHART&workflowType=machine_learning"
    )


def build_view(
    sweep: str, swept: Sequence[str], metrics: Sequence[str], lowest_first: bool
) -> dict[str, Any]:
    """Return the UI's state that shows one sweep.

    Args:
        sweep: its name, its runs' tag `finetune.sweep`.
        swept: the keys that differ.
        metrics: what to draw bars of, the first also as the end of the parallel coordinates.
        lowest_first: whether runs with the lowest first metric come first.
    """
    charts: list[dict[str, Any]] = []
    if swept and metrics:
        charts.append(
            {
                "type": "PARALLEL", "metricSectionId": "scores", "selectedParams": list(swept),
                "selectedMetrics": [metrics[0]], "showAllRuns": True,
            }
        )  # fmt: skip
    charts += [
        {"type": "BAR", "metricSectionId": "scores", "metricKey": metric} for metric in metrics
    ]
    charts.append(
        {
            "type": "LINE", "metricSectionId": "curves", "metricKey": "train/loss",
            "selectedMetricKeys": ["train/loss"], "xAxisKey": "step", "lineSmoothness": 60,
            "scaleType": "linear", "selectedYAxisMetricOrParam": "metric",
        }
    )  # fmt: skip
    common = {"runsCountToCompare": 100, "deleted": False, "isGenerated": False}
    sections = [
        {"uuid": uuid, "name": name, "display": True, "deleted": False, "isReordered": False}
        for uuid, name in (("scores", "Scores"), ("curves", "Training"))
    ]
    return {
        # Only runs have a state, and only an order by date would fold them below their sweep.
        "searchFilter": f"tags.`finetune.sweep` = '{sweep}' and tags.`finetune.state` != ''",
        "orderByKey": f"metrics.`{metrics[0]}`" if metrics else "attributes.`Duration`",
        "orderByAsc": lowest_first,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [
            {**chart, **common, "uuid": f"chart-{number}"} for number, chart in enumerate(charts)
        ],
        "compareRunSections": sections,
        "isAccordionReordered": True,  # else the sections that the UI adds come first
    }


def _packed(state: dict[str, Any]) -> str:
    packed = zlib.compress(json.dumps(state).encode())
    return "deflate;" + base64.b64encode(packed).decode()
