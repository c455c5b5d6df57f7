"""Check the MLflow store before training: its URI, file, database schema, and response.

A store that cannot work is refused with the remedy. One that is only unreachable is not: the runs
continue, and missing events are sent later. Nothing is written.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shlex
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from finetune import distributed
from finetune.config.schema import TrackingConfig
from finetune.config.store_address import (
    MASK,
    SQLITE,
    URI_VARIABLE,
    Address,
    find_address,
    is_server,
    reveal,
    sqlite_file,
    without_secrets,
)
from finetune.problems import Refused, first_line
from finetune.tracking.mlflow_store import deleted_experiment, open_client

if TYPE_CHECKING:
    from sqlalchemy import Connection

log = logging.getLogger("finetune")

CHECK_SECONDS = 15.0  # to wait for the store's answer after planning
DATABASES = ("postgresql", "mysql", "mssql")
DRIVERS = {
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}  # module -> package
FORMS = "sqlite:///mlflow.db, http://HOST:PORT, https://HOST, or postgresql://USER@HOST/NAME"


@contextmanager
def store_checked(tracking: TrackingConfig) -> Iterator[None]:
    """Check the store while the jobs are planned, and refuse the problems of both at once.

    Raises:
        Refused: the store cannot work, or planning refused the jobs.
    """
    problems: list[str] = []
    check = threading.Thread(target=_collect, args=(tracking, problems), daemon=True)
    check.start()
    if distributed.is_launched():  # this process is about to import torch itself
        check.join(CHECK_SECONDS)
    try:
        yield
    except Refused as refused:
        check.join(CHECK_SECONDS)
        raise Refused([*refused.problems, *problems]) from None
    check.join(CHECK_SECONDS)
    if problems:
        raise Refused(list(problems))


def _collect(tracking: TrackingConfig, problems: list[str]) -> None:
    if not tracking.enabled or tracking.uri == "":  # which the ranges refuse
        return
    address = find_address(tracking)
    try:
        problems += find_store_problems(address)
    except Exception as error:  # whatever a database's driver raises: it is unreachable
        log.debug("%s was not checked: %s", address.uri, without_secrets(first_line(error)))


def find_store_problems(address: Address) -> list[str]:
    """Return why a store cannot work, with the remedy; none if it is only unreachable."""
    said = f"{address.uri_key}={address.uri}"
    form = _find_form_problem(address.uri)
    if form is not None:
        problems = [f"{said} {form}"]
    elif is_server(address.uri):
        problems = _find_server_problems(address, said)
    elif sqlite_file(address.uri) is None and not address.uri.startswith(DATABASES):
        problems = []  # a plugin's, or Databricks'
    else:
        problems = _find_database_problems(address, said)
    return [without_secrets(problem) for problem in problems]


def _find_form_problem(uri: str) -> str | None:
    """Return what is wrong with the form of an address."""
    scheme, mark, rest = uri.partition(":")
    name = re.split(r"[+:]", scheme)[0].lower()
    if re.match(r"(\[[\da-fA-F:]+\]|[\w.-]+):\d+(/|$)", uri):
        return f"has no scheme; write http://{uri} for a server"
    if name == "file" or not (mark or name == "databricks"):
        return _folder_problem(uri)
    if name == "sqlite":
        return _sqlite_problem(uri, rest)
    if name in ("http", "https"):
        return _http_problem(scheme, uri)
    if name in DATABASES:
        return _driver_problem(uri)
    plugins = {point.name for point in entry_points(group="mlflow.tracking_store")}
    if name in {"databricks", *plugins}:
        return None
    if name == "postgres":
        return f"has the scheme postgres; write postgresql{uri.removeprefix(scheme)}"
    return f"has the scheme {scheme}, which MLflow has no store for; use {FORMS}"


def _folder_problem(uri: str) -> str:
    path = uri.removeprefix("file:")
    if path.endswith((".db", ".sqlite", ".sqlite3")):
        return f"is a path; write sqlite:///{path}"
    return (
        "is a file store, which MLflow no longer writes; use sqlite:///mlflow.db (mlflow "
        "migrate-filestore brings its runs over), or http://HOST:PORT for a server"
    )


def _sqlite_problem(uri: str, rest: str) -> str | None:
    if sqlite_file(uri) is not None:
        return None
    name = rest.lstrip("/")
    if SQLITE.match(uri) or name in ("", ":memory:"):
        return "names no file, so nothing would be kept; write sqlite:///mlflow.db"
    slashes = "////" if rest.startswith("/") and not rest.startswith("//") else "///"
    return f"needs three slashes before the file; write sqlite:{slashes}{name}"


def _http_problem(scheme: str, uri: str) -> str | None:
    try:
        parts = urlsplit(uri)
        if parts.hostname and (parts.port is None or parts.port):
            return None
    except ValueError as error:
        return f"is no address of a server ({error}); write {scheme}://HOST:PORT"
    return f"names no host; write {scheme}://HOST:PORT"


def _driver_problem(uri: str) -> str | None:
    """Return whether a database's dialect is known and its driver installed."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        return (
            f"is no address of a database ({first_line(error)}); write postgresql://USER@HOST/NAME"
        )
    except ImportError as error:
        module = error.name or "its driver"
        return f"needs {module}, which is not installed; pip install {DRIVERS.get(module, module)}"
    return None


