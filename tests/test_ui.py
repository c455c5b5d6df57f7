"""The command that shows a sweep in MLflow: its store, its addresses, its refusals."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from finetune import ui
from finetune.problems import Refused
from finetune.tracking.mirror import Mirror
from finetune.tracking.tracked_sweep import find_tracked
from tests.test_tracker import recorded_run, tracker

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


def write_mirror(folder: Path, uri: str, age: float = 0.0, **fields: str) -> Mirror:
    folder.mkdir(parents=True)
    mirror = Mirror(uri, "finetune", folder.name, [], **fields)  # type: ignore[arg-type]
    mirror.save(folder / "mlflow.json")
    os.utime(folder / "mlflow.json", (time.time() - age,) * 2)
    return mirror


def test_the_last_sweeps_store_is_in_force(tmp_path: Path) -> None:
    """Its charts come first, then its run; a damaged file of another sweep is passed over."""
    store = tmp_path / "mlflow.db"
    store.write_text("x")
    write_mirror(tmp_path / "r" / "old", "sqlite:////elsewhere.db", age=100)
    write_mirror(tmp_path / "r" / "new", f"sqlite:///{store}", 10, experiment_id="1", run_id="ab")
    (tmp_path / "r" / "broken").mkdir()
    (tmp_path / "r" / "broken" / "mlflow.json").write_text("{")
    shown = find_tracked("", tmp_path / "r", {})
    assert shown.mirror is not None
    assert shown.mirror.name == "new"
    assert shown.pages() == {
        "charts": "#/experiments/1/runs?workflowType=machine_learning",
        "sweep": "#/experiments/1/runs/ab?workflowType=machine_learning",
    }


def test_the_environments_store_is_in_force(tmp_path: Path) -> None:
    """Of its sweeps the last one is shown; a store without one shows its experiments."""
    mine, other = tmp_path / "mine.db", tmp_path / "other.db"
    mine.write_text("x")
    other.write_text("x")
    write_mirror(tmp_path / "r" / "old", f"sqlite:///{mine}", age=100)
    write_mirror(tmp_path / "r" / "new", f"sqlite:///{other}")
    shown = find_tracked("", tmp_path / "r", {"MLFLOW_TRACKING_URI": f"sqlite:///{mine}"})
    assert shown.mirror is not None
    assert shown.mirror.name == "old"
    empty = find_tracked("", tmp_path / "none", {"MLFLOW_TRACKING_URI": f"sqlite:///{mine}"})
    assert empty.pages() == {"experiments": "#/experiments"}


@pytest.mark.parametrize(
    ("uri", "name", "expected"),
    [
        (None, "", "is tracked by MLflow; start one, or set MLFLOW_TRACKING_URI"),
        (None, "fast", "no sweep fast is tracked by MLflow"),
        ("sqlite:////nowhere/mlflow.db", "", "/nowhere/mlflow.db is missing; repeat the command"),
        ("postgresql://h/db", "one", "is served only if MLFLOW_TRACKING_URI is set to it"),
        ("sqlite:///x.db", "broken", "is damaged: "),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(
    uri: str | None, name: str, expected: str, tmp_path: Path
) -> None:
    """Before anything is started, with the remedy."""
    if uri is not None:
        write_mirror(tmp_path / "r" / "one", uri)
        (tmp_path / "r" / "broken").mkdir()
        (tmp_path / "r" / "broken" / "mlflow.json").write_text("{")
    with pytest.raises(Refused) as refused:
        find_tracked(name, tmp_path / "r", {})
    (problem,) = refused.value.problems
    assert expected in problem
    assert "\n" not in problem


def test_a_secret_stays_out_of_the_message(tmp_path: Path) -> None:
    """The store's password is in the environment alone."""
    uri = "postgresql://me:s3cr3t@h/db"
    write_mirror(tmp_path / "r" / "one", uri)
    shown = find_tracked("one", tmp_path / "r", {"MLFLOW_TRACKING_URI": uri})
    assert "s3cr3t" not in shown.uri
    with pytest.raises(Refused) as refused:
        find_tracked("one", tmp_path / "r", {})
    assert "s3cr3t" not in str(refused.value)


def test_a_server_is_printed_and_none_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has a UI already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(ui, "serve", None)
    write_mirror(Path("multirun_reports") / "s", "http://host:9/", experiment_id="3", run_id="ab")
    monkeypatch.setattr("sys.argv", ["finetune.ui"])
    ui.main()
    assert "sweep: http://host:9/#/experiments/3/runs/ab" in capsys.readouterr().out


def test_a_port_in_use_is_refused_where_it_was_asked_for() -> None:
    """Without one the next free port is taken."""
    with socket.create_server((ui.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Refused, match="set --port to another one"):
            ui.find_port(port)
    assert ui.PORT <= ui.find_port(None) < ui.PORT + ui.PORTS
    with pytest.raises(Refused, match="--port=70000 is no port"):
        ui.find_port(70000)


@pytest.mark.parametrize("arguments", [["nothing"], ["--port", "0"]])
def test_bad_input_ends_with_code_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line, no server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ui, "serve", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    (tmp_path / "mlflow.db").write_text("x")
    monkeypatch.setattr("sys.argv", ["finetune.ui", *arguments])
    with pytest.raises(SystemExit) as ended:
        ui.main()
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_mlflow_answers_until_the_command_is_stopped(uri: str, tmp_path: Path) -> None:
    """A real server on loopback, at the address that is printed; it ends with the command."""
    folder = tmp_path / "multirun_reports" / "sweep"
    tracked = tracker(uri, folder)
    tracked.follow(recorded_run(tmp_path / "run"))
    assert tracked.close(state="finished") is None
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    command = subprocess.Popen(
        [sys.executable, "-m", "finetune.ui"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert command.stdout is not None
        said = [command.stdout.readline() for _ in range(4)]
        address = said[2].removeprefix("sweep: ").strip()
        root = address.partition("/#")[0]
        with urllib.request.urlopen(root, timeout=10) as page:  # noqa: S310  # of this machine
            assert page.status == 200
        command.terminate()
        assert command.wait(30) == 75
    finally:
        command.kill()
    with pytest.raises(OSError):  # noqa: PT011  # of whatever kind
        urllib.request.urlopen(root, timeout=2)  # noqa: S310  # of this machine
