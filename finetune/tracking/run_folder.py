"""A run's folder: its files, status, lock, event log and damage checks.

Nothing here imports torch or MLflow, so that the sweep's process and the commands that only read
runs start quickly.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.config.schema import Config, build_config
from finetune.files import (
    Damaged,
    JsonLines,
    is_obstructed,
    parse_lines,
    read_json,
    read_yaml,
    remove_leftovers,
    set_aside,
    write_atomic,
)
from finetune.problems import Refused
from finetune.tracking import run_files
from finetune.tracking.claims import CLAIM_FILE, Claim, Watch, claimed
from finetune.tracking.events import (
    Measured,
    State,
    blank_damaged_lines,
    read_events,
    read_lines,
    select_metric,
)
from finetune.tracking.run_files import WEIGHTS
from finetune.tracking.score_files import TaskScores, parse_scores

log = logging.getLogger("finetune")


@dataclass(frozen=True)
class Status:
    """The content of `status.json`; times are seconds since the epoch."""

    state: State
    reason: str | None = None
    started: float | None = None
    ended: float | None = None
    last_lines: list[str] = field(default_factory=list)  # of the log, where a run failed


REMEDY = "repeat the command that made the run to recreate it"


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, by name; `path` is `outputs/<slug>-<identity>`.

    Whoever works on the run has `held` it: what writes raises ClaimLost once another process has
    taken the run over.
    """

    path: Path
    held: Claim | None = field(default=None, compare=False, repr=False)  # checked at each write

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "finetune.log"

    @property
    def claim(self) -> Path:
        """The file of the claim that whoever works on the run holds."""
        return self.path / CLAIM_FILE

    def find_place_problem(self) -> str | None:
        """Return a problem if the run's path is something other than a folder."""
        if not is_obstructed(self.path):
            return None
        return f"{os.path.relpath(self.path)} is not a folder; move it away"

    def last_lines(self, count: int = 5) -> list[str]:
        """Return the end of the run's log."""
        if not self.log.is_file():
            return []
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]

    @property
    def prompt_template(self) -> Path:
        """A copy of the user's template file; missing for built-in templates."""
        return self.path / "prompt.jinja"

    @property
    def chat_template(self) -> Path:
        """A copy of the file of `model.chat_template`; missing without that setting."""
        return self.path / "chat_template.jinja"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The tuned model of `peft.method=full`."""
        return self.path / "model"

    def weights(self) -> list[Path]:
        """Return the weight files of the adapter or model, sorted."""
        found = (p for f in (self.adapter, self.model) for p in f.glob("*.safetensors"))
        return sorted(path for path in found if path.is_file())

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    def read_settings(self) -> dict[str, Any]:
        """Return `config.yaml` as composed, interpolations unresolved.

        Raises:
            Refused: this is not a run's folder, or the file is damaged.
        """
        path = self.path / "config.yaml"
        if not path.exists():
            raise Refused([f"{self.path} is not a run's folder: config.yaml is missing"])
        if problem := self.find_problem("config.yaml"):
            raise Refused([f"{path} is damaged: {problem}; {REMEDY}"])
        return read_yaml(path, dict) or {}

    def read_config(self) -> Config:
        """Return the settings that the run was composed of.

        Raises:
            Refused: this is not a run's folder, or its settings are not of this version.
        """
        try:
            return build_config(OmegaConf.create(self.read_settings()))
        except (OmegaConfBaseException, AttributeError, TypeError) as error:
            fault = str(error).splitlines()[0]
            raise Refused([f"{self.path / 'config.yaml'} cannot be read: {fault}"]) from None

    def status(self) -> Status | None:
        """Return the recorded status; None for a run that never started, or a damaged file."""
        try:
            return self._load_status()
        except Damaged:
            return None

    def _load_status(self) -> Status | None:
        stored = read_json(self.path / "status.json", dict)
        if stored is None:
            return None
        try:
            status = Status(**stored)
        except TypeError:
            raise Damaged("it lacks the fields of a status") from None
        times = (status.started, status.ended)
        if (
            status.state not in get_args(State)
            or not isinstance(status.reason, str | None)
            or not isinstance(status.last_lines, list)
            or not all(isinstance(line, str) for line in status.last_lines)
            or not all(isinstance(time, int | float | None) for time in times)
        ):
            raise Damaged("it holds no status")
        return status

    def check_claim(self) -> None:
        """Make sure that this process still holds the run, where it works on it.

        Raises:
            ClaimLost: another process has taken it over.
        """
        if self.held is not None:
            self.held.check()

    def write_status(self, status: Status) -> None:
        self.check_claim()
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(status), indent=1) + "\n"
        write_atomic(self.path / "status.json", text, self.check_claim)

    def read_json(self, name: str) -> Any:
        """Return the JSON file `name` of this run; None if it is not there, or damaged."""
        with suppress(Damaged):
            return None if self.find_problem(name) else read_json(self.path / name, object)
        return None

    def read_scores(self, task: str) -> TaskScores | None:
        """Return a task's scores; None before it is scored, or where the file is damaged."""
        stored = self.read_json(f"evaluation/{task}.json")
        return None if stored is None else parse_scores(stored)

    def metric(self, key: str) -> list[Measured]:
        """Return a metric's values in the run's events, such as those of `train/loss`."""
        return select_metric(read_events(self.events), key)

    def read_items(self, task: str) -> list[dict[str, Any]]:
        """Return a task's outcomes, one object a question; none where they are damaged."""
        path = self.evaluation / f"{task}.items.jsonl"
        if not path.is_file() or self.find_problem(f"evaluation/{path.name}"):
            return []
        return parse_lines(path.read_bytes(), run_files.is_item).values

    def scored_tasks(self) -> list[str]:
        """Return the tasks whose scores can be read; NAME.select chose the best run."""
        names = [f"evaluation/{path.name}" for path in sorted(self.evaluation.glob("*.json"))]
        return [Path(name).stem for name in names if not self.find_problem(name)]

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run, and record its digest."""
        self.check_claim()
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A kill must not leave a new file under an old digest.
        run_files.forget(self.path, name, check=self.check_claim)
        write_atomic(path, text, self.check_claim)
        self.record(name)

    def record(self, *names: str) -> None:
        """Record the digests of files or folders that were written otherwise."""
        self.check_claim()
        run_files.record(self.path, *names, check=self.check_claim)

    @property
    def is_trained(self) -> bool:
        """True if training has finished, and its weights are undamaged."""
        if self.read_json("training.json") is None or not self.weights():
            return False
        return not self.find_weights_damage()

    def find_weights_damage(self, *, thorough: bool = False) -> dict[str, str]:
        """Return what is wrong with the adapter or the model, by the names of its files."""
        names = [name for name in self._names() if name.startswith(WEIGHTS)]
        found = {name: self.find_problem(name, thorough=thorough) for name in names}
        unproven = run_files.find_unproven(self.path, self.weights())
        return unproven | {name: problem for name, problem in found.items() if problem}

    def find_problem(
        self,
        name: str,
        *,
        thorough: bool = True,
        entries: Mapping[str, run_files.FileEntry] | None = None,
    ) -> str | None:
        """Return what is wrong with one file; None where it is undamaged, or was never written.

        Args:
            name: of the file, in the run's folder.
            thorough: False trusts a large file of the recorded size and time.
            entries: the recorded digests, where they are read already.
        """
        file = self.path / name
        entry = (self._entries() if entries is None else entries).get(name)
        if entry is not None:
            problem = run_files.find_difference(file, entry, thorough=thorough)
            if problem is not None or name.endswith(run_files.LONG_TEXTS):
                return problem
        return run_files.find_misfit(file, name) if os.path.lexists(file) else None

    def _entries(self) -> Mapping[str, run_files.FileEntry]:
        with suppress(Damaged):
            return run_files.read_entries(self.path)
        return {}

    def read_overrides(self) -> list[str]:
        """Return the run's overrides; none where the file is damaged."""
        if self.find_problem("overrides.yaml"):
            return []
        return read_yaml(self.path / "overrides.yaml", list) or []

    def find_damage(
        self, *, of_weights: bool = True, events: JsonLines | None = None
    ) -> dict[str, str]:
        """Return what is wrong with the run's files, by name, with or without its weights.

        Args:
            of_weights: whether to check adapter and model.
            events: the lines of the event log, where they are read already.
        """
        names = [name for name in self._names() if of_weights or not name.startswith(WEIGHTS)]
        entries = self._entries()
        problems = {
            name: self.find_problem(name, thorough=False, entries=entries) for name in names
        }
        for name, check in (
            ("status.json", self._load_status),
            (run_files.DIGESTS, lambda: run_files.read_entries(self.path)),
        ):
            try:
                check()
            except Damaged as damage:
                problems[name] = str(damage)
        problems |= run_files.find_unproven(self.path, self.weights()) if of_weights else {}
        folders = (*WEIGHTS, "checkpoints", "evaluation") if of_weights else ("evaluation",)
        obstructed = [name for name in folders if is_obstructed(self.path / name)]
        problems |= dict.fromkeys(obstructed, "it is not a folder")
        is_begun = of_weights and self.read_json("training.json") is not None
        if is_begun and not self.weights():
            problems.setdefault("adapter", "it is missing")
        problems["events.jsonl"] = self.find_lost_events(events)
        return {name: problem for name, problem in problems.items() if problem}

    def find_lost_events(self, lines: JsonLines | None = None) -> str | None:
        """Return a problem if lines of the event log are damaged, or its end is missing.

        Args:
            lines: of the log, where they are read already.
        """
        if os.path.lexists(self.events) and not self.events.is_file():
            return "it is not a file"
        lines, status = lines or read_lines(self.events), self.status()
        if lines.damaged:
            return f"{len(lines.damaged)} of its lines cannot be read"
        ends = [event["state"] for event in lines.values if event["event"] == "status"]
        is_recorded = (self.path / run_files.DIGESTS).exists()
        if is_recorded and status and status.state == "finished" and ends[-1:] != ["finished"]:
            return "its end is missing"
        return None

    def _names(self) -> list[str]:
        """Return the names of recorded and existing files."""
        patterns = ("*.json", "*.yaml", "adapter/*", "model/*", "evaluation/*.json*")
        there = (path for pattern in patterns for path in self.path.glob(pattern))
        names = {path.relative_to(self.path).as_posix() for path in there if path.is_file()}
        with suppress(Damaged):
            names |= run_files.read_entries(self.path).keys()
        return sorted(names - {"status.json", run_files.DIGESTS})

    def set_damaged_aside(self) -> None:
        """Rename damaged files, so that they are written again; needs the run's lock.

        Weights are renamed with their folder, and `training.json` is removed. Of the event log
        only the damaged lines are moved.
        """
        for name, problem in self.find_damage().items():
            path = self.path / name
            if name == "events.jsonl" and path.is_file():
                blank_damaged_lines(path)
            elif name.startswith(WEIGHTS):
                self.set_weights_aside(name, problem)
            elif os.path.lexists(path):
                set_aside(path, problem)

    def set_weights_aside(self, name: str, problem: str) -> None:
        """Rename the folder of a damaged file of the weights, so that they are trained again."""
        self.check_claim()
        folder = self.path / name.partition("/")[0]
        if os.path.lexists(folder):
            set_aside(folder, f"{name}: {problem}")
        (self.path / "training.json").unlink(missing_ok=True)

    def forget_missing(self) -> None:
        """Remove files that were set aside, and not written again, from the record."""
        run_files.forget_missing(self.path, self.check_claim)

    @contextmanager
    def claimed(self, *, wait: bool = True) -> Iterator[Claim]:
        """Claim this run, after waiting for another process that holds it.

        What an earlier holder had not put in place is removed, so that it cannot do so any more,
        should it only have been halted.

        Raises:
            Timeout: another process holds it, and `wait` is False.
        """

        def log_wait() -> None:
            holder = Watch(self.claim).holder() or "another process"
            log.info("%s: %s is running it; waiting for its end", self.name, holder)

        with claimed(self.claim, wait=wait, waiting=log_wait) as claim:
            for folder in (self.path, self.evaluation):
                remove_leftovers(folder)
            yield claim
