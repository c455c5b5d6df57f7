"""Mirror the runs' event logs to MLflow, from a thread of the sweep's process.

The event logs are the source of truth. A store that is down or slow neither stops nor slows a run:
missing events are sent later, by the next sweep or by `python -m finetune.sync`. Sending twice adds
nothing, since MLflow keeps one row for equal key, value, time and step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.config.schema import TrackingConfig
from finetune.config.store_address import (
    find_address,
    is_server,
    sync_command,
    ui_command,
    without_secrets,
)
from finetune.files import Damaged, open_file, set_aside
from finetune.problems import first_line
from finetune.tracking.event_sending import END_STATES, create_run, run_info, send_events
from finetune.tracking.events import State, drop_superseded, parse_events
from finetune.tracking.mirror import Child, Mirror
from finetune.tracking.mlflow_store import find_experiment, open_store
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.run_names import IDENTITY
from finetune.tracking.summary_sending import send_report, send_summary
from finetune.tracking.sweep_record import find_labels
from finetune.tracking.sweep_summary import SweepSummary

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("finetune")

POLL_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0  # between two tries while the store is down
FLUSH_SECONDS = 10.0  # to wait for the store before the report is written, which links to it
CLOSE_SECONDS = 60.0  # to wait for the store at the end of a sweep
LOCAL_UI = "http://127.0.0.1:5000"  # where `finetune.ui` serves


class Tracker(Protocol):
    """The tracking of a sweep's runs."""

    open_command: str

    def follow(self, run: RunFolder) -> None:
        """Mirror all events of this run from now on, also those of an earlier sweep."""

    def run_id(self, run: RunFolder) -> str | None:
        """Return the MLflow run of a run of this sweep, once it has one."""

    def describe(self, summary: SweepSummary) -> None:
        """Show what is known of the sweep by now."""

    def flush(self) -> None:
        """Send what is new now, and wait a while for the store to take it."""

    def close(self, *, state: State) -> str | None:
        """Send missing events and the report, and end the sweep's MLflow run.

        Args:
            state: how the sweep ended.

        Returns:
            A remedy where some are unsent.
        """


def follow(tracker: Tracker, run: RunFolder) -> None:
    """Track a run; it is trained even if `mlflow.json` of its sweep cannot be written."""
    try:
        tracker.follow(run)
    except OSError as error:
        log.error("%s: mlflow.json of its sweep cannot be written: %s", run.name, error)


class NullTracker:
    """Track nothing: `tracking.enabled=false`."""

    open_command = ""

    def follow(self, run: RunFolder) -> None:
        pass

    def run_id(self, run: RunFolder) -> str | None:
        return None

    def describe(self, summary: SweepSummary) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self, *, state: State) -> str | None:
        return None


def build_tracker(
    tracking: TrackingConfig, sweep_dir: Path, *, sweep_name: str, swept: Sequence[str]
) -> Tracker:
    """Return the tracker of a new or continued sweep.

    Args:
        tracking: store, experiment, and whether to track at all.
        sweep_dir: the sweep's folder below `multirun_reports`.
        sweep_name: the name of its MLflow run.
        swept: the keys that differ between its runs.
    """
    if not tracking.enabled:
        return NullTracker()
    address, path = find_address(tracking), sweep_dir / "mlflow.json"
    mirror = Mirror(address.uri, address.experiment, sweep_name, list(swept))
    mirror.started = int(time.time() * 1000)
    stored = _load_or_set_aside(path) if path.exists() else None
    if stored is not None and (stored.uri, stored.experiment) == (address.uri, address.experiment):
        mirror = stored
        mirror.state = "running"
    if (line := address.describe()) is not None:
        log.info(line)
    mirror.save(path)
    return MlflowTracker(mirror, path)


def _load_or_set_aside(path: Path) -> Mirror | None:
    try:
        return Mirror.load(path)
    except Damaged as damage:
        set_aside(path, f"{damage}; its runs are sent to MLflow again")
        return None


