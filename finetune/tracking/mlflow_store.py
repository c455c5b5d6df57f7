"""Open the MLflow store of a sweep: a server, or a SQLite file that is created if missing."""

from __future__ import annotations

import logging
import os
import shlex
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.store_address import MASK, URI_VARIABLE, reveal, sqlite_file, sqlite_uri
from finetune.files import distinct_slug, remove_leftovers, temporary_path
from finetune.home import complete_environment
from finetune.tracking.claims import CLAIM_FILE, claimed

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("finetune")

# File systems of several machines, on which SQLite's write-ahead log is not safe.
NETWORK = (
    "nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afpfs", "webdav", "lustre", "gpfs", "beegfs",
    "ceph", "panfs", "wekafs", "9p", "afs", "ocfs2", "gfs2", "orangefs", "pvfs2", "glusterfs",
    "virtiofs", "vboxsf", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph-fuse", "fuse.davfs2",
    "fuse.s3fs", "fuse.gcsfuse", "fuse.juicefs", "fuse.beegfs", "fuse.rclone", "fuse.moosefs",
)  # fmt: skip

# The page of a model's training, not of prompts and traces; MLflow guesses otherwise.
EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}


def open_store(uri: str) -> MlflowClient:
    """Open the store, creating a SQLite file if missing; `uri` may be masked."""
    file = sqlite_file(uri)
    if file is not None:
        make_sqlite_store(file)
    return open_client(uri)


def open_client(uri: str) -> MlflowClient:
    """Return MLflow's client of an existing store.

    Raises:
        ValueError: the secret of a masked address is not in the environment.
    """
    _prepare_mlflow()
    import mlflow

    return mlflow.MlflowClient(tracking_uri=reveal(uri))


def _prepare_mlflow() -> None:
    """Set MLflow's environment variables before it is imported; a user's values are kept."""
    complete_environment()
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default blocks one call for minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        # A pool would go on writing to a SQLite file that was deleted.
        "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    }.items():
        os.environ.setdefault(name, value)
    for library in ("alembic", "mlflow", "urllib3"):  # the last logs each retry
        logging.getLogger(library).setLevel(logging.ERROR)


def find_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of an experiment, created if missing.

    Raises:
        ValueError: it was deleted in MLflow.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            place = _artifacts(uri, name)
            return str(client.create_experiment(name, artifact_location=place, tags=EXPERIMENT))
        except MlflowException:  # another process made it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ValueError(deleted_experiment(uri, name, str(found.experiment_id)))
    return str(found.experiment_id)


def deleted_experiment(uri: str, name: str, experiment_id: str) -> str:
    """Return the message on an experiment that was deleted in MLflow, with both remedies."""
    variable = "" if MASK in uri else f"{URI_VARIABLE}={shlex.quote(uri)} "
    return (
        f"tracking.experiment={name} was deleted in MLflow; restore it with: {variable}"
        f"mlflow experiments restore --experiment-id {experiment_id}; or set "
        "tracking.experiment=OTHER"
    )


def _artifacts(uri: str, experiment: str) -> str | None:
    """Return the artifact folder beside a SQLite file; None for a server, which has its own."""
    file = sqlite_file(uri)
    if file is None:
        return None
    return (file.parent / "mlartifacts" / distinct_slug(experiment)).as_uri()


def make_sqlite_store(store: Path) -> None:
    """Migrate a new store in a temporary file and rename it.

    A store that several processes open cold, or that is killed while it is first migrated, is
    broken for good (MLflow 3.17).
    """
    if store.is_dir():  # MLflow would try for minutes
        raise IsADirectoryError(f"{store} is a folder")
    if _is_made(store):
        _disable_write_ahead_log(store)
        return
    _prepare_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store.parent.mkdir(parents=True, exist_ok=True)
    with claimed(Path(f"{store}{CLAIM_FILE}")) as claim:
        if _is_made(store):
            return
        remove_leftovers(store.parent, store.name)
        temporary = temporary_path(store)
        made = SqlAlchemyStore(sqlite_uri(temporary), (store.parent / "mlartifacts").as_uri())
        made.engine.dispose()
        mode = "wal" if network_type(store.parent) is None else "delete"
        with closing(sqlite3.connect(temporary)) as connection:
            connection.execute(f"pragma journal_mode={mode}")
        claim.check()  # a store that another process has made since may hold runs
        os.replace(temporary, store)
        if mode == "delete":
            log.info(_describe_journal(store))


def _is_made(store: Path) -> bool:
    """Return whether the file has a store; an empty file is replaced."""
    return store.exists() and store.stat().st_size > 0


def _disable_write_ahead_log(store: Path) -> None:
    """Disable the write-ahead log of a store on a network file system."""
    if network_type(store.parent) is None:
        return
    with store.open("rb") as file:
        if file.read(20)[18:20] != b"\2\2":  # format.html#file_format_version_numbers
            return
    with suppress(sqlite3.Error), closing(sqlite3.connect(store, timeout=5)) as connection:
        connection.execute("pragma journal_mode=delete")
        log.info(_describe_journal(store))


def _describe_journal(store: Path) -> str:
    return (
        f"{store} is on a network file system ({network_type(store.parent)}), where SQLite's "
        "write-ahead log is not safe: journal_mode=delete"
    )


def network_type(folder: Path) -> str | None:
    """Return the type of a folder's file system where several machines share it, else None."""
    import psutil

    place = folder.resolve()
    found = "", ""
    for mount in psutil.disk_partitions(all=True):
        if place.is_relative_to(mount.mountpoint) and len(mount.mountpoint) >= len(found[0]):
            found = mount.mountpoint, mount.fstype.lower()
    return found[1] if found[1] in NETWORK else None
