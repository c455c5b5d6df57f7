"""Links of a report: the folders of its runs, and the sweep and its runs in MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from finetune.config.store_address import is_server, ui_command
from finetune.files import Damaged
from finetune.reporting.results import Results
from finetune.tracking.mirror import Mirror
from finetune.tracking.tracked_sweep import TRAINING
from finetune.tracking.tracker import LOCAL_UI


@dataclass(frozen=True)
class Links:
    """Addresses, relative to the report for files."""

    folders: dict[str, str]  # by run
    runs: dict[str, str]  # by run, in MLflow
    sweep: str | None  # in MLflow
    ui_command: str | None  # that serves the addresses in MLflow, where its store is a local one


def find_links(results: Results) -> Links:
    """Return the links that the sweep's files allow."""
    pairs = zip(results.record.runs, results.runs, strict=True)
    folders = {run.name: f"{quote(record.folder)}/" for record, run in pairs}
    mirror = _load_mirror(results)
    if mirror is None or mirror.experiment_id is None:
        return Links(folders, {}, None, None)
    experiment = f"{_find_root(mirror.uri)}/#/experiments/{quote(mirror.experiment_id, safe='')}"
    runs = {
        name: f"{experiment}/runs/{quote(child.run_id, safe='')}?{TRAINING}"
        for name, child in mirror.children.items()
        if child.run_id
    }
    sweep = f"{experiment}/runs?{TRAINING}"
    if mirror.run_id:
        sweep = f"{experiment}/runs/{quote(mirror.run_id, safe='')}?{TRAINING}"
    if mirror.view:
        sweep = f"{_find_root(mirror.uri)}/{mirror.view}"
    command = None if is_server(mirror.uri) else ui_command(results.folder)
    return Links(folders, runs, sweep, command)


def _find_root(uri: str) -> str:
    """Return the address of the store's UI, without a user's name and password."""
    if not is_server(uri):
        return LOCAL_UI
    parts = urlsplit(uri)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
    return bare.geturl().rstrip("/")


def _load_mirror(results: Results) -> Mirror | None:
    path = results.folder / "mlflow.json"
    try:
        return Mirror.load(path) if path.is_file() else None
    except Damaged:  # the tracker reports it, and sets it aside
        return None