class MlflowTracker:
    """Send the event logs of a sweep's runs, from one thread that makes all calls to MLflow."""

    def __init__(self, mirror: Mirror, path: Path) -> None:
        self._mirror = mirror
        self._path = path
        self._closing, self._wake, self._sent = (threading.Event() for _ in range(3))
        self._error: str | None = None
        self._thread = threading.Thread(target=self._keep_sending, daemon=True)
        self._thread.start()
        self.open_command = ui_command(path.parent)

    def follow(self, run: RunFolder) -> None:
        self._mirror.add(run, self._path)

    def run_id(self, run: RunFolder) -> str | None:
        child = self._mirror.children.get(run.name)
        return child.run_id if child else None

    def describe(self, summary: SweepSummary) -> None:
        self._mirror.summary = summary
        self._save()

    def flush(self) -> None:
        self._sent.clear()
        self._wake.set()
        self._sent.wait(FLUSH_SECONDS)

    def close(self, *, state: State) -> str | None:
        self._mirror.state = state
        self._save()
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive() and self._error is None:
            if is_server(self._mirror.uri) and self._mirror.view:
                self.open_command = f"{self._mirror.uri.rstrip('/')}/{self._mirror.view}"
            return None
        return (
            f"MLflow at {self._mirror.uri} is missing some data ({self._error or 'timed out'}); "
            f"send it with: {sync_command(self._path.parent, self._mirror.uri)}"
        )

    def _save(self) -> None:
        """Save the mirror, so that sync can send the rest if MLflow is down."""
        try:
            self._mirror.save(self._path)
        except OSError as error:
            log.error("%s cannot be written: %s", self._path, error)

    def _keep_sending(self) -> None:
        wait = POLL_SECONDS
        while not self._closing.is_set():
            self._wake.wait(wait)
            self._wake.clear()
            if self._closing.is_set():
                break
            wait = POLL_SECONDS if self._send() else min(2 * wait, LONGEST_WAIT_SECONDS)
            if not self._wake.is_set():  # else it was asked for what is newer
                self._sent.set()
        if not self._send():  # a store that others write to may be busy for a moment
            time.sleep(POLL_SECONDS)
            self._send()

    def _send(self) -> bool:
        """Send what is new; return whether the store took it."""
        try:
            send(self._mirror, self._path)
        except Exception as error:  # whatever a store may raise, the runs go on
            if self._error is None:
                log.warning("MLflow at %s cannot be reached; the runs continue", self._mirror.uri)
            self._error = without_secrets(f"{type(error).__name__}: {first_line(error)}")[:200]
            return False
        self._error = None
        return True


def send(mirror: Mirror, path: Path) -> int:
    """Send the runs' new events to MLflow; return how many were new.

    The mirror's file is saved after each run, so that a kill repeats one run's events at most.
    """
    try:
        client = open_store(mirror.uri)
        _find_parent(client, mirror, path)
        num_events = sum(_send_child(client, mirror, path, name) for name in mirror.names())
        send_summary(client, mirror, _started(mirror))
        _end_parent(client, mirror, path.parent)
    except Exception:
        mirror.forget_store()
        raise
    mirror.save(path)
    return num_events


def _find_parent(client: MlflowClient, mirror: Mirror, path: Path) -> None:
    """Find the sweep's MLflow run; create it again if store, experiment or run was deleted."""
    info = run_info(client, mirror.run_id)
    if info is not None:
        mirror.experiment_id = str(info.experiment_id)
        return
    mirror.experiment_id = find_experiment(client, mirror.uri, mirror.experiment)
    mirror.view = None
    mirror.forget_store()
    tags = {"finetune.sweep": mirror.name}
    mirror.run_id = create_run(client, mirror.experiment_id, mirror.name, tags, _started(mirror))
    mirror.save(path)
    client.log_param(mirror.run_id, "swept", ", ".join(mirror.swept) or "nothing")


def _started(mirror: Mirror) -> int:
    """Return when the sweep began: as recorded, or its first run's begin."""
    if mirror.started is not None:
        return mirror.started
    logs = [_new_events(Child(child.path))[0] for child in mirror.children.values()]
    return min((_first_time(events) for events in logs), default=int(time.time() * 1000))


