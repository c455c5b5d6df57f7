"""The MLflow mirror: everything once, whatever dies, and never in a run's way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from finetune import sync
from finetune.config.rules import find_problems
from finetune.config.schema import Config, DataConfig, TrackingConfig
from finetune.tracking.claims import CLAIM_FILE, claimed
from finetune.tracking.events import EventLog
from finetune.tracking.mirror import Mirror
from finetune.tracking.mlflow_store import open_store
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.tracker import NullTracker, Tracker, build_tracker, send
from tests.conftest import TINY, Command

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


def recorded_run(folder: Path, num_steps: int = 50) -> RunFolder:
    """A run that logged one of everything and `num_steps` losses."""
    run = RunFolder(folder)
    events = EventLog(run.events)
    events.status("running")
    events.params({"lora.r": "4", "data.path": "x" * 7000})
    events.tag("note", "hello")
    events.dataset("rows", digest="ab" * 32, source="rows.jsonl", context="training", rows=7)
    for step in range(1, num_steps + 1):
        events.metrics({"train/loss": 1 / step}, step)
    run.write_json("adapter/adapter_config.json", {"r": 4})
    events.artifact("adapter", "adapter")
    events.status("diverged", "loss became nan")
    events.close()
    return run


def tracker(uri: str, sweep_dir: Path) -> Tracker:
    sweep_dir.mkdir(parents=True, exist_ok=True)
    return build_tracker(
        TrackingConfig(uri=uri), sweep_dir, sweep_name=sweep_dir.name, swept=["lora.r"]
    )


def history(uri: str, run_id: str | None, key: str = "train/loss") -> list[int]:
    import mlflow

    return [m.step for m in mlflow.MlflowClient(uri).get_metric_history(str(run_id), key)]


def test_everything_arrives_under_the_sweeps_parent(uri: str, tmp_path: Path) -> None:
    """Metrics, params, tags, data set, artifact and end state, in a child of the sweep's run."""
    import mlflow

    run = recorded_run(tmp_path / "run")
    tracked = tracker(uri, tmp_path / "sweep")
    tracked.follow(run)
    assert tracked.close(state="failed") is None
    client = mlflow.MlflowClient(uri)
    child = client.get_run(str(tracked.run_id(run)))
    assert history(uri, child.info.run_id) == list(range(1, 51))
    assert child.data.params["lora.r"] == "4"
    assert child.data.params["data.path"].endswith("[7000 characters]")
    assert child.data.tags["note"] == "hello"
    assert child.data.tags["finetune.state"] == "diverged"
    assert child.data.tags["finetune.reason"] == "loss became nan"
    assert (child.info.status, child.info.run_name) == ("FAILED", "run")
    assert child.inputs is not None
    assert [i.dataset.name for i in child.inputs.dataset_inputs] == ["rows"]
    artifacts = client.list_artifacts(child.info.run_id, "adapter")
    assert [a.path for a in artifacts] == ["adapter/adapter_config.json"]
    parent = client.get_run(child.data.tags["mlflow.parentRunId"])
    assert (parent.info.run_name, parent.info.status) == ("sweep", "FAILED")


def test_sending_again_adds_nothing(uri: str, tmp_path: Path) -> None:
    """A mirror that forgot how far it was repeats itself without a trace."""
    run = recorded_run(tmp_path / "run")
    tracked = tracker(uri, tmp_path / "sweep")
    tracked.follow(run)
    assert tracked.close(state="finished") is None
    path = tmp_path / "sweep" / "mlflow.json"
    mirror = Mirror.load(path)
    mirror.children["run"].offset = 0
    assert send(mirror, path) > 50
    assert history(uri, tracked.run_id(run)) == list(range(1, 51))


def test_a_second_sweep_shows_a_finished_run_whole(uri: str, tmp_path: Path) -> None:
    """A run that an earlier sweep trained is replayed into a child of its own."""
    run = recorded_run(tmp_path / "run")
    ids = []
    for name in ("first", "second"):
        tracked = tracker(uri, tmp_path / name)
        tracked.follow(run)
        assert tracked.close(state="finished") is None
        ids.append(tracked.run_id(run))
    assert ids[0] != ids[1]
    assert history(uri, ids[1]) == list(range(1, 51))


