"""`mlflow.json` of a sweep: its MLflow store, and the byte offset up to which each run is sent."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path

from finetune.config.store_address import masked
from finetune.files import Damaged, read_json, write_atomic
from finetune.tracking.event_sending import END_STATES
from finetune.tracking.events import State
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.sweep_summary import SweepSummary

EARLY_FIELDS = ("champion", "metrics", "lowest_first")  # of a summary, in files until 0.1


@dataclass
class Child:
    """One run of the sweep, and the part of it that has been sent."""

    path: str
    run_id: str | None = None
    offset: int = 0  # bytes of its event log that MLflow has
    ended: int | None = None  # when it last ended, in milliseconds since the epoch
    claims: list[str] = field(default_factory=list)  # under which they were written, newest last


@dataclass
class Mirror:
    """The state of a sweep's mirror: its store, its runs, and the part of them that is sent."""

    uri: str  # absolute, secrets masked
    experiment: str
    name: str
    swept: list[str]
    experiment_id: str | None = None
    run_id: str | None = None
    state: State = "running"
    summary: SweepSummary = field(default_factory=SweepSummary)  # newer with each run that ends
    view: str | None = None  # the view's address below the UI's root
    children: dict[str, Child] = field(default_factory=dict)
    started: int | None = None  # when the sweep was first conducted, in milliseconds

    def __post_init__(self) -> None:
        self.uri = masked(self.uri)
        self._changing = threading.RLock()  # the sweep adds runs while a thread sends them
        self.verified: set[str] = set()  # runs that this process has seen in the store
        self.described: SweepSummary | None = None  # the last that this process has sent

    @classmethod
    def load(cls, path: Path) -> Mirror:
        """Read the state of a mirror.

        Raises:
            Damaged: the file is not such a state.
        """
        stored = read_json(path, dict) or {}
        try:
            children = {name: Child(**child) for name, child in stored.pop("children").items()}
            early = {name: stored.pop(name) for name in EARLY_FIELDS if name in stored}
            summary = SweepSummary.parse(stored.pop("summary", early))
            mirror = cls(**stored, children=children, summary=summary)
        except (TypeError, KeyError, AttributeError):
            raise Damaged("it is not a record of tracked runs") from None
        if not mirror.is_sound():
            raise Damaged("its values have wrong types")
        return mirror

    def is_sound(self) -> bool:
        """Return whether every field has its type."""
        children = self.children.values()
        texts = [self.uri, self.experiment, self.name, *(child.path for child in children)]
        ids = [self.experiment_id, self.run_id, self.view]
        ids += [child.run_id for child in children]
        return (
            isinstance(self.swept, list)
            and self.state in END_STATES
            and isinstance(self.started, int | None)
            and all(isinstance(one, str) for one in (*texts, *self.swept))
            and all(one is None or isinstance(one, str) for one in ids)
            and all(isinstance(child.ended, int | None) for child in children)
            and all(isinstance(claim, str) for child in children for claim in child.claims)
            and all(isinstance(child.offset, int) and child.offset >= 0 for child in children)
        )

    def save(self, path: Path) -> None:
        with self._changing:
            write_atomic(path, json.dumps(asdict(self), indent=1) + "\n")

    def add(self, run: RunFolder, path: Path) -> None:
        """Add a run; saved at once, so that sync can send it later if MLflow is down."""
        with self._changing:
            self.children.setdefault(run.name, Child(str(run.path))).path = str(run.path)
            self.save(path)

    def forget_store(self) -> None:
        """Verify and describe all runs anew: they may be of a run or store that is gone."""
        self.verified.clear()
        self.described = None

    def names(self) -> list[str]:
        with self._changing:
            return list(self.children)
