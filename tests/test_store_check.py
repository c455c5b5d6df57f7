"""The check of the store before the start: what is refused with a remedy, and what is not."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import TrackingConfig
from finetune.config.store_address import find_address
from finetune.problems import Refused
from finetune.tracking.mlflow_store import find_experiment, open_store
from finetune.tracking.store_check import find_store_problems, store_checked

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


def problems(uri: str, **settings: Any) -> list[str]:
    return find_store_problems(find_address(TrackingConfig(uri=uri, **settings), {}))


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("file:./mlruns", "sqlite:///mlflow.db"),
        ("file:///data/mlruns", "sqlite:///mlflow.db"),
        ("./mlruns", "sqlite:///mlflow.db"),
        ("/data/mlruns", "sqlite:///mlflow.db"),
        ("mlflow.db", "sqlite:///mlflow.db"),
        ("runs/all.sqlite3", "sqlite:///runs/all.sqlite3"),
        ("localhost:5000", "http://localhost:5000"),
        ("10.0.0.1:80/mlflow", "http://10.0.0.1:80/mlflow"),
        ("sqlite://mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite:mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite:/tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("sqlite:///", "sqlite:///mlflow.db"),
        ("sqlite:///:memory:", "sqlite:///mlflow.db"),
        ("http://", "http://HOST:PORT"),
        ("http://host:port", "http://HOST:PORT"),
        ("https:///x", "https://HOST:PORT"),
        ("postgres://me@host/db", "postgresql://me@host/db"),
        ("mysql+nodriver://host/db", "write postgresql://"),
        ("redis://host", "sqlite:///mlflow.db"),
        ("htp://host", "sqlite:///mlflow.db"),
        ("uc:profile", "sqlite:///mlflow.db"),
    ],
)
def test_a_wrong_form_is_refused_with_the_right_one(uri: str, remedy: str) -> None:
    """No request is sent and no file is made for it."""
    (problem,) = problems(uri)
    assert problem.startswith("tracking.uri=")
    assert remedy in problem


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile"])
def test_stores_of_plugins_are_left_to_them(uri: str) -> None:
    """MLflow knows more stores than this check."""
    assert problems(uri) == []


def test_a_driver_that_is_not_installed_is_named() -> None:
    """With the package that has it."""
    (problem,) = problems("mysql://me@host/db")
    assert "pip install mysqlclient" in problem


def test_a_variable_is_named_where_the_address_is_from_it() -> None:
    """The remedy changes what was set."""
    address = find_address(TrackingConfig(), {"MLFLOW_TRACKING_URI": "./mlruns"})
    (problem,) = find_store_problems(address)
    assert problem.startswith("MLFLOW_TRACKING_URI=./mlruns ")


def damage_folder(store: Path) -> None:
    store.unlink()
    store.mkdir()


def damage_text(store: Path) -> None:
    store.write_text("this is a text file, longer than the header of a database is\n" * 20)


def damage_other_program(store: Path) -> None:
    store.unlink()
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("create table visits (url text)")


def set_version(store: Path, version: str) -> None:
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("update alembic_version set version_num = ?", [version])
        connection.commit()


def damage_newer(store: Path) -> None:
    set_version(store, "ffffffffffff")


def damage_older(store: Path) -> None:
    set_version(store, "451aebb31d03")


def damage_deleted_experiment(store: Path) -> None:
    client = open_store(f"sqlite:///{store}")
    client.delete_experiment(find_experiment(client, f"sqlite:///{store}", "finetune"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_folder, "is a folder; name a file"),
        (damage_text, "is no SQLite database"),
        (damage_other_program, "another program's database"),
        (damage_newer, "pip install --upgrade mlflow"),
        (damage_older, "mlflow db upgrade"),
        (damage_deleted_experiment, "mlflow experiments restore --experiment-id 1"),
    ],
)
def test_a_file_that_can_never_take_the_runs_is_refused(
    uri: str, tmp_path: Path, damage: Any, said: str
) -> None:
    """With the remedy, and the folder is left as it was."""
    damage(tmp_path / "mlflow.db")
    before = sorted(p.name for p in tmp_path.iterdir())
    (problem,) = problems(uri)
    assert said in problem
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_another_experiment_of_the_store_is_taken(uri: str, tmp_path: Path) -> None:
    """The second remedy of a deleted experiment."""
    damage_deleted_experiment(tmp_path / "mlflow.db")
    assert problems(uri, experiment="other") == []


@pytest.mark.parametrize("path", ["mlflow.db", "new/er/mlflow.db", "empty.db"])
def test_a_store_that_is_still_to_be_made_is_neither_refused_nor_made(
    tmp_path: Path, path: str
) -> None:
    """A dry run, or a refused grid, leaves nothing."""
    (tmp_path / "empty.db").touch()
    assert problems(f"sqlite:///{tmp_path / path}") == []
    assert [p.name for p in tmp_path.iterdir()] == ["empty.db"]
    assert (tmp_path / "empty.db").stat().st_size == 0


def test_a_file_in_the_path_is_refused(tmp_path: Path) -> None:
    """No folder can be made below it."""
    (tmp_path / "file").touch()
    assert "which is not a folder" in problems(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")[0]


@pytest.mark.parametrize("readonly", ["mlflow.db", "."])
def test_what_cannot_be_written_to_is_refused(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readonly: str
) -> None:
    """A read-only file, or its folder, where SQLite's journal is made."""
    access = os.access
    place = (tmp_path / readonly).resolve()

    def refuse(path: Path, mode: int) -> bool:  # root, who may run this, may write anywhere
        return access(path, mode) and not (mode & os.W_OK and Path(path) == place)

    monkeypatch.setattr(os, "access", refuse)
    assert "cannot be written to" in problems(uri)[0]