def test_a_run_that_was_made_anew_gets_a_run_of_its_own(uri: str, tmp_path: Path) -> None:
    """Its folder was deleted, as is the way to try a diverged run again; nothing is skipped."""
    path, mirror = tmp_path / "mlflow.json", Mirror(uri, "e", "s", [])
    mirror.add(recorded_run(tmp_path / "run"), path)
    send(mirror, path)
    first = mirror.children["run"].run_id
    shutil.rmtree(tmp_path / "run")
    recorded_run(tmp_path / "run", num_steps=3)
    send(mirror, path)
    again = mirror.children["run"].run_id
    assert again != first
    assert history(uri, again) == [1, 2, 3]


def test_sync_leaves_a_sweep_at_work_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both would make the sweep's runs in MLflow."""
    Mirror("sqlite:///none/mlflow.db", "e", "s", []).save(tmp_path / "mlflow.json")
    monkeypatch.setattr("sys.argv", ["finetune.sync", str(tmp_path)])
    with claimed(tmp_path / CLAIM_FILE), pytest.raises(SystemExit) as ended:
        sync.main()
    assert ended.value.code == 1
    assert "the sweep is running" in capsys.readouterr().err


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    """It would stand in files, logs and on the screen."""
    tracking = TrackingConfig(uri="https://me:secret@host/")
    (problem,) = find_problems(Config(data=DataConfig(path="x"), tracking=tracking))
    assert "MLFLOW_TRACKING_PASSWORD" in problem
    assert "secret" not in problem


def test_a_torn_last_line_waits_for_its_rest(uri: str, tmp_path: Path) -> None:
    """Half a line is not sent; the whole one is, once."""
    run = recorded_run(tmp_path / "run", num_steps=2)
    line = json.dumps({"event": "metric", "key": "train/loss", "value": 0.1, "step": 3, "time": 1})
    with run.events.open("a") as file:
        file.write(line[:20])
    path = tmp_path / "mlflow.json"
    mirror = Mirror(uri, "e", "s", [])
    from finetune.tracking.mirror import Child

    mirror.children["run"] = Child(str(run.path))
    send(mirror, path)
    assert history(uri, mirror.children["run"].run_id) == [1, 2]
    with run.events.open("a") as file:
        file.write(line[20:] + "\n")
    send(mirror, path)
    assert sorted(history(uri, mirror.children["run"].run_id)) == [1, 2, 3]


@pytest.mark.slow
def test_a_store_that_is_down_stops_nothing_and_sync_recovers_all(
    template_store: Path, tmp_path: Path, finetune: Command
) -> None:
    """Nothing is lost while the store is away; the remedy that is printed works."""
    run = recorded_run(tmp_path / "run")
    (tmp_path / "mlflow.db").mkdir()  # no store can be opened or made here
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    started = time.monotonic()
    tracked = tracker(uri, tmp_path / "multirun_reports" / "sweep")
    tracked.follow(run)
    behind = tracked.close(state="finished")
    assert time.monotonic() - started < 60
    assert behind is not None
    assert "python -m finetune.sync" in behind
    failed = finetune(module="finetune.sync")
    assert failed.returncode == 1
    (tmp_path / "mlflow.db").rmdir()
    shutil.copy(template_store, tmp_path / "mlflow.db")
    synced = finetune(module="finetune.sync")
    assert synced.returncode == 0, synced.stderr
    mirror = Mirror.load(tmp_path / "multirun_reports" / "sweep" / "mlflow.json")
    assert history(uri, mirror.children["run"].run_id) == list(range(1, 51))


def test_a_server_that_never_answers_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a sweep gives it a while, and names the command that sends the rest."""
    monkeypatch.setattr("finetune.tracking.tracker.CLOSE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        tracked = tracker(f"http://127.0.0.1:{deaf.getsockname()[1]}", tmp_path / "sweep")
        tracked.follow(recorded_run(tmp_path / "run"))
        behind = tracked.close(state="finished")
    assert "timed out" in str(behind)
    assert "python -m finetune.sync" in str(behind)


def serve(store: str, port: int) -> subprocess.Popen[bytes]:
    """Start a real MLflow server on loopback and wait until it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return server
        time.sleep(0.1)
    pytest.fail("the MLflow server did not start")


