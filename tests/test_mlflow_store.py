"""The SQLite store: its journal on a network, and its files in folders of odd names."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from finetune.config.schema import TrackingConfig
from finetune.config.store_address import find_address
from finetune.tracking.mirror import Mirror
from finetune.tracking.mlflow_store import NETWORK, make_sqlite_store, network_type
from finetune.tracking.store_check import find_store_problems
from finetune.tracking.tracker import send
from tests.test_store_address import PLACES
from tests.test_tracker import recorded_run

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


def mount(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str) -> None:
    """Pretend that a folder is a mounted file system of a kind."""
    mounts = [("/", "ext4"), (str(folder), "autofs"), (str(folder), kind)]
    partitions = [SimpleNamespace(mountpoint=place, fstype=fstype) for place, fstype in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: partitions)


def journal(store: Path) -> str:
    with closing(sqlite3.connect(store)) as connection:
        return str(connection.execute("pragma journal_mode").fetchone()[0])


@pytest.mark.parametrize("kind", ["nfs4", "NFS", "cifs", "lustre", "gpfs", "fuse.sshfs", "9p"])
def test_a_network_file_system_is_known(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the type of the innermost mount."""
    mount(monkeypatch, tmp_path, kind)
    assert network_type(tmp_path) == kind.lower()
    assert network_type(tmp_path / "below") in NETWORK
    assert network_type(tmp_path.parent) is None


def test_a_local_file_system_keeps_the_write_ahead_log(
    template_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the faster one, and safe there."""
    mount(monkeypatch, tmp_path, "xfs")
    store = shutil.copy(template_store, tmp_path / "mlflow.db")
    make_sqlite_store(Path(store))
    assert journal(Path(store)) == "wal"


def test_a_store_on_a_network_leaves_the_write_ahead_log(
    template_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also one that was made elsewhere; it is said once."""
    store = Path(shutil.copy(template_store, tmp_path / "mlflow.db"))
    assert journal(store) == "wal"
    mount(monkeypatch, tmp_path, "nfs4")
    caplog.set_level("INFO", "finetune")
    for _ in range(2):
        make_sqlite_store(store)
    assert journal(store) == "delete"
    assert len([m for m in caplog.messages if "nfs4" in m and "journal_mode=delete" in m]) == 1


@pytest.mark.slow
def test_a_new_store_on_a_network_has_no_write_ahead_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its first day."""
    mount(monkeypatch, tmp_path, "nfs4")
    make_sqlite_store(tmp_path / "mlflow.db")
    assert journal(tmp_path / "mlflow.db") == "delete"


@pytest.mark.parametrize("name", PLACES)
def test_store_and_artifacts_are_made_inside_a_folder_of_an_odd_name(
    name: str, template_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing beside it, and nothing under another name."""
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(template_store, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    address = find_address(TrackingConfig(), {})
    assert find_store_problems(address) == []
    mirror = Mirror(address.uri, "e é?%", "s", [])
    mirror.add(recorded_run(folder / "run", num_steps=3), folder / "mlflow.json")
    send(mirror, folder / "mlflow.json")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert json.loads((folder / "mlflow.json").read_text())["children"]["run"]["run_id"]
    assert list((folder / "mlartifacts").glob("*/*/artifacts/adapter/adapter_config.json"))
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection:
        assert connection.execute("select count(*) from runs").fetchone() == (2,)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES[:3])
def test_a_new_store_is_made_inside_a_folder_of_an_odd_name(name: str, tmp_path: Path) -> None:
    """The migration runs on a temporary name beside it."""
    (tmp_path / name).mkdir()
    make_sqlite_store(tmp_path / name / "mlflow.db")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "mlflow.db").stat().st_size > 0