def test_a_busy_file_is_not_refused(uri: str, tmp_path: Path) -> None:
    """It is free again in a moment."""
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("pragma journal_mode=delete")
        connection.execute("begin exclusive")
        assert problems(uri) == []


@contextmanager
def answering(status: int, body: str, seen: list[str] | None = None) -> Iterator[str]:
    """A server that gives every request one answer; `seen` takes their Authorization."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if seen is not None:
                seen.append(self.headers.get("Authorization", ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


ABSENT = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"})
DELETED = json.dumps(
    {"experiment": {"experiment_id": "7", "name": "finetune", "lifecycle_stage": "deleted"}}
)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, "who?", "MLFLOW_TRACKING_TOKEN"),
        (403, "Invalid Host header", "Invalid Host header"),
        (404, "<html>", "not as an MLflow server"),
        (200, "<html>", "not as an MLflow server"),
        (200, DELETED, "mlflow experiments restore --experiment-id 7"),
        (404, ABSENT, None),
        (500, "oops", None),
        (503, "try later", None),
    ],
)
def test_a_server_that_refuses_is_told_from_one_that_is_away(
    status: int, body: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what will not change by itself stops the start."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with answering(status, body) as uri:
        found = problems(uri)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_a_server_that_is_not_there_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go on, and sync catches up."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert problems(f"http://127.0.0.1:{port}") == []


@pytest.mark.parametrize(
    ("variables", "header"),
    [
        ({"MLFLOW_TRACKING_TOKEN": "t0k3n"}, "Bearer t0k3n"),
        (
            {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "pw"},
            "Basic bWU6cHc=",
        ),
    ],
)
def test_tokens_and_basic_authentication_come_from_the_environment(
    variables: dict[str, str], header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MLflow's own clients do it."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    seen: list[str] = []
    with answering(404, ABSENT, seen) as uri:
        assert problems(uri) == []
    assert set(seen) == {header}


def test_the_problems_of_grid_and_store_come_at_once(tmp_path: Path) -> None:
    """One refusal names both."""
    with (
        pytest.raises(Refused) as refused,
        store_checked(TrackingConfig(uri=f"sqlite:///{tmp_path}")),
    ):
        raise Refused(["lora.r is 0"])
    assert len(refused.value.problems) == 2
    with pytest.raises(Refused), store_checked(TrackingConfig(uri=f"sqlite:///{tmp_path}")):
        pass
    with store_checked(TrackingConfig(uri="nonsense", enabled=False)):
        pass


def test_a_store_in_order_has_no_problem(uri: str) -> None:
    """The check reads what MLflow wrote."""
    assert problems(uri) == []
