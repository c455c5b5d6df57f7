"""The MLflow store of a sweep: a server, or a SQLite file that is made where there is none."""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from finetune.run_folder import slug

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"


def absolute_uri(uri: str) -> str:
    """Return the store's URI, a SQLite file's path made absolute."""
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}" if _is_file(uri) else uri


def is_server(uri: str) -> bool:
    """Return whether the store has a UI of its own."""
    return uri.startswith(("http://", "https://"))


def open_store(uri: str) -> MlflowClient:
    """Open the store, made first where it is a SQLite file."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default blocks one call for minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }.items():
        os.environ.setdefault(name, value)
    import mlflow

    for library in ("alembic", "mlflow"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if _is_file(uri):
        make_sqlite_store(Path(uri.removeprefix(SQLITE)))
    return mlflow.MlflowClient(tracking_uri=uri)


def find_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of an experiment, made where there is none of the name."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifacts(uri, name)))
        except MlflowException:  # another process made it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _artifacts(uri: str, experiment: str) -> str | None:
    """Return where an experiment's artifacts lie beside a SQLite file; a server decides itself."""
    if not _is_file(uri):
        return None
    return (Path(uri.removeprefix(SQLITE)).parent / "mlartifacts" / slug(experiment)).as_uri()


def make_sqlite_store(store: Path) -> None:
    """Migrate a new store in a temporary file and rename it.

    A store that several processes open cold, or that is killed while it is first migrated, is
    broken for good (MLflow 3.17).
    """
    if store.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with FileLock(f"{store}.lock"):
        if store.exists():
            return
        temporary = store.with_name(f".{store.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        made = SqlAlchemyStore(f"{SQLITE}{temporary}", str(store.parent / "mlartifacts"))
        made.engine.dispose()
        connection = sqlite3.connect(temporary)
        connection.execute("pragma journal_mode=wal")
        connection.close()
        os.replace(temporary, store)


def _is_file(uri: str) -> bool:
    return uri.startswith(SQLITE)
