"""Send a sweep's summary to MLflow: parent, base runs, differences and costs, view, champion.

Values that the store has already are not sent again. Those that change as the grid grows, such as
an adjusted p, get a newer time, so that MLflow shows the last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.tracking.champion import Champion, register_champion
from finetune.tracking.event_sending import (
    END_STATES,
    create_run,
    metric_key,
    send_params,
    send_tags,
)
from finetune.tracking.mirror import Mirror
from finetune.tracking.showcase import build_view, save_view
from finetune.tracking.sweep_summary import BaseRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

BASE_TAG = "finetune.base"  # of a base's run: the name that it has in the summary
NOTE = "mlflow.note.content"  # MLflow's tag of a run's description
REPORT_FILES = ("report.html", "report.md", "results.csv", "sweep.yaml")
PAGE = 1000  # runs a call


def send_summary(client: MlflowClient, mirror: Mirror, started: int) -> None:
    """Send what is new in a sweep's summary.

    Args:
        client: the store.
        mirror: of the sweep, whose parent and runs the store has.
        started: when the sweep began, in milliseconds.
    """
    summary = mirror.summary
    if mirror.described == summary:
        return
    assert mirror.run_id is not None
    runs = {run.info.run_id: run for run in _runs_of(client, mirror)}
    _send_numbers(client, runs.get(mirror.run_id), summary.values)
    for name, values in summary.runs.items():
        child = mirror.children.get(name)
        if child is not None and child.run_id is not None:
            _send_numbers(client, runs.get(child.run_id), values)
    known = {run.data.tags[BASE_TAG]: run for run in runs.values() if BASE_TAG in run.data.tags}
    for name, base in summary.bases.items():
        _send_base(client, mirror, (name, base), known.get(name), started)
    tags = {**summary.tags, **({NOTE: summary.note} if summary.note else {})}
    send_tags(client, mirror.run_id, tags)
    if summary.metrics:
        view = build_view(mirror.name, mirror.swept, summary.metrics, summary.lowest_first)
        mirror.view = save_view(client, mirror.run_id, mirror.name, view)
    _send_champion(client, mirror, runs)
    mirror.described = summary


def _runs_of(client: MlflowClient, mirror: Mirror) -> Iterator[Run]:
    """Yield all runs of a sweep, its parent and bases too."""
    token = None
    while True:
        page = client.search_runs(
            [str(mirror.experiment_id)], f"tags.`finetune.sweep` = '{mirror.name}'",
            max_results=PAGE, page_token=token,
        )  # fmt: skip
        yield from page
        token = page.token
        if not token:
            return


def _send_numbers(client: MlflowClient, run: Run | None, values: Mapping[str, float]) -> None:
    """Send metrics whose values are not the run's last; of a run that is gone, none."""
    from mlflow.entities import Metric

    if run is None:
        return
    now, last = int(time.time() * 1000), run.data.metrics
    named = {metric_key(key): float(value) for key, value in values.items()}
    new = [Metric(key, value, now, 0) for key, value in named.items() if last.get(key) != value]
    if new:
        client.log_batch(run.info.run_id, metrics=new)


def _send_base(
    client: MlflowClient, mirror: Mirror, named: tuple[str, BaseRun], run: Run | None, started: int
) -> None:
    """Send a base's scores as a run beside those that were tuned from it."""
    name, base = named
    assert mirror.run_id is not None
    if run is None:
        tags = {
            "mlflow.parentRunId": mirror.run_id, "finetune.sweep": mirror.name, BASE_TAG: name,
            "finetune.state": "finished",  # without which the view leaves it out
        }  # fmt: skip
        run_id = create_run(client, str(mirror.experiment_id), name, tags, started)
        run = client.get_run(run_id)
        send_params(client, run_id, base.params)
        ended = started + int(base.seconds * 1000)
        client.set_terminated(run_id, END_STATES["finished"], end_time=ended)
    elif run.data.tags.get("mlflow.parentRunId") != mirror.run_id:  # its parent was made anew
        client.set_tag(run.info.run_id, "mlflow.parentRunId", mirror.run_id)
    _send_numbers(client, run, base.scores)


def _send_champion(client: MlflowClient, mirror: Mirror, runs: Mapping[str, Run]) -> None:
    child = mirror.children.get(mirror.summary.champion or "")
    run = runs.get(child.run_id or "") if child is not None else None
    if child is None or run is None:
        return
    folder = Path(child.path)
    for artifact in ("adapter", "model"):
        if (folder / artifact).exists():
            run_id, tags = run.info.run_id, run.data.tags
            champion = Champion(mirror.name, run_id, folder, artifact, tags)
            register_champion(client, champion, mirror.summary)


def send_report(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Send a sweep's report, its results and its figures as artifacts."""
    for name in REPORT_FILES:
        if (folder / name).is_file():
            client.log_artifact(run_id, str(folder / name), "report")
    for figure in sorted((folder / "figures").glob("*.png")):
        client.log_artifact(run_id, str(figure), "report/figures")
