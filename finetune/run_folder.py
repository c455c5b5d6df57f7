"""A run on disk: its identity, folder, status, lock and event log; what it computes lives above.

Nothing here imports torch or MLflow, so that the sweep's own process and the commands beside it
can read runs at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from finetune.config import Config, Refused, build_config
from finetune.grouping import NOT_TRAINED, Limit
from finetune.inputs import Inputs

log = logging.getLogger("finetune")

State = Literal["running", "finished", "failed", "interrupted", "diverged"]


@dataclass(frozen=True)
class Job:
    """One point of the grid, as composed; `swept` maps each swept key to its value here.

    Once it is planned, its inputs travel with it: a run is made from what planning found, in the
    folder that planning named.
    """

    config: Config
    yaml: str  # unresolved, so that secrets stay interpolations
    overrides: list[str]
    swept: dict[str, str]
    inputs: Inputs | None = None


@dataclass(frozen=True)
class Plan:
    """What checking a job found: its inputs, with its run's folder, or why it cannot run."""

    inputs: Inputs | None
    problems: list[str]
    finished: bool = False  # whether it has all that is asked for
    limit: Limit = NOT_TRAINED  # of the runs that share its step
    forecasts: Sequence[str] = ()  # one line a task that is still to be scored


def digest(value: Any) -> str:
    """Return the sha256 (hex) of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def slug(text: str) -> str:
    """Return `text` as a name for one file or folder: lower case, digits, `-`, `_`, `.` inside."""
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-.")[:80] or "run"


def distinct_slug(text: str) -> str:
    """Return a slug that no other text has: with a digest where the slug leaves something out."""
    name = slug(text)
    if name == text:
        return name
    return f"{name[:71].rstrip('-.')}-{digest(text)[:8]}"


def flatten(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested settings; a list is one value."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def cache_dir() -> Path:
    """Return the folder of what all runs of a user share: FINETUNE_CACHE, or below ~/.cache."""
    if "FINETUNE_CACHE" in os.environ:
        return Path(os.environ["FINETUNE_CACHE"]).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "finetune"


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or nothing: temporary name, sync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which then stands in for `folder`, whole or not at all."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class Status:
    """What `status.json` says of a run; times are seconds since the epoch."""

    state: State
    reason: str | None = None
    started: float | None = None
    ended: float | None = None
    last_lines: list[str] = field(default_factory=list)  # of the log, where a run failed


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, by name; `path` is `outputs/<slug>-<identity>`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "finetune.log"

    def last_lines(self, count: int = 5) -> list[str]:
        """Return the end of the run's log."""
        if not self.log.exists():
            return []
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]

    @property
    def prompt_template(self) -> Path:
        """The user's own template as it was; there is none for a known one."""
        return self.path / "prompt.jinja"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The whole tuned model, where all its weights were trained."""
        return self.path / "model"

    def weights(self) -> list[Path]:
        """Return the files of what was trained, adapter or model, in order."""
        return sorted(p for f in (self.adapter, self.model) for p in f.glob("*.safetensors"))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    def read_config(self) -> Config:
        """Return the settings that the run was composed of.

        Raises:
            Refused: this is no run's folder, or its settings are not this version's.
        """
        try:
            composed = OmegaConf.load(self.path / "config.yaml")
            return build_config(cast(DictConfig, composed))
        except FileNotFoundError:
            raise Refused([f"{self.path} is no run's folder: config.yaml is missing"]) from None
        except (OmegaConfBaseException, OSError, YAMLError) as error:
            fault = str(error).splitlines()[0]
            raise Refused([f"{self.path / 'config.yaml'} cannot be read: {fault}"]) from None

    def status(self) -> Status | None:
        """Return the recorded status, or None for a run that never started."""
        try:
            return Status(**json.loads((self.path / "status.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_status(self, status: Status) -> None:
        self.write_json("status.json", asdict(status))

    def read_json(self, name: str) -> Any:
        """Return the JSON file `name` of this run, or None if it is not there."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def write_json(self, name: str, value: Any) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(value, indent=1) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this run alone, after whoever works on it; a dead process's lock is free."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: another process works on it; waiting for it to end", self.name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


class EventLog:
    """Append every metric, parameter and state of a run to `events.jsonl` as it happens.

    One JSON object a line, told apart by `event`: metric (key, value, step, time), param and tag
    (key, value), dataset (name, digest, source, context, rows), artifact (path, folder: relative
    to the run's folder and to the artifact root), status (state, reason, time). Times are
    milliseconds since the epoch. A step, score, parameter, tag or data set that the log already
    holds is not written again, so a resumed run has each once.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._last_step: dict[str, int] = {}
        self._last_score: dict[str, float] = {}
        self._told: set[str] = set()
        self._recover(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def _recover(self, path: Path) -> None:
        """Cut off a line that a kill left half-written; remember what the others told."""
        if not path.exists():
            return
        whole = path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept != whole:
            os.truncate(path, len(kept))
        for line in kept.decode().splitlines():
            event = json.loads(line)
            self._told.add(line)
            if event["event"] == "metric":
                key, step = event["key"], event["step"]
                self._last_step[key] = max(step, self._last_step.get(key, -1))
                if step == 0:
                    self._last_score[key] = event["value"]

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record finite metrics at `step`; a non-finite one belongs into a status' reason."""
        for key, value in values.items():
            if step > self._last_step.get(key, -1) and math.isfinite(value):
                self._write("metric", key=key, value=float(value), step=step, time=_now_ms())
                self._last_step[key] = step

    def scores(self, values: Mapping[str, float]) -> None:
        """Record scores, at step 0; those of another evaluation of the run come behind them."""
        for key, value in values.items():
            if self._last_score.get(key) != value and math.isfinite(value):
                self._write("metric", key=key, value=float(value), step=0, time=_now_ms())
                self._last_score[key] = value

    def params(self, values: Mapping[str, str]) -> None:
        for key, value in values.items():
            self._write_once("param", key=key, value=value)

    def tag(self, key: str, value: str) -> None:
        self._write_once("tag", key=key, value=value)

    def dataset(self, name: str, *, digest: str, source: str, context: str, rows: int) -> None:
        fields = {"name": name, "digest": digest, "source": source}
        self._write_once("dataset", **fields, context=context, rows=rows)

    def artifact(self, path: str, folder: str) -> None:
        self._write("artifact", path=path, folder=folder)

    def status(self, state: State, reason: str | None = None) -> None:
        self._write("status", state=state, reason=reason, time=_now_ms())

    def close(self) -> None:
        self._file.close()

    def _write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, **fields}) + "\n")

    def _write_once(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, **fields})
        if line not in self._told:
            self._told.add(line)
            self._file.write(line + "\n")


class NullEventLog(EventLog):
    """Write nothing: another process tells of the same run."""

    def __init__(self) -> None:
        self._last_step = {}
        self._last_score = {}
        self._told = set()

    def close(self) -> None:
        pass

    def _write(self, event: str, **fields: Any) -> None:
        pass

    def _write_once(self, event: str, **fields: Any) -> None:
        pass


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of an event log; a half-written last line is left out."""
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
