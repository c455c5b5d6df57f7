"""Mirror the runs' event logs to MLflow, from a thread of the sweep's process.

The event logs are the truth. A store that is down or slow neither stops nor slows a run: what is
missing is sent later, by the next sweep or by `python -m finetune.sync`. Sending twice adds
nothing, since MLflow keeps one row for equal key, value, time and step.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.config import TrackingConfig
from finetune.mlflow_store import absolute_uri, find_experiment, is_server, open_store
from finetune.overrides import first_line
from finetune.run_folder import RunFolder, State, write_atomic
from finetune.showcase import register_champion, save_view

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("finetune")

END_STATES = {
    "running": "RUNNING", "finished": "FINISHED", "failed": "FAILED",
    "diverged": "FAILED", "interrupted": "KILLED",
}  # fmt: skip
POLL_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0  # between two tries while the store is down
CLOSE_SECONDS = 20.0  # that the end of a sweep waits for the store
LOCAL_UI = "http://127.0.0.1:5000"  # where `mlflow ui` serves
LONGEST_PARAM = 6000  # characters; MLflow cuts longer ones without a word
METRICS_A_CALL, PARAMS_A_CALL = 1000, 100  # MLflow's own limits


class Tracker(Protocol):
    """Where a sweep's runs are compared."""

    how_to_look: str

    def follow(self, run: RunFolder) -> None:
        """Mirror this run from now on, whole, also where an earlier sweep trained it."""

    def run_id(self, run: RunFolder) -> str | None:
        """Return the MLflow run of a run of this sweep, once it has one."""

    def close(
        self, *, state: State, champion: str | None = None, metrics: Sequence[str] = ()
    ) -> str | None:
        """Send the rest and end the sweep's own run; return what is missing, with its remedy.

        Args:
            state: how the sweep ended.
            champion: its best run, whose adapter is registered.
            metrics: what its saved view draws.
        """


class NullTracker:
    """Track nothing; the runs' own files are all there is."""

    how_to_look = ""

    def follow(self, run: RunFolder) -> None:
        pass

    def run_id(self, run: RunFolder) -> str | None:
        return None

    def close(
        self, *, state: State, champion: str | None = None, metrics: Sequence[str] = ()
    ) -> str | None:
        return None


@dataclass
class Child:
    """How far one run of the sweep has been sent."""

    path: str
    run_id: str | None = None
    offset: int = 0  # bytes of its event log that MLflow has


@dataclass
class Mirror:
    """What `mlflow.json` of a sweep says: where its runs are tracked and how far."""

    uri: str
    experiment: str
    name: str
    swept: list[str]
    experiment_id: str | None = None
    run_id: str | None = None
    state: State = "running"
    champion: str | None = None  # the best run, once the sweep has ended
    metrics: list[str] = field(default_factory=list)  # that its view draws
    view: str | None = None  # the view's address below the UI's root
    children: dict[str, Child] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._changing = threading.RLock()  # the sweep adds runs while a thread sends them

    @classmethod
    def load(cls, path: Path) -> Mirror:
        stored = json.loads(path.read_text(encoding="utf-8"))
        children = {name: Child(**child) for name, child in stored.pop("children").items()}
        return cls(**stored, children=children)

    def save(self, path: Path) -> None:
        with self._changing:
            write_atomic(path, json.dumps(asdict(self), indent=1) + "\n")

    def add(self, run: RunFolder, path: Path) -> None:
        """Mirror a run too; saved at once, so that sync knows of it should MLflow be down."""
        with self._changing:
            self.children.setdefault(run.name, Child(str(run.path))).path = str(run.path)
            self.save(path)

    def names(self) -> list[str]:
        with self._changing:
            return list(self.children)


def build_tracker(
    tracking: TrackingConfig, sweep_dir: Path, *, sweep_name: str, swept: Sequence[str]
) -> Tracker:
    """Return the sweep's tracker; one that was tracked before is continued.

    Args:
        tracking: store, experiment, and whether to track at all.
        sweep_dir: the sweep's folder below `multirun_reports`.
        sweep_name: the name of its MLflow run.
        swept: the keys that differ between its runs.
    """
    if not tracking.enabled:
        return NullTracker()
    uri, path = absolute_uri(tracking.uri), sweep_dir / "mlflow.json"
    mirror = Mirror(uri, tracking.experiment, sweep_name, list(swept))
    if path.exists():
        stored = Mirror.load(path)
        if (stored.uri, stored.experiment) == (uri, tracking.experiment):
            mirror = stored
            mirror.state = "running"
    mirror.save(path)
    return MlflowTracker(mirror, path)


