"""A run's event log, `events.jsonl`: every metric, parameter and state as it happened.

It is append-only. Readers skip and count lines that were damaged later.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.files import ASIDE, JsonLines, keep_regular, parse_lines, read_bytes
from finetune.tracking.claims import Claim

log = logging.getLogger("finetune")

State = Literal["running", "finished", "failed", "interrupted", "diverged"]

CLAIM = "claim"  # the field of a line that names its writer's claim
# The fields of each kind of event, with the types of their values.
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "metric": {"key": (str,), "value": (int, float), "step": (int,), "time": (int,)},
    "param": {"key": (str,), "value": (str,)},
    "tag": {"key": (str,), "value": (str,)},
    "dataset": {
        "name": (str,), "digest": (str,), "source": (str,), "context": (str,), "rows": (int,)
    },
    "artifact": {"path": (str,), "folder": (str,)},
    "status": {"state": (str,), "reason": (str, type(None)), "time": (int,)},
    "worker": {"name": (str,), "host": (str,)},
}  # fmt: skip


class EventLog:
    """Append every metric, parameter and state of a run to `events.jsonl` as it happens.

    One JSON object a line, its kind in `event`: metric (key, value, step, time), param and tag
    (key, value), dataset (name, digest, source, context, rows, profile), artifact (path, folder:
    relative to the run's folder and to the artifact root), status (state, reason, time), worker
    (name, host: of the process that has taken the run). Times are milliseconds since the epoch. A
    step, score, parameter, tag or data set that the log already holds is not written again, so a
    resumed run has each once. Each line has its writer's claim: of two processes that hold the run
    one after the other, the later one's lines count.

    Args:
        path: of the log.
        claim: under which the run is written; None where nobody else can.
    """

    def __init__(self, path: Path, claim: Claim | None = None) -> None:
        self.claim = claim
        self.claims: list[str] = []  # tokens of the claims that wrote here, the newest last
        path.parent.mkdir(parents=True, exist_ok=True)
        self._steps: set[tuple[str, int]] = set()  # of each metric
        self._last_score: dict[str, float] = {}
        self._recorded: set[str] = set()
        keep_regular(path)
        self._recover(path)
        if claim is not None:
            self.claims.append(claim.token)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def _recover(self, path: Path) -> None:
        """Truncate a line that a kill left incomplete; remember what is recorded already."""
        if not path.exists():
            return
        raw = path.read_bytes()
        kept = raw[: raw.rfind(b"\n") + 1]
        if kept != raw:
            os.truncate(path, len(kept))
        for event in read_lines(path).values:
            claim = event.pop(CLAIM, None)
            if claim is not None and claim not in self.claims:
                self.claims.append(claim)
            self._recorded.add(json.dumps(event))
            if event["event"] == "metric":
                self._steps.add((event["key"], event["step"]))
                if event["step"] == 0:
                    self._last_score[event["key"]] = event["value"]

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record finite metrics at `step`; a non-finite one is dropped (the status has it)."""
        for key, value in values.items():
            if (key, step) not in self._steps and math.isfinite(value):
                self._write("metric", key=key, value=float(value), step=step, time=_now_ms())
                self._steps.add((key, step))

    def scores(self, values: Mapping[str, float]) -> None:
        """Record scores at step 0; those of a later evaluation are appended."""
        for key, value in values.items():
            if self._last_score.get(key) != value and math.isfinite(value):
                self._write("metric", key=key, value=float(value), step=0, time=_now_ms())
                self._last_score[key] = value

    def params(self, values: Mapping[str, str]) -> None:
        for key, value in values.items():
            self._write_once("param", key=key, value=value)

    def tag(self, key: str, value: str) -> None:
        self._write_once("tag", key=key, value=value)

    def dataset(
        self,
        name: str,
        *,
        digest: str,
        source: str,
        context: str,
        rows: int,
        profile: Mapping[str, int] | None = None,
    ) -> None:
        """Record a data set: `rows` are those that the run uses, `profile` has further counts."""
        fields = {"name": name, "digest": digest, "source": source}
        more = {"profile": dict(profile)} if profile else {}
        self._write_once("dataset", **fields, context=context, rows=rows, **more)

    def artifact(self, path: str, folder: str) -> None:
        self._write("artifact", path=path, folder=folder)

    def status(self, state: State, reason: str | None = None) -> None:
        self._write("status", state=state, reason=reason, time=_now_ms())

    def worker(self, name: str, host: str) -> None:
        """Record who works on the run from here on; MLflow is not sent it."""
        self._write("worker", name=name, host=host)

    def check_claim(self) -> None:
        """Make sure that this process still holds the run.

        Raises:
            ClaimLost: another process has taken it over.
        """
        if self.claim is not None:
            self.claim.check()

    def close(self) -> None:
        self._file.close()

    def _write(self, event: str, **fields: Any) -> None:
        assert event in FIELDS, f"{event} has no line in FIELDS"
        self._append({"event": event, **fields})

    def _write_once(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, **fields})
        if line not in self._recorded:
            self._append({"event": event, **fields})
            self._recorded.add(line)

    def _append(self, event: dict[str, Any]) -> None:
        self.check_claim()
        if self.claim is not None:
            event = event | {CLAIM: self.claim.token}
        self._file.write(json.dumps(event) + "\n")


