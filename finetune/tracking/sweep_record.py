"""`sweep.yaml` of a sweep: its command, swept keys, tasks and runs, to rewrite its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import yaml

from finetune.files import Damaged, read_yaml, write_atomic
from finetune.tracking.claims import CLAIM_FILE, claimed

RECORD = "sweep.yaml"
LONGEST_VALUE = 40  # characters of a swept value in a run's label
UNNAMED = "jobs"  # in place of a run's folder, until a worker elsewhere has named that


def render_swept(swept: Mapping[str, str]) -> str:
    """Return a run's place in the grid, such as `lora.r=8 optimizer.lr=1e-3`."""
    return " ".join(f"{key}={value}" for key, value in swept.items())


def label_run(swept: Mapping[str, str]) -> str:
    """Return a run's place in the grid as a short name, such as `r=8 lr=1e-3`.

    Keys are cut to their last words where these differ, paths to their names.
    """
    last = Counter(key.rpartition(".")[2] for key in swept)
    return " ".join(
        f"{short if last[short] == 1 else key}={_short(value)}"
        for key, value in swept.items()
        for short in [key.rpartition(".")[2]]
    )


def _short(value: str) -> str:
    """Return a value without the folders of a path, and bounded."""
    name = value.rstrip("/").rpartition("/")[2] if "://" not in value else value
    return name if len(name) <= LONGEST_VALUE else f"{name[: LONGEST_VALUE - 3]}..."


@dataclass(frozen=True)
class RunRecord:
    """One run of a sweep: its folder, and its place in the grid."""

    folder: str  # absolute, or relative to the sweep's folder
    swept: dict[str, str]
    job: str = ""  # a digest of its settings and inputs, the same on every machine

    @property
    def is_named(self) -> bool:
        """False until a worker has found which folder is the run's on its kind of device."""
        return not self.folder.startswith(f"{UNNAMED}/")


@dataclass(frozen=True)
class SweepRecord:
    """The content of `sweep.yaml`: all that is needed to rewrite a sweep's report."""

    name: str
    command: list[str]
    swept: list[str]
    tasks: list[str]
    runs: list[RunRecord]
    objective: list[str] = field(default_factory=list)  # none: the first task's first metric

    def write(self, folder: Path) -> None:
        """Write the record; the names that workers have given runs meanwhile are kept."""
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder / f"{RECORD}{CLAIM_FILE}"):
            self._with_names(folder)._write(folder)

    def _write(self, folder: Path) -> None:
        write_atomic(folder / RECORD, yaml.safe_dump(asdict(self), sort_keys=False))

    def _with_names(self, folder: Path) -> SweepRecord:
        if all(run.is_named for run in self.runs):
            return self
        names = find_names(folder)
        runs = [
            run if run.is_named else replace(run, folder=names.get(run.job, run.folder))
            for run in self.runs
        ]
        return replace(self, runs=runs)

    @classmethod
    def load(cls, folder: Path) -> SweepRecord:
        """Read the record of a sweep's folder.

        Raises:
            ValueError: it is missing or damaged.
        """
        try:
            stored = read_yaml(folder / RECORD, dict)
            if stored is None:
                raise ValueError(f"{folder} is not a sweep's folder: {RECORD} is missing")
            runs = [RunRecord(**run) for run in stored.pop("runs")]
            record = cls(**stored, runs=runs)
            if not record.is_sound():
                raise Damaged("it is not a record of a sweep")
        except (Damaged, TypeError, KeyError) as error:
            fault = error if isinstance(error, Damaged) else "it is not a record of a sweep"
            raise ValueError(
                f"{folder / RECORD} is damaged: {fault}; the sweep's command recreates it"
            ) from None
        return record

    def is_sound(self) -> bool:
        """Return whether every field has its type."""
        texts = [self.name, *(run.folder for run in self.runs)]
        lists = [self.command, self.swept, self.tasks, self.objective]
        if not all(isinstance(one, list) for one in lists):
            return False
        texts += [one for names in lists for one in names]
        return all(isinstance(one, str) for one in texts) and all(
            isinstance(run.swept, dict) and set(run.swept) == set(self.swept) for run in self.runs
        )


def find_names(folder: Path) -> dict[str, str]:
    """Return the folders of a sweep's runs that workers have named, by their jobs."""
    try:
        runs = SweepRecord.load(folder).runs
    except ValueError:  # there is none
        return {}
    return {run.job: run.folder for run in runs if run.job and run.is_named}


def find_labels(folder: Path) -> dict[str, str]:
    """Return the labels of a sweep's runs, by the names of their folders; none without a grid."""
    try:
        runs = SweepRecord.load(folder).runs
    except ValueError:  # there is none
        return {}
    return {Path(run.folder).name: label_run(run.swept) for run in runs if run.swept}


@contextmanager
def changed_record(folder: Path) -> Iterator[SweepRecord]:
    """Yield a sweep's record to be changed, while no other process changes it.

    Raises:
        ValueError: it is missing or damaged.
    """
    SweepRecord.load(folder)  # before a claim makes the folder
    with claimed(folder / f"{RECORD}{CLAIM_FILE}"):
        record = SweepRecord.load(folder)
        before = asdict(record)
        yield record
        if asdict(record) != before:
            record._write(folder)