@pytest.mark.slow
def test_a_server_that_dies_in_mid_run_stops_nothing(
    uri: str, tmp_path: Path, finetune: Command
) -> None:
    """The run ends as if nothing had happened; sync brings a new server what the old one missed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    settings = [a for a in TINY if a != "tracking=none" and not a.startswith("data.num")]
    server = serve(uri, port)
    run = subprocess.Popen(
        [sys.executable, "-m", "finetune", *settings, "tracking=server", f"tracking.uri={address}",
         "training.batch_size=2", "data.num_examples=400", "training.epochs=8"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        while not (path := next(tmp_path.glob("multirun_reports/*/mlflow.json"), None)) or not any(
            child.offset > 0 for child in Mirror.load(path).children.values()
        ):
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)
        assert next(tmp_path.glob("outputs/*/training.json"), None) is None  # it is in mid-run
        said = run.communicate(timeout=300)[0]
    finally:
        run.kill()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert run.returncode == 0, said
    assert f"MLflow at {address} cannot be reached; the runs continue" in said
    assert "python -m finetune.sync" in said
    server = serve(uri, port)
    try:
        synced = finetune(module="finetune.sync")
        assert synced.returncode == 0, synced.stderr
        mirror = Mirror.load(path)
        (child,) = mirror.children.values()
        assert history(address, child.run_id) == list(range(1, 1601))
        client = open_store(address)
        parent = client.get_run(str(mirror.run_id))
        assert parent.info.status == "FINISHED"
        assert mirror.view is not None
        champion = client.get_model_version_by_alias(mirror.name, "champion")
        assert champion.run_id == child.run_id
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_a_mirror_killed_at_work_goes_on_where_it_was(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill -9 in the middle of sending: the next one completes it, each step once."""
    run = recorded_run(tmp_path / "run", num_steps=20_000)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from finetune.tracking.run_folder import RunFolder\n"
        "from tests.test_tracker import tracker\n"
        "import finetune.tracking.tracker; finetune.tracking.tracker.CLOSE_SECONDS = 300\n"
        "t = tracker(sys.argv[1], Path(sys.argv[2]))\nt.follow(RunFolder(Path(sys.argv[3])))\n"
        "print('following', flush=True); t.close(state='finished')"
    )
    arguments = [sys.executable, "-c", code, uri, str(tmp_path / "sweep"), str(run.path)]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=root, text=True)
    path = tmp_path / "sweep" / "mlflow.json"

    def num_sent() -> int:
        child = Mirror.load(path).children.get("run") if path.exists() else None
        return len(history(uri, child.run_id)) if child and child.run_id else 0

    while num_sent() == 0:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert 0 < num_sent() < 20_000
    assert Mirror.load(path).children["run"].offset == 0
    monkeypatch.setattr("finetune.tracking.tracker.CLOSE_SECONDS", 300.0)
    tracked = tracker(uri, tmp_path / "sweep")
    tracked.follow(run)
    assert tracked.close(state="finished") is None
    assert sorted(history(uri, tracked.run_id(run))) == list(range(1, 20_001))


@pytest.mark.slow
def test_four_processes_on_a_cold_store_lose_nothing(tmp_path: Path) -> None:
    """A store that does not exist yet is made once and takes everything."""
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    (tmp_path / "new").mkdir()
    code = (
        "import sys; from pathlib import Path; from tests.test_tracker import *\n"
        "import finetune.tracking.tracker; finetune.tracking.tracker.CLOSE_SECONDS = 300\n"
        "folder = Path(sys.argv[2]); run = recorded_run(folder / 'run')\n"
        "t = tracker(sys.argv[1], folder / 'sweep'); t.follow(run)\n"
        "behind = t.close(state='finished'); assert behind is None, behind"
    )
    root = Path(__file__).parents[1]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, uri, str(tmp_path / str(i))], cwd=root)
        for i in range(4)
    ]
    assert [process.wait() for process in processes] == [0] * 4
    for i in range(4):
        mirror = Mirror.load(tmp_path / str(i) / "sweep" / "mlflow.json")
        assert history(uri, mirror.children["run"].run_id) == list(range(1, 51))


def test_the_null_tracker_has_the_same_methods(tmp_path: Path) -> None:
    """tracking=none needs no special case anywhere."""
    tracked = build_tracker(TrackingConfig(enabled=False), tmp_path, sweep_name="s", swept=[])
    assert isinstance(tracked, NullTracker)
    run = RunFolder(tmp_path)
    tracked.follow(run)
    assert tracked.run_id(run) is None
    assert tracked.close(state="finished") is None
    assert list(tmp_path.iterdir()) == []
