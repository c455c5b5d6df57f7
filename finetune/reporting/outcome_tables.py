"""Cache of outcomes per question as numpy arrays, in each run's folder `.outcomes`.

The lines of `evaluation/<task>.items.jsonl` are read once; the arrays made of them are written to
`.outcomes/<task>.npz` in the run's folder with the digest of the file, and used for as long as the
file has that digest. Deleting them costs nothing but the time to read the lines again.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.files import file_digest, temporary_path
from finetune.tracking.run_folder import RunFolder

LAYOUT = 1  # incremented when the layout of the arrays changes
SIDES = ("base", "tuned")
FOLDER = ".outcomes"

Column = tuple[str, str]  # side and metric


@dataclass(frozen=True)
class OutcomeTable:
    """The outcomes of both models in every metric; axes: column, question."""

    questions: list[str]  # the names of the questions, each once
    members: dict[str, str]  # a question's task, in a group
    columns: list[Column]  # of the numbers
    numbers: npt.NDArray[np.float64]
    present: npt.NDArray[np.bool_]  # where a question has an outcome
    others: dict[Column, dict[str, Any]]  # outcomes that are not numbers, by question

    def outcomes(self, side: str, metric: str) -> dict[str, Any]:
        """Return the outcome of each question that has one."""
        column = (side, metric)
        if column not in self.columns:
            return dict(self.others.get(column, {}))
        number = self.columns.index(column)
        values = self.numbers[number].tolist()
        if self.present[number].all():
            return dict(zip(self.questions, values, strict=True))
        rows = zip(self.questions, values, self.present[number], strict=True)
        return {question: value for question, value, is_there in rows if is_there}


def read_tables(runs: Iterable[RunFolder], task: str) -> dict[str, OutcomeTable]:
    """Return the outcomes of runs by their names; runs with equal questions share their names."""
    found: dict[str, OutcomeTable] = {}
    last = _build([])
    for run in runs:
        last = found[run.name] = _read(run, task, last)
    return found


def read_table(run: RunFolder, task: str) -> OutcomeTable:
    """Return a run's outcomes; none where they are not stored, or damaged."""
    return read_tables([run], task)[run.name]


def _read(run: RunFolder, task: str, last: OutcomeTable) -> OutcomeTable:
    name = f"{task}.items.jsonl"
    path = run.evaluation / name
    if not path.is_file() or run.find_problem(f"evaluation/{name}"):
        return _build([])
    kept = run.path / FOLDER / f"{task}.npz"
    try:
        source = f"{LAYOUT}:{file_digest(path)}"
    except OSError:
        return _build([])
    with suppress(OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile, EOFError):
        return _load(kept, source, last)
    table = _build(run.read_items(task))
    if table.questions:
        _write(kept, source, table)
    return table


def _build(items: Sequence[Mapping[str, Any]]) -> OutcomeTable:
    """Return the table of a file's lines."""
    questions = _name_questions(items)
    pairs = list(zip(questions, items, strict=True))
    members = {question: item["task"] for question, item in pairs if "task" in item}
    found: dict[Column, dict[str, Any]] = {}
    for question, item in pairs:
        for side in SIDES:
            for metric, value in item.get(side, {}).items():
                found.setdefault((side, metric), {})[question] = value
    others = {key: one for key, one in found.items() if not _are_floats(one.values())}
    columns = [key for key in found if key not in others]
    numbers = [[found[key].get(question, np.nan) for question in questions] for key in columns]
    present = [[question in found[key] for question in questions] for key in columns]
    shape = (len(columns), len(questions))
    return OutcomeTable(
        questions,
        members,
        columns,
        np.array(numbers, dtype=np.float64).reshape(shape),
        np.array(present, dtype=np.bool_).reshape(shape),
        others,
    )


def _name_questions(items: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a name for each question; a task may ask the same one twice."""
    seen: Counter[str] = Counter()
    names = []
    for item in items:
        key = f"{item['hash']}:{item['prompt']}" + (f":{item['task']}" if "task" in item else "")
        seen[key] += 1
        names.append(key + "'" * (seen[key] - 1))
    return names


def _are_floats(values: Iterable[Any]) -> bool:
    return all(type(value) is float for value in values)


def _write(path: Path, source: str, table: OutcomeTable) -> None:
    """Keep a table; a folder that cannot be written to is read from its lines each time."""
    names = {
        "columns": table.columns,
        "members": table.members,
        "others": [[*key, values] for key, values in table.others.items()],
    }
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                source=np.array(source.encode()),
                questions=np.array([one.encode() for one in table.questions]),
                names=np.array(json.dumps(names).encode()),
                numbers=table.numbers,
                present=table.present,
            )
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def _load(path: Path, source: str, last: OutcomeTable) -> OutcomeTable:
    """Return the table that was made of a file with this digest; raises ValueError of another."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        if arrays["source"].item().decode() != source:
            raise ValueError("it was made of other outcomes")
        questions = [one.decode() for one in arrays["questions"].tolist()]
        names = json.loads(arrays["names"].item())
        numbers, present = arrays["numbers"], arrays["present"]
    if questions == last.questions:
        questions = last.questions
    if names["members"] == last.members:
        names["members"] = last.members
    columns = [(side, metric) for side, metric in names["columns"]]
    others = {(side, metric): values for side, metric, values in names["others"]}
    if numbers.shape != present.shape or numbers.shape != (len(columns), len(questions)):
        raise ValueError("its shapes do not fit")
    return OutcomeTable(questions, names["members"], columns, numbers, present, others)
