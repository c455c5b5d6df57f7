"""What a store lost is made anew from the events, and ended as the sweep was."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import sync
from finetune.config.schema import TrackingConfig
from finetune.tracking.mirror import Mirror
from finetune.tracking.mlflow_store import open_store
from finetune.tracking.run_folder import RunFolder, Status
from finetune.tracking.sweep_record import RunRecord, SweepRecord
from finetune.tracking.sweep_summary import SweepSummary
from finetune.tracking.tracker import build_tracker, send
from tests.test_tracker import history, recorded_run, tracker

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own

STEPS = [1, 2, 3]
SUMMARY = SweepSummary(champion="run-1", metrics=["train/loss"])


def tracked_sweep(uri: str, folder: Path) -> Path:
    """A sweep of two runs that ended and was sent; return its mlflow.json."""
    runs = [recorded_run(folder / f"run-{number}", num_steps=3) for number in (1, 2)]
    tracked = tracker(uri, folder / "sweep")
    for run in runs:
        tracked.follow(run)
    tracked.describe(SUMMARY)
    assert tracked.close(state="finished") is None
    return folder / "sweep" / "mlflow.json"


def assert_whole(uri: str, path: Path) -> Mirror:
    """Ended, with champion and view, and each run once below its parent, with every step."""
    mirror, client = Mirror.load(path), open_store(uri)
    parent = client.get_run(str(mirror.run_id))
    assert (parent.info.lifecycle_stage, parent.info.status) == ("active", "FINISHED")
    tags = client.get_experiment(parent.info.experiment_id).tags
    assert f"mlflow.sharedViewState.finetune-{mirror.name}" in tags
    champion = client.get_model_version_by_alias(mirror.name, "champion")
    assert champion.run_id == mirror.children["run-1"].run_id
    below = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{mirror.run_id}'"
    )
    assert {run.info.run_name for run in below} == {"run-1", "run-2"}
    assert len(below) == 2
    for run in below:
        assert history(uri, run.info.run_id) == STEPS
    return mirror


def lose_store(uri: str, mirror: Mirror, template: Path) -> None:
    file = Path(uri.removeprefix("sqlite:///"))
    for path in file.parent.glob("mlflow.db*"):
        path.unlink()
    shutil.copy(template, file)  # made anew, which takes seconds


def lose_parent(uri: str, mirror: Mirror, template: Path) -> None:
    open_store(uri).delete_run(str(mirror.run_id))


def lose_a_run(uri: str, mirror: Mirror, template: Path) -> None:
    open_store(uri).delete_run(str(mirror.children["run-2"].run_id))


def lose_all_runs(uri: str, mirror: Mirror, template: Path) -> None:
    lose_parent(uri, mirror, template)
    for child in mirror.children.values():
        open_store(uri).delete_run(str(child.run_id))


def lose_ids(uri: str, mirror: Mirror, template: Path) -> None:
    """What is in the file are ids of another store, as after a copy of the sweep's folder."""
    mirror.experiment_id = "99"
    mirror.run_id = mirror.children["run-1"].run_id = "ab" * 16


def lose_model(uri: str, mirror: Mirror, template: Path) -> None:
    open_store(uri).delete_registered_model(mirror.name)


SLOW = [
    pytest.param(lose, marks=pytest.mark.slow)
    for lose in (lose_parent, lose_a_run, lose_ids, lose_model)
]


@pytest.mark.parametrize("lose", [lose_store, lose_all_runs, *SLOW])
def test_what_the_store_lost_is_made_anew(
    lose: Callable[[str, Mirror, Path], None], uri: str, tmp_path: Path, template_store: Path
) -> None:
    """By sync, and by the same command, which send in the same way; twice changes nothing."""
    path = tracked_sweep(uri, tmp_path)
    mirror = Mirror.load(path)
    lose(uri, mirror, template_store)
    mirror.save(path)
    for _ in range(2):
        send(Mirror.load(path), path)
        assert_whole(uri, path)


@pytest.mark.slow
def test_the_same_command_makes_anew_too(uri: str, tmp_path: Path, template_store: Path) -> None:
    """Its tracker verifies what an earlier one sent."""
    path = tracked_sweep(uri, tmp_path)
    lose_store(uri, Mirror.load(path), template_store)
    tracked_sweep(uri, tmp_path)
    assert_whole(uri, path)


def test_a_store_that_is_replaced_in_mid_sweep_gets_everything(
    uri: str, tmp_path: Path, template_store: Path
) -> None:
    """One process, one mirror: no connection to the deleted file is kept."""
    path = tmp_path / "mlflow.json"
    mirror = Mirror(uri, "e", "s", [])
    mirror.add(recorded_run(tmp_path / "run", num_steps=3), path)
    send(mirror, path)
    lose_store(uri, mirror, template_store)
    mirror.add(recorded_run(tmp_path / "run-2", num_steps=3), path)
    send(mirror, path)
    for child in mirror.children.values():
        assert history(uri, child.run_id) == STEPS


def test_a_deleted_experiment_is_told_with_the_remedy_and_restored(
    uri: str, tmp_path: Path
) -> None:
    """Nothing is sent into it; after the remedy everything is as before."""
    path = tracked_sweep(uri, tmp_path)
    mirror, client = Mirror.load(path), open_store(uri)
    client.delete_experiment(str(mirror.experiment_id))
    with pytest.raises(ValueError, match="mlflow experiments restore --experiment-id 1"):
        send(mirror, path)
    client.restore_experiment(str(mirror.experiment_id))
    send(Mirror.load(path), path)
    assert Mirror.load(path).run_id == assert_whole(uri, path).run_id