class MlflowTracker:
    """Follow the event logs of a sweep's runs from a thread that alone talks to MLflow."""

    def __init__(self, mirror: Mirror, path: Path) -> None:
        self._mirror = mirror
        self._path = path
        self._closing = threading.Event()
        self._error: str | None = None
        self._thread = threading.Thread(target=self._keep_sending, daemon=True)
        self._thread.start()
        self.how_to_look = (
            f"open {mirror.uri}"
            if is_server(mirror.uri)
            else f"mlflow ui --backend-store-uri {mirror.uri}"
        )

    def follow(self, run: RunFolder) -> None:
        self._mirror.add(run, self._path)

    def run_id(self, run: RunFolder) -> str | None:
        child = self._mirror.children.get(run.name)
        return child.run_id if child else None

    def close(
        self, *, state: State, champion: str | None = None, metrics: Sequence[str] = ()
    ) -> str | None:
        self._mirror.state = state
        self._mirror.champion = champion
        self._mirror.metrics = list(metrics)
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive() and self._error is None:
            if self._mirror.view:
                ui = "" if is_server(self._mirror.uri) else f"\nthen open {LOCAL_UI}"
                self.how_to_look += f"{ui}/{self._mirror.view}"
            return None
        return (
            f"MLflow at {self._mirror.uri} has not everything ({self._error or 'it is slow'}); "
            f"send the rest with: python -m finetune.sync {self._path.parent}"
        )

    def _keep_sending(self) -> None:
        wait = POLL_SECONDS
        while not self._closing.wait(wait):
            wait = POLL_SECONDS if self._send() else min(2 * wait, LONGEST_WAIT_SECONDS)
        if not self._send():  # a store that others write to may be busy for a moment
            time.sleep(POLL_SECONDS)
            self._send()

    def _send(self) -> bool:
        """Send what is new; return whether the store took it."""
        try:
            send(self._mirror, self._path)
        except Exception as error:  # whatever a store may raise, the runs go on
            if self._error is None:
                log.warning("MLflow at %s cannot be reached; going on without", self._mirror.uri)
            self._error = f"{type(error).__name__}: {first_line(error)[:200]}"
            return False
        self._error = None
        return True


def send(mirror: Mirror, path: Path) -> int:
    """Send the runs' new events to MLflow; return how many were new.

    The mirror's file is saved after each run, so that a kill repeats one run's events at most.
    """
    client = open_store(mirror.uri)
    if mirror.experiment_id is None:
        mirror.experiment_id = find_experiment(client, mirror.uri, mirror.experiment)
    if mirror.run_id is None:
        mirror.run_id = _create_run(client, mirror, mirror.name, {"finetune.sweep": mirror.name})
        mirror.save(path)
        client.log_param(mirror.run_id, "swept", ", ".join(mirror.swept) or "nothing")
    num_events = 0
    for name in mirror.names():
        child = mirror.children[name]
        if _is_begun_anew(child):
            child.run_id, child.offset = None, 0
        if child.run_id is None:
            tags = {"mlflow.parentRunId": mirror.run_id, "finetune.sweep": mirror.name}
            child.run_id = _create_run(client, mirror, name, tags)
            mirror.save(path)
        events, offset = _new_events(child)
        if events:
            _send_events(client, child, events)
            child.offset = offset
            mirror.save(path)
            num_events += len(events)
    client.update_run(mirror.run_id, status=END_STATES[mirror.state])
    if mirror.metrics:
        mirror.view = save_view(client, mirror.run_id, mirror.name, mirror.swept, mirror.metrics)
    champion = mirror.children.get(mirror.champion or "")
    if champion is not None and champion.run_id is not None:
        for artifact in ("adapter", "model"):
            if (Path(champion.path) / artifact).exists():
                register_champion(client, mirror.name, champion.run_id, artifact)
    mirror.save(path)
    return num_events