def _send_child(client: MlflowClient, mirror: Mirror, path: Path, name: str) -> int:
    """Send the new events of one run, or all if MLflow no longer has the run."""
    child = mirror.children[name]
    if _is_begun_anew(child) or not _is_tracked(client, mirror, name):
        child.run_id, child.offset, child.ended, child.claims = None, 0, None, []
        mirror.described = None
    events, offset = _new_events(child)
    claims = list(child.claims)
    events = list(drop_superseded(events, claims))
    if not events:
        return 0
    if child.run_id is None:
        assert mirror.run_id is not None
        assert mirror.experiment_id is not None
        tags = _describe_child(mirror, child.path)
        label, started = find_labels(path.parent).get(name, name), _first_time(events)
        child.run_id = create_run(client, mirror.experiment_id, label, tags, started)
        mirror.verified.add(name)
        mirror.save(path)
    send_events(client, child.run_id, Path(child.path), events)
    statuses = [event for event in events if event["event"] == "status"]
    if statuses:
        child.ended = statuses[-1]["time"] if statuses[-1]["state"] != "running" else None
    child.offset, child.claims = offset, claims
    mirror.save(path)
    return len(events)


def _describe_child(mirror: Mirror, folder: str) -> dict[str, str]:
    """Return the tags of a run: its parent, its sweep, its folder and its identity."""
    assert mirror.run_id is not None
    name = Path(folder).name
    identity = IDENTITY.search(name)
    return {
        "mlflow.parentRunId": mirror.run_id,
        "finetune.sweep": mirror.name,
        "finetune.run": name,
        **({"finetune.identity": identity[1]} if identity else {}),
    }


def _is_tracked(client: MlflowClient, mirror: Mirror, name: str) -> bool:
    """Return whether the store has a run that was sent, asked once; bind it to its parent."""
    child = mirror.children[name]
    if child.run_id is None or name in mirror.verified:
        return child.run_id is not None
    info = run_info(client, child.run_id)
    if info is None or str(info.experiment_id) != mirror.experiment_id:
        return False
    assert mirror.run_id is not None
    client.set_tag(child.run_id, "mlflow.parentRunId", mirror.run_id)
    mirror.verified.add(name)
    return True


def _end_parent(client: MlflowClient, mirror: Mirror, folder: Path) -> None:
    """Update the state of the sweep's MLflow run; at its end, send the report."""
    assert mirror.run_id is not None
    if mirror.state == "running":
        client.update_run(mirror.run_id, status="RUNNING")
        return
    ends = [child.ended for child in mirror.children.values() if child.ended is not None]
    ended = max([*ends, _started(mirror)]) if ends else None
    client.set_terminated(mirror.run_id, END_STATES[mirror.state], end_time=ended)
    send_report(client, mirror.run_id, folder)


def _first_time(events: Sequence[dict[str, Any]]) -> int:
    """Return when a run began, by its own log."""
    now = int(time.time() * 1000)
    begun = [event["time"] for event in events if event["event"] == "status"]
    return int(begun[0]) if begun else next((int(e["time"]) for e in events if "time" in e), now)


def _is_begun_anew(child: Child) -> bool:
    """Return whether the run's folder was deleted and made again since its log was last read."""
    try:
        with open_file(Path(child.path) / "events.jsonl") as file:
            file.seek(max(0, child.offset - 1))
            return child.offset > 0 and file.read(1) != b"\n"
    except OSError:
        return False


def _new_events(child: Child) -> tuple[list[dict[str, Any]], int]:
    """Return the complete lines that are not sent yet, and the offset after them."""
    try:
        with open_file(Path(child.path) / "events.jsonl") as file:
            file.seek(child.offset)
            new = file.read()
    except OSError:  # of the run's folder, which the run reports; not of the store
        return [], child.offset
    complete = new[: new.rfind(b"\n") + 1]
    return parse_events(complete), child.offset + len(complete)