def sync_now(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["finetune.sync", str(folder)])
    with pytest.raises(SystemExit) as ended:
        sync.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("sent_before", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sync_ends_a_sweep_whose_store_went_away(
    sent_before: bool, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the end of the sweep said is kept: state, champion and view."""
    monkeypatch.setattr("finetune.tracking.tracker.POLL_SECONDS", 0.05)
    if sent_before:
        tracked_sweep(uri, tmp_path)
    file = tmp_path / "mlflow.db"
    file.rename(tmp_path / "away.db")
    file.mkdir()  # no store can be opened here
    runs = [recorded_run(tmp_path / f"run-{number}", num_steps=3) for number in (1, 2)]
    tracked = tracker(uri, tmp_path / "sweep")
    for run in runs:
        tracked.follow(run)
    tracked.describe(SUMMARY)
    behind = tracked.close(state="finished")
    assert "python -m finetune.sync" in str(behind)
    assert sync_now(tmp_path / "sweep", monkeypatch) == 1
    file.rmdir()
    (tmp_path / "away.db").rename(file)
    assert sync_now(tmp_path / "sweep", monkeypatch) == 0
    assert_whole(uri, tmp_path / "sweep" / "mlflow.json")


def test_sync_ends_a_sweep_that_was_killed(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never came to say how it ended; its runs say so."""
    sweep = tmp_path / "sweep"
    path = tracked_sweep(uri, tmp_path)
    mirror = Mirror.load(path)
    mirror.state, mirror.summary = "running", SweepSummary()
    mirror.save(path)
    for name in ("run-1", "run-2"):
        RunFolder(tmp_path / name).write_status(Status("finished", None, 1.0, 2.0))
    records = [RunRecord(f"../{name}", {}) for name in ("run-1", "run-2")]
    SweepRecord("sweep", [], [], [], records).write(sweep)
    assert sync_now(sweep, monkeypatch) == 0
    client = open_store(uri)
    assert client.get_run(str(mirror.run_id)).info.status == "FINISHED"


def timed_run(folder: Path, *times: int) -> RunFolder:
    """A run that began, was interrupted, was resumed and finished at the given times."""
    states = ["running", "interrupted", "running", "finished"]
    events = [
        {"event": "status", "state": state, "reason": None, "time": time}
        for state, time in zip(states, times, strict=True)
    ]
    folder.mkdir()
    lines = [json.dumps({"event": "param", "key": "a", "value": "1"}), *map(json.dumps, events)]
    (folder / "events.jsonl").write_text("".join(line + "\n" for line in lines))
    return RunFolder(folder)


@pytest.mark.parametrize(
    ("started", "parent"), [(500, (500, 9000)), (None, (1000, 9000)), (60_000, (60_000, 60_000))]
)
def test_replayed_runs_have_the_times_of_their_logs(
    uri: str, tmp_path: Path, started: int | None, parent: tuple[int, int]
) -> None:
    """However late they are sent; a sweep of runs that were finished before took no time."""
    path = tmp_path / "mlflow.json"
    mirror = Mirror(uri, "e", "s", [], started=started, state="finished")
    mirror.add(timed_run(tmp_path / "one", 1000, 2000, 3000, 4000), path)
    mirror.add(timed_run(tmp_path / "two", 5000, 6000, 8000, 9000), path)
    client = open_store(uri)
    for _ in range(2):
        send(mirror, path)
        times = [
            (info.start_time, info.end_time)
            for run_id in (mirror.run_id, *(c.run_id for c in mirror.children.values()))
            for info in [client.get_run(str(run_id)).info]
        ]
        assert times == [parent, (1000, 4000), (5000, 9000)]


def test_the_environment_holds_and_is_said_once(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Runs go where MLflow's own variables point."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    caplog.set_level("INFO", "finetune")
    (tmp_path / "sweep").mkdir()
    tracked = build_tracker(TrackingConfig(), tmp_path / "sweep", sweep_name="s", swept=[])
    tracked.follow(recorded_run(tmp_path / "run", num_steps=3))
    assert tracked.close(state="finished") is None
    assert open_store(uri).get_experiment_by_name("mine") is not None
    assert len([m for m in caplog.messages if m.startswith("tracking: ")]) == 1


def test_a_setting_holds_over_the_environment_to_the_last_artifact(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The champion too: nothing asks for MLflow's default store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    monkeypatch.chdir(tmp_path)
    assert_whole(uri, tracked_sweep(uri, tmp_path))
    assert not list(tmp_path.glob("other.db*"))
    assert not (tmp_path / "mlruns").exists()


def test_a_secret_of_the_environment_stands_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is it printed, when the store is away; old files are masked when they are next saved."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("finetune.tracking.tracker.POLL_SECONDS", 0.05)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s3cr3t@127.0.0.1:{port}/?token=t0k3n")
    caplog.set_level("DEBUG", "finetune")
    (tmp_path / "sweep").mkdir()
    tracked = build_tracker(TrackingConfig(), tmp_path / "sweep", sweep_name="s", swept=[])
    tracked.follow(recorded_run(tmp_path / "run", num_steps=3))
    said = str(tracked.close(state="finished")) + tracked.open_command + caplog.text
    files = [path.read_text() for path in (tmp_path / "sweep").iterdir()]
    assert "127.0.0.1" in said
    for secret in ("s3cr3t", "t0k3n"):
        assert secret not in said
        assert not any(secret in text for text in files)
    assert "s3cr3t" not in Mirror("postgresql://h/db?password=s3cr3t", "e", "s", []).uri