def _is_begun_anew(child: Child) -> bool:
    """Return whether the run's folder was deleted and made again since its log was last read."""
    try:
        with (Path(child.path) / "events.jsonl").open("rb") as file:
            file.seek(max(0, child.offset - 1))
            return child.offset > 0 and file.read(1) != b"\n"
    except FileNotFoundError:
        return False


def _new_events(child: Child) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines that were not sent yet, and the offset behind them."""
    try:
        with (Path(child.path) / "events.jsonl").open("rb") as file:
            file.seek(child.offset)
            new = file.read()
    except FileNotFoundError:
        return [], child.offset
    whole = new[: new.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], child.offset + len(whole)


def _send_events(client: MlflowClient, child: Child, events: Sequence[dict[str, Any]]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

    assert child.run_id is not None
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_kind.setdefault(event["event"], []).append(event)
    _send_params(client, child.run_id, by_kind.get("param", []))
    metrics = [
        Metric(_key(e["key"]), e["value"], e["time"], e["step"]) for e in by_kind.get("metric", [])
    ]
    for start in range(0, len(metrics), METRICS_A_CALL):
        client.log_batch(child.run_id, metrics=metrics[start : start + METRICS_A_CALL])
    for event in by_kind.get("tag", []):
        client.set_tag(child.run_id, _key(event["key"]), event["value"])
    for event in by_kind.get("dataset", []):
        source = json.dumps({"uri": event["source"]})
        profile = json.dumps({"num_rows": event["rows"]})
        digest = event["digest"][-36:]  # the longest that MLflow takes
        dataset = Dataset(event["name"], digest, "local", source, profile=profile)
        tags = [InputTag("mlflow.data.context", event["context"])]
        client.log_inputs(child.run_id, [DatasetInput(dataset, tags)])
    # An artifact may be told again after a resume: it is sent as it is now, once.
    for path, folder in {(e["path"], e["folder"]) for e in by_kind.get("artifact", [])}:
        local = Path(child.path) / path
        if local.is_dir():
            client.log_artifacts(child.run_id, str(local), folder)
        elif local.exists():
            client.log_artifact(child.run_id, str(local), folder)
    if "status" in by_kind:
        _send_status(client, child.run_id, by_kind["status"][-1])


def _send_params(client: MlflowClient, run_id: str, events: Sequence[dict[str, Any]]) -> None:
    """Send each parameter once; one that changed since is told in a tag, as MLflow keeps both."""
    from mlflow.entities import Param

    stored = client.get_run(run_id).data.params
    params = {_key(event["key"]): _shortened(event["value"]) for event in events}
    drift = [f"{k}: {stored[k]} -> {v}" for k, v in params.items() if stored.get(k, v) != v]
    if drift:
        client.set_tag(run_id, "param_drift", "; ".join(drift)[:4000])
    fresh = [Param(key, value) for key, value in params.items() if key not in stored]
    for start in range(0, len(fresh), PARAMS_A_CALL):
        client.log_batch(run_id, params=fresh[start : start + PARAMS_A_CALL])


def _send_status(client: MlflowClient, run_id: str, event: dict[str, Any]) -> None:
    client.set_tag(run_id, "finetune.state", event["state"])
    if event["reason"]:
        client.set_tag(run_id, "finetune.reason", event["reason"][:4000])
    if event["state"] == "running":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, END_STATES[event["state"]], end_time=event["time"])


def _create_run(client: MlflowClient, mirror: Mirror, name: str, tags: dict[str, str]) -> str:
    from mlflow.tracking.context.registry import resolve_tags

    assert mirror.experiment_id is not None
    created = client.create_run(
        mirror.experiment_id,
        start_time=int(time.time() * 1000),
        tags=resolve_tags(tags),
        run_name=name,
    )
    return str(created.info.run_id)


def _key(name: str) -> str:
    """Return a name in the letters that MLflow allows."""
    return re.sub(r"[^\w./ -]", "_", name)


def _shortened(value: str) -> str:
    if len(value) <= LONGEST_PARAM:
        return value
    note = f"... [{len(value)} characters]"
    return value[: LONGEST_PARAM - len(note)] + note
