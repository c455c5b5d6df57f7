"""A run is removed with its MLflow run, artifacts and model versions, and no other one is."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import pytest

from finetune.problems import Refused
from finetune.tracking import run_removal
from finetune.tracking.claims import CLAIM_FILE, claimed
from finetune.tracking.mirror import Mirror
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.run_removal import NotRemoved, find_copies, held, remove_run
from finetune.tracking.sweep_summary import SweepSummary
from tests.test_tracker import recorded_run, tracker


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep of two runs that MLflow has, the first one its champion."""
    folder = tmp_path_factory.mktemp("tracked")
    uri = f"sqlite:///{folder}/mlflow.db"
    sent = tracker(uri, folder / "reports" / "sweep")
    for name in ("one", "two"):
        sent.follow(recorded_run(folder / name, num_steps=2))
    sent.describe(SweepSummary(champion="one"))
    assert sent.close(state="finished") is None
    return folder, uri


def test_a_run_is_removed_everywhere(tracked: tuple[Path, str]) -> None:
    """Folder, MLflow run, artifacts, the champion's version and its model; the other run stays."""
    folder, uri = tracked
    client, reports = mlflow.MlflowClient(uri), folder / "reports"
    one, two = (RunFolder(folder / name) for name in ("one", "two"))
    (copy,) = find_copies(one, reports)
    (other,) = find_copies(two, reports)
    artifacts = [
        Path(client.get_run(str(found.run_id)).info.artifact_uri.removeprefix("file://"))
        for found in (copy, other)
    ]
    assert [path.is_dir() for path in artifacts] == [True, True]
    with held([one], reports) as copies:
        assert remove_run(one, copies["one"]) == []
    assert not one.path.exists()
    assert [path.parent.exists() for path in artifacts] == [False, True]
    with pytest.raises(mlflow.MlflowException, match="not found"):
        client.get_run(str(copy.run_id))
    assert client.search_registered_models() == []
    mirror = Mirror.load(reports / "sweep" / "mlflow.json")
    assert (list(mirror.children), mirror.summary.champion) == (["two"], None)
    assert client.get_run(str(other.run_id)).info.run_name == "two"
    assert two.path.exists()


def test_artifacts_that_are_not_the_runs_alone_are_left(
    tracked: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of somebody else may name any folder; the run is not removed then."""
    folder, _ = tracked
    two = RunFolder(folder / "two")
    precious = tmp_path / "precious"
    precious.mkdir()
    with pytest.raises(ValueError, match="not a folder of that run alone"):
        run_removal._remove_local_artifacts(precious.as_uri(), "id")
    assert precious.is_dir()

    def fail(uri: str, run_id: str) -> None:
        raise ConnectionError("refused\nmore")

    monkeypatch.setattr(run_removal, "_remove_from_store", fail)
    with held([two], folder / "reports") as copies, pytest.raises(NotRemoved, match="refused;"):
        remove_run(two, copies["two"])
    assert two.path.is_dir()


def test_a_sweep_at_work_keeps_its_runs(tracked: tuple[Path, str]) -> None:
    """Its process would send what is removed again."""
    folder, _ = tracked
    sweep = folder / "reports" / "sweep"
    two = RunFolder(folder / "two")
    with (
        claimed(sweep / CLAIM_FILE),
        pytest.raises(Refused, match="is running in"),
        held([two], folder / "reports"),
    ):
        pass


def test_a_server_that_nobody_typed_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the user's credentials; with the variable it is the user's choice."""
    uri = "https://mlflow.example.org"
    path = tmp_path / "sweep" / "mlflow.json"
    path.parent.mkdir()
    mirror = Mirror(uri, "e", "s", [])
    mirror.add(RunFolder(tmp_path / "run"), path)
    mirror.children["run"].run_id = "id"
    mirror.save(path)
    with pytest.raises(Refused, match="if you trust that server, set MLFLOW_TRACKING_URI=https"):
        find_copies(RunFolder(tmp_path / "run"), tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert len(find_copies(RunFolder(tmp_path / "run"), tmp_path)) == 1


def test_a_store_that_is_gone_holds_nothing_back(tmp_path: Path) -> None:
    """The folder of a run can be removed after its database."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = recorded_run(tmp_path / "run", num_steps=2)
    sent = tracker(uri, tmp_path / "reports" / "sweep")
    sent.follow(run)
    assert sent.close(state="finished") is None
    (tmp_path / "mlflow.db").unlink()
    shutil.rmtree(tmp_path / "mlartifacts")
    with held([run], tmp_path / "reports") as copies:
        assert remove_run(run, copies["run"]) == []
    assert not run.path.exists()
    assert not (tmp_path / "mlflow.db").exists()
