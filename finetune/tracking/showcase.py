"""Register a sweep's best adapter in MLflow as champion, and save a chart view of its runs.

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

ALIAS = "champion"


def register_champion(client: MlflowClient, name: str, run_id: str, artifact: str) -> None:
    """Register a run's adapter or model under the sweep's name, once, with the alias champion."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    known = next((v.version for v in versions if v.run_id == run_id), None)
    source = f"runs:/{run_id}/{artifact}"
    version = known or client.create_model_version(name, source, run_id).version
    client.set_registered_model_alias(name, ALIAS, str(version))


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