def _find_server_problems(address: Address, said: str) -> list[str]:
    """Ask a server for the experiment; a server that does not answer is no problem."""
    from mlflow.exceptions import MlflowException

    try:
        found = open_client(address.uri).get_experiment_by_name(address.experiment)
    except MlflowException as error:
        return _server_answers(said, error)
    if found is not None and found.lifecycle_stage == "deleted":
        return [deleted_experiment(address.uri, address.experiment, str(found.experiment_id))]
    return []


def _server_answers(said: str, error: Exception) -> list[str]:
    """Return the remedy for a server's error; none for one that may pass."""
    text = " ".join(without_secrets(str(error)).split())
    code = re.search(r"error code (\d{3}) ", text)
    status = int(code[1]) if code else int(getattr(error, "get_http_status_code", lambda: 500)())
    if status == 401:
        return [
            f"{said}: the server requires a login (401); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        ]
    if status == 403:
        return [f"{said}: the server denies access (403): {text[-200:]}"]
    if status in (404, 405, 501) or "not in a valid JSON format" in text:
        return [f"{said} answers, but not as an MLflow server; check host, port and path"]
    return []


def _find_database_problems(address: Address, said: str) -> list[str]:
    """Read a database's schema and experiment; first a SQLite file's permissions."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import DatabaseError, OperationalError
    from sqlalchemy.pool import NullPool

    file = sqlite_file(address.uri)
    if file is not None:
        problem = _find_file_problem(file)
        if problem is not None:
            return [f"{said} {problem}"]
        if not file.exists() or file.stat().st_size == 0:
            return []  # it is made when the runs begin
        connect = partial(sqlite3.connect, f"file:{quote(str(file))}?mode=rw", uri=True, timeout=1)
        engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)
    else:
        engine = create_engine(reveal(address.uri), poolclass=NullPool)
    try:
        with engine.connect() as connection:
            return _find_schema_problems(connection, address, said)
    except OperationalError as error:
        if file is None or "locked" in str(error):
            return []  # a database that is unreachable or busy
        return [f"{said} cannot be opened: {first_line(error)}; set another file"]
    except DatabaseError as error:
        if file is None:
            return []
        return [f"{said} is no SQLite database: {first_line(error)}; set another file"]


def _find_file_problem(file: Path) -> str | None:
    """Return why a SQLite file can be neither opened nor made."""
    if file.is_dir():
        return f"is a folder; name a file, such as sqlite:///{file / 'mlflow.db'}"
    above = next(folder for folder in file.parents if folder.exists())
    if not above.is_dir():
        return f"has {above} in its path, which is not a folder; set another file"
    if file.exists() and not os.access(file, os.R_OK | os.W_OK):
        return f"cannot be written to; change its permissions (chmod u+rw {shlex.quote(str(file))})"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"is in {above}, which cannot be written to; set another file"
    return None


def _find_schema_problems(connection: Connection, address: Address, said: str) -> list[str]:
    from sqlalchemy import inspect, text

    tables = set(inspect(connection).get_table_names())
    if not {"experiments", "alembic_version"} <= tables:
        if not tables or sqlite_file(address.uri) is None:
            return []  # MLflow makes its tables there
        return [f"{said} is another program's database; set another file"]
    version = connection.execute(text("select version_num from alembic_version")).scalar()
    newest, known = _revisions()
    if version not in known:
        return [
            f"{said} was made by a newer MLflow than the one installed; pip install --upgrade "
            "mlflow, or set tracking.uri to another store"
        ]
    if version != newest:
        uri = f'"${URI_VARIABLE}"' if MASK in address.uri else shlex.quote(address.uri)
        return [f"{said} was made by an older MLflow; copy it, then run: mlflow db upgrade {uri}"]
    query = text("select experiment_id, lifecycle_stage from experiments where name = :name")
    row = connection.execute(query, {"name": address.experiment}).first()
    if row is not None and row[1] == "deleted":
        return [deleted_experiment(address.uri, address.experiment, str(row[0]))]
    return []


def _revisions() -> tuple[str, set[str]]:
    """Return the newest schema of the installed MLflow, and all it knows, without importing it."""
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "store" / "db_migrations" / "versions"
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    known, before = (
        {name for text in texts for name in re.findall(rf'^{key} = "(\w+)"', text, re.MULTILINE)}
        for key in ("revision", "down_revision")
    )
    (newest,) = known - before
    return newest, known
