"""The rows to train on: read, checked one by one, put into the prompt, tokenised and masked.

Every row that is cut or left out is counted with its reason. Batches are training's matter.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from transformers import PreTrainedTokenizerBase

from finetune.config import DataConfig, TrainingConfig, local_path
from finetune.models import hub_commit
from finetune.prompts import BY_NAME, Template
from finetune.run_folder import file_digest

IGNORED = -100  # the label of a token that carries no loss, as in transformers
Row = Mapping[str, Any]


class Example(TypedDict):
    """One tokenised row; `labels` has the length of `input_ids`, IGNORED where masked."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class DataSource:
    """Where the rows are; `digest` stands for their content."""

    location: str
    digest: str
    revision: str | None = None  # commit of a hub data set; None for a file


@dataclass
class RowCounts:
    """What became of the rows; reasons map to how many rows, `first` to the first row's number."""

    read: int = 0
    drawn: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, number: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first.setdefault(reason, number)

    def summary(self) -> str:
        """Say in one line how many rows were read, drawn, cut and left out, and why."""
        reasons = [
            f"{count} dropped ({reason}; first: row {self.first[reason]})"
            for reason, count in self.dropped.items()
        ]
        cut = [f"{self.truncated} truncated"] if self.truncated else []
        return ", ".join([f"{self.read} rows read", f"{self.drawn} used", *cut, *reasons])


@dataclass(frozen=True)
class Examples:
    """Tokenised rows, in the order drawn, and what became of the others."""

    train: list[Example]
    validation: list[Example]
    counts: RowCounts

    @property
    def all(self) -> list[Example]:
        return [*self.train, *self.validation]


def find_data(data: DataConfig) -> DataSource:
    """Find the data and what identifies its content.

    Raises:
        FileNotFoundError: there is no such file or hub data set.
        ValueError: the file is of a kind that is not read.
    """
    path = local_path(data.path)
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"data.path={path}: rows are read from {', '.join(READERS)} files")
        return DataSource(str(path), file_digest(path))
    is_hub_id = data.path.count("/") == 1 and not data.path.startswith((".", "/", "~"))
    if path.suffix in READERS or not is_hub_id:
        raise FileNotFoundError(f"data.path={data.path}: there is no file {path.absolute()}")
    commit = hub_commit(data.path, data.revision, repo_type="dataset", key="data.path")
    return DataSource(data.path, f"hub:{data.path}@{commit}", commit)


def read_rows(data: DataConfig, source: DataSource) -> list[Row]:
    """Read all rows and check that the template's columns are there.

    Raises:
        ValueError: a malformed line (with its number), no row at all, or a missing column.
    """
    if source.revision is None:
        path = Path(source.location)
        rows = list(READERS[path.suffix](path))
    else:
        from datasets import load_dataset

        rows = list(load_dataset(source.location, revision=source.revision, split=data.split))
    if not rows:
        raise ValueError(f"data.path={source.location} holds no rows")
    for name in BY_NAME[data.prompt_template].required:
        column = data.columns.get(name, name)
        if not any(column in row for row in rows):
            raise ValueError(
                f"data.path={source.location} has no column {column!r} for the {name} of "
                f"data.prompt_template={data.prompt_template}; its columns are "
                f"{', '.join(map(str, rows[0]))}. Set +data.columns.{name}=COLUMN"
            )
    return rows


def check_rows(rows: Sequence[Row], data: DataConfig) -> None:
    """Check that some row can be used, without tokenising any.

    Raises:
        ValueError: none can; the message names the first one's fault.
    """
    counts = RowCounts(read=len(rows))
    if next(_sound_texts(rows, data, counts), None) is None:
        raise _nothing_left(data, counts)


def _nothing_left(data: DataConfig, counts: RowCounts) -> ValueError:
    return ValueError(f"data.path={data.path}: no row is left to train on: {counts.summary()}")