class NullEventLog(EventLog):
    """Write nothing: on ranks above 0, since rank 0 writes the run's log."""

    def __init__(self) -> None:
        self.claim = None
        self.claims = []
        self._steps = set()
        self._last_score = {}
        self._recorded = set()

    def close(self) -> None:
        pass

    def _write(self, event: str, **fields: Any) -> None:
        pass

    def _write_once(self, event: str, **fields: Any) -> None:
        pass


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a log, without damaged lines and an incomplete last one.

    Events of a writer that continued after another one took over the run are left out too.
    """
    yield from drop_superseded(read_lines(path).values, [])


@dataclass(frozen=True)
class Measured:
    """A metric's value at a step."""

    step: int
    value: float
    time: int  # milliseconds since the epoch


def select_metric(events: Iterable[Mapping[str, Any]], key: str) -> list[Measured]:
    """Return the values of one metric, in the order in which they were recorded."""
    return [
        Measured(event["step"], event["value"], event["time"])
        for event in events
        if event["event"] == "metric" and event["key"] == key
    ]


def parse_events(raw: bytes) -> list[dict[str, Any]]:
    """Return the events in a piece of a log, of whatever writer."""
    return parse_lines(raw, is_event).values


def drop_superseded(
    events: Iterable[dict[str, Any]], claims: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the events that no later claim had superseded when they were written.

    Args:
        events: in the order of the log.
        claims: that stood before them, the newest last; those that are met are added.
    """
    for event in events:
        claim = event.get(CLAIM)
        if claim is not None and claim not in claims:
            claims.append(claim)
        if claim is None or claim == claims[-1]:
            yield event


def read_lines(path: Path) -> JsonLines:
    try:
        return parse_lines(read_bytes(path), is_event)
    except OSError:  # the run's list of damaged files says why
        return JsonLines([], [])


def blank_damaged_lines(path: Path) -> None:
    """Move damaged lines to NAME.damaged, leaving blanks: MLflow's mirror keeps byte offsets."""
    damaged = read_lines(path).damaged
    if not damaged:
        return
    aside = path.with_name(path.name + ASIDE)
    with path.open("r+b") as file, aside.open("ab") as kept:
        for start, length in damaged:
            file.seek(start)
            kept.write(file.read(length) + b"\n")
            file.seek(start)
            file.write(b" " * length)
    log.warning("%s: %d damaged lines moved to %s", path, len(damaged), aside.name)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def is_event(line: Mapping[str, Any]) -> bool:
    """Return whether a line is an event with all fields of its kind."""
    fields = FIELDS.get(str(line.get("event")))
    if not isinstance(line.get(CLAIM), str | None):
        return False
    return fields is not None and all(
        name in line and isinstance(line[name], kinds) for name, kinds in fields.items()
    )
