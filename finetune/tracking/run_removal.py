"""Remove a run: its folder, and in MLflow the run, its artifacts and its model's versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import Timeout

from finetune.config.store_address import (
    URI_VARIABLE,
    is_server,
    needs_typing,
    reveal,
    sqlite_file,
    without_secrets,
)
from finetune.files import Damaged, remove, remove_folder
from finetune.problems import Refused, first_line
from finetune.tracking.claims import CLAIM_FILE, Watch, claimed
from finetune.tracking.mirror import Mirror
from finetune.tracking.mlflow_store import open_client
from finetune.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Copy:
    """A run as one sweep has sent it to MLflow."""

    sweep: Path  # its folder
    uri: str
    run_id: str | None  # None: it was never sent


class NotRemoved(RuntimeError):
    """MLflow did not remove a run; the message says why, and the remedy."""


def find_copies(run: RunFolder, reports: Path) -> list[Copy]:
    """Return the copies of a run in MLflow, by the `mlflow.json` of the sweeps that have sent it.

    Raises:
        Refused: an `mlflow.json` is damaged, or names a server that the user did not.
    """
    copies = []
    for path in sorted(reports.glob("*/mlflow.json")):
        try:
            mirror = Mirror.load(path)
        except Damaged as damage:
            raise Refused(
                [f"{path} is damaged: {damage}; the sweep's command recreates it"]
            ) from None
        child = mirror.children.get(run.name)
        if child is None:
            continue
        if child.run_id is not None and needs_typing(mirror.uri):
            server = without_secrets(mirror.uri)
            raise Refused(
                [
                    f"{path} says that {server} has {run.name}; if you trust that server, set "
                    f"{URI_VARIABLE}={server}"
                ]
            )
        copies.append(Copy(path.parent, mirror.uri, child.run_id))
    return copies


@contextmanager
def held(runs: Sequence[RunFolder], reports: Path) -> Iterator[dict[str, list[Copy]]]:
    """Hold runs and the sweeps that have sent them; yield each run's copies in MLflow by its name.

    Raises:
        Refused: a run, or one of its sweeps, is at work; or as `find_copies`.
    """
    copies = {run.name: find_copies(run, reports) for run in runs}
    sweeps = dict.fromkeys(copy.sweep for found in copies.values() for copy in found)
    with ExitStack() as stack:
        for folder in (*sweeps, *(run.path for run in runs)):
            try:
                stack.enter_context(claimed(folder / CLAIM_FILE, wait=False))
            except Timeout:
                holder = Watch(folder / CLAIM_FILE).holder() or "another process"
                raise Refused(
                    [f"{folder} is running in {holder}; wait for it, or stop it"]
                ) from None
            except OSError as error:
                raise Refused([f"{folder} cannot be removed: {error.strerror}"]) from None
        yield copies


def remove_run(run: RunFolder, copies: Sequence[Copy]) -> list[str]:
    """Remove a held run, in MLflow first; return a line for each copy that a server only marks.

    Raises:
        NotRemoved: MLflow could not do it; the folder is still there.
        OSError: the folder cannot be removed.
    """
    notes = []
    for copy in copies:
        if copy.run_id is not None:
            try:
                note = _remove_from_store(copy.uri, copy.run_id)
            except Exception as error:  # whatever a store may raise
                raise NotRemoved(
                    f"{run.name} is not removed: MLflow at {without_secrets(copy.uri)}: "
                    f"{without_secrets(first_line(error))}; repeat the command once it can be "
                    "reached"
                ) from None
            notes += [note] if note else []
        _forget(copy.sweep / "mlflow.json", run.name)
    remove_folder(run.path)
    if run.path.exists():
        raise OSError(f"{run.path} cannot be removed; check its permissions")
    return notes


def _forget(path: Path, name: str) -> None:
    """Take a run out of a sweep's `mlflow.json`: the sweep's command sends it as a new one."""
    mirror = Mirror.load(path)
    mirror.children.pop(name, None)
    if mirror.summary.champion == name:
        mirror.summary = replace(mirror.summary, champion=None)
    mirror.save(path)


def _remove_from_store(uri: str, run_id: str) -> str | None:
    """Remove a run from a store; return a line where a server keeps it as deleted."""
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        return None
    client = open_client(uri)
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    _remove_versions(client, run_id)
    address = reveal(uri)
    if info.artifact_uri.startswith("file:"):
        _remove_local_artifacts(info.artifact_uri, run_id)
    else:
        get_artifact_repository(info.artifact_uri, tracking_uri=address).delete_artifacts()
    if info.lifecycle_stage != "deleted":
        client.delete_run(run_id)
    if is_server(uri):
        return (
            f"MLflow at {without_secrets(uri)} keeps run {run_id} as deleted until its `mlflow gc`"
        )
    _remove_rows(address, run_id)
    return None


def _remove_local_artifacts(uri: str, run_id: str) -> None:
    """Remove a run's artifacts, where the store says that they are in a folder named by the run.

    A store may come from somebody else, and name any folder of this machine.

    Raises:
        ValueError: they are elsewhere.
    """
    folder = Path(url2pathname(urlsplit(uri).path))
    if (folder.parent.name, folder.name) != (run_id, "artifacts"):
        raise ValueError(f"its artifacts are in {folder}, which is not a folder of that run alone")
    remove(folder.parent)


def _remove_versions(client: MlflowClient, run_id: str) -> None:
    """Remove the versions of registered models that are this run's, and models without others."""
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        client.delete_model_version(version.name, version.version)
        if not client.search_model_versions(f"name = '{version.name}'"):
            client.delete_registered_model(version.name)


def _remove_rows(uri: str, run_id: str) -> None:
    """Remove a deleted run from a database, as `mlflow gc` does.

    That command itself would also remove every other experiment that is marked as deleted.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(uri, "mlartifacts")
    store._hard_delete_run(run_id)
    store.engine.dispose()