def build_examples(
    rows: Sequence[Row],
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Examples:
    """Check, draw, render, tokenise and mask the rows.

    Raises:
        ValueError: no row is left to train on; the message names the first one's fault.
    """
    counts = RowCounts(read=len(rows))
    texts = list(_sound_texts(rows, data, counts))
    seed = training.seed if training.data_seed is None else training.data_seed
    if data.num_examples is not None:
        texts = random.Random(seed).sample(texts, min(data.num_examples, len(texts)))
    examples = [
        example
        for number, prompt, response in texts
        if (example := _tokenise(number, prompt, response, data, training, tokenizer, counts))
    ]
    counts.drawn = len(examples)
    held_out = round(len(examples) * data.validation_fraction)
    if held_out == len(examples):
        raise _nothing_left(data, counts)
    shuffled = random.Random(seed).sample(examples, len(examples)) if held_out else examples
    return Examples(shuffled[held_out:], shuffled[:held_out], counts)


def last_prompts(rows: Sequence[Row], data: DataConfig, count: int) -> list[str]:
    """Return the prompts of the last rows that can be used."""
    return [prompt for _, prompt, _ in _sound_texts(rows, data, RowCounts(len(rows)))][-count:]


def _sound_texts(
    rows: Sequence[Row], data: DataConfig, counts: RowCounts
) -> Iterator[tuple[int, str, str]]:
    """Yield row number (from 1), prompt and response of each row whose fields are whole."""
    template = BY_NAME[data.prompt_template]
    for number, row in enumerate(rows, start=1):
        fields = {
            name: row.get(data.columns.get(name, name))
            for name in (*template.required, *template.optional)
        }
        fault = _fault(fields, template)
        if fault:
            counts.drop(fault, number)
        else:
            prompt, response = template.render({k: v or "" for k, v in fields.items()})
            yield number, prompt, response


def _fault(fields: Mapping[str, Any], template: Template) -> str | None:
    for name, value in fields.items():
        if value is None:
            if name in template.required:
                return f"{name} is null"
        elif not isinstance(value, str):
            return f"{name} is not text"
        elif name in template.required and not value.strip():
            return f"{name} is empty"
    return None


def _tokenise(
    number: int,
    prompt: str,
    response: str,
    data: DataConfig,
    training: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    counts: RowCounts,
) -> Example | None:
    """Return the row's tokens, ended by the end-of-sequence token and cut to max_length.

    Prompt and response are encoded apart, so that the border between them is the one that a
    generation from the prompt sees.
    """
    asked = tokenizer(prompt)["input_ids"]
    answer = tokenizer(response, add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    if len(asked) >= training.max_length:
        counts.drop(f"prompt alone fills training.max_length={training.max_length}", number)
        return None
    tokens = [*asked, *answer]
    counts.truncated += len(tokens) > training.max_length
    # The first token has no predecessor to be predicted from.
    masked = len(asked) if data.mask_prompt else 1
    labels = [IGNORED] * masked + tokens[masked:]
    return Example(input_ids=tokens[: training.max_length], labels=labels[: training.max_length])


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _as_row(_parse_json(line.rstrip("\n"), path, number), path, f"line {number}")


def _read_json(path: Path) -> Iterator[Row]:
    rows = _parse_json(path.read_text(encoding="utf-8"), path, 1)
    if not isinstance(rows, list):
        raise ValueError(f"data.path={path}: a .json file is one list of rows; or name it .jsonl")
    for number, row in enumerate(rows, start=1):
        yield _as_row(row, path, f"row {number}")


def _parse_json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"data.path={path}: {where} is not JSON: {error.msg}") from None


def _as_row(value: Any, path: Path, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"data.path={path}: {where} is not a row of named fields")
    return value


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error(
                        f"it has not the {len(reader.fieldnames or [])} fields of line 1"
                    )
                yield row
        except csv.Error as error:
            raise ValueError(
                f"data.path={path}: line {reader.line_num} is malformed: {error}"
            ) from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data.path={path} is not a parquet file: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
