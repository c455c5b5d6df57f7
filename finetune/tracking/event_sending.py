"""Send a run's events to MLflow as metrics, parameters, tags, data sets and artifacts.

Sending twice adds nothing, since MLflow keeps one row for equal key, value, time and step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.store_address import masked
from finetune.tracking.artifact_links import send_folder
from finetune.tracking.item_tables import send_item_tables

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo

END_STATES = {
    "running": "RUNNING", "finished": "FINISHED", "failed": "FAILED",
    "diverged": "FAILED", "interrupted": "KILLED",
}  # fmt: skip
LONGEST_PARAM = 6000  # characters; MLflow cuts longer ones without a word
EVALUATION = "evaluation"  # the artifact of a run's scores
METRICS_A_CALL, PARAMS_A_CALL, TAGS_A_CALL = 1000, 100, 100  # MLflow's own limits


def send_events(
    client: MlflowClient, run_id: str, folder: Path, events: Sequence[dict[str, Any]]
) -> None:
    """Send events of a run's log; its artifacts are read from the run's folder."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_kind.setdefault(event["event"], []).append(event)
    _send_params(client, run_id, by_kind.get("param", []))
    metrics = [
        Metric(metric_key(e["key"]), e["value"], e["time"], e["step"])
        for e in by_kind.get("metric", [])
    ]
    for start in range(0, len(metrics), METRICS_A_CALL):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_A_CALL])
    send_tags(client, run_id, {metric_key(e["key"]): e["value"] for e in by_kind.get("tag", [])})
    for event in by_kind.get("dataset", []):
        source = json.dumps({"uri": event["source"]})
        further = event.get("profile")
        counts = further if isinstance(further, dict) else {}
        profile = json.dumps({"num_rows": event["rows"], **counts})
        digest = event["digest"][-36:]  # the longest that MLflow takes
        dataset = Dataset(event["name"], digest, "local", source, profile=profile)
        tags = [InputTag("mlflow.data.context", event["context"])]
        client.log_inputs(run_id, [DatasetInput(dataset, tags)])
    # An artifact may be logged again after a resume: its current content is sent once.
    for path, target in {(e["path"], e["folder"]) for e in by_kind.get("artifact", [])}:
        local = folder / path
        if Path(path).is_absolute() or ".." in Path(path).parts:  # of somebody else's run
            raise ValueError(f"{folder}: its events name the artifact {path}, outside of the run")
        if local.is_dir():
            send_folder(client, run_id, local, target)
            if path == EVALUATION:
                send_item_tables(client, run_id, folder)
        elif local.exists():
            client.log_artifact(run_id, str(local), target)
    if "status" in by_kind:
        _send_status(client, run_id, by_kind["status"][-1])


def send_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags in few calls: one may take a server half a second, which checks a password each."""
    from mlflow.entities import RunTag

    found = [RunTag(key, value) for key, value in tags.items()]
    for start in range(0, len(found), TAGS_A_CALL):
        client.log_batch(run_id, tags=found[start : start + TAGS_A_CALL])


def send_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Set parameters that a run does not have yet, in few calls."""
    from mlflow.entities import Param

    found = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(found), PARAMS_A_CALL):
        client.log_batch(run_id, params=found[start : start + PARAMS_A_CALL])


def _send_params(client: MlflowClient, run_id: str, events: Sequence[dict[str, Any]]) -> None:
    """Send each parameter once; a changed value goes into a tag, since MLflow's never change."""
    stored = client.get_run(run_id).data.params
    params = {metric_key(event["key"]): _shortened(event["value"]) for event in events}
    drift = [f"{k}: {stored[k]} -> {v}" for k, v in params.items() if stored.get(k, v) != v]
    if drift:
        client.set_tag(run_id, "param_drift", "; ".join(drift)[:4000])
    send_params(client, run_id, {key: v for key, v in params.items() if key not in stored})


def _send_status(client: MlflowClient, run_id: str, event: dict[str, Any]) -> None:
    reason = {"finetune.reason": event["reason"][:4000]} if event["reason"] else {}
    send_tags(client, run_id, {"finetune.state": event["state"], **reason})
    if event["state"] == "running":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, END_STATES[event["state"]], end_time=event["time"])


def create_run(
    client: MlflowClient, experiment_id: str, name: str, tags: dict[str, str], start_time: int
) -> str:
    """Create a run that started at `start_time` (milliseconds since the epoch); return its id."""
    from mlflow.tracking.context.registry import resolve_tags

    # MLflow adds the address of the git repository, which may have a token in it.
    shown = {key: masked(value) for key, value in resolve_tags(tags).items()}
    created = client.create_run(experiment_id, start_time=start_time, tags=shown, run_name=name)
    return str(created.info.run_id)


def run_info(client: MlflowClient, run_id: str | None) -> RunInfo | None:
    """Return the store's information on a run; None if it is missing or deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return info if info.lifecycle_stage == "active" else None


def metric_key(name: str) -> str:
    """Return a name in the characters that MLflow allows."""
    return re.sub(r"[^\w./ -]", "_", name)


def _shortened(value: str) -> str:
    if len(value) <= LONGEST_PARAM:
        return value
    note = f"... [{len(value)} characters]"
    return value[: LONGEST_PARAM - len(note)] + note
