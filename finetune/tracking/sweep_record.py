"""`sweep.yaml` in a sweep's folder: its command, swept keys, tasks and runs, to report it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from finetune.files import Damaged, read_yaml, write_atomic

RECORD = "sweep.yaml"


@dataclass(frozen=True)
class RunRecord:
    """One run of a sweep: its folder, and its place in the grid."""

    folder: str  # absolute, or relative to the sweep's folder
    swept: dict[str, str]


@dataclass(frozen=True)
class SweepRecord:
    """What `sweep.yaml` says: all that is needed to report a sweep again."""

    name: str
    command: list[str]
    swept: list[str]
    tasks: list[str]
    runs: list[RunRecord]

    def write(self, folder: Path) -> None:
        write_atomic(folder / RECORD, yaml.safe_dump(asdict(self), sort_keys=False))

    @classmethod
    def load(cls, folder: Path) -> SweepRecord:
        """Read the record of a sweep's folder.

        Raises:
            ValueError: there is none, or it is no record of a sweep.
        """
        try:
            stored = read_yaml(folder / RECORD, dict)
            if stored is None:
                raise ValueError(f"{folder} is no sweep's folder: it has no {RECORD}")
            runs = [RunRecord(**run) for run in stored.pop("runs")]
            record = cls(**stored, runs=runs)
            if not record.is_sound():
                raise Damaged("it holds no record of a sweep")
        except (Damaged, TypeError, KeyError) as error:
            fault = error if isinstance(error, Damaged) else "it holds no record of a sweep"
            raise ValueError(
                f"{folder / RECORD} is damaged: {fault}; the sweep's command writes it anew"
            ) from None
        return record

    def is_sound(self) -> bool:
        """Return whether every field has its type; what was read may be anything."""
        texts = [self.name, *(run.folder for run in self.runs)]
        lists = [self.command, self.swept, self.tasks]
        if not all(isinstance(one, list) for one in lists):
            return False
        texts += [one for names in lists for one in names]
        return all(isinstance(one, str) for one in texts) and all(
            isinstance(run.swept, dict) and set(run.swept) == set(self.swept) for run in self.runs
        )
