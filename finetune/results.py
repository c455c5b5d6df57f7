"""What a sweep came to, read from the files of its runs, and the tables that show it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from finetune.comparison import Comparison, Outcomes, compare
from finetune.escaping import for_csv
from finetune.files import Damaged, read_json, read_yaml, write_atomic
from finetune.run_folder import REMEDY, RunFolder
from finetune.tables import add_row, build_table
from finetune.tables import print_table as print_table  # beside the tables made here

COSTS = ("train_seconds", "tokens_per_second", "peak_memory_gib", "num_trainable_parameters")
MAIN_METRICS = ("acc", "acc_norm")
VALIDATION = "validation/loss"
RECORD = "sweep.yaml"

Row = dict[str, Any]  # one row of results.csv


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


@dataclass
class Results:
    """A sweep's runs, their rows of `results.csv`, and what their scores prove."""

    folder: Path
    record: SweepRecord
    runs: list[RunFolder]
    rows: list[Row]
    comparisons: dict[str, Comparison] = field(default_factory=dict)  # by task/metric
    remarks: list[str] = field(default_factory=list)  # what could not be compared, and why

    @cached_property
    def main_metric(self) -> str | None:
        """The task/metric that the report turns on: the first task's acc, or its first metric."""
        return next(iter(self.comparisons), None)

    @property
    def selects(self) -> str | None:
        """The column of results.csv that chooses the best run, on questions of its own."""
        if self.main_metric is None:
            return None
        task, metric = self.main_metric.rsplit("/", 1)
        column = f"{task}/select_{metric}"
        return column if all(column in row for row in self.compared_rows()) else None

    def compared_rows(self) -> list[Row]:
        """Return the rows of the runs that are compared in the main metric."""
        if self.main_metric is None:
            return []
        compared = self.comparisons[self.main_metric].differences
        return [row for row in self.rows if row["run"] in compared]

    def best_run(self) -> str | None:
        """Return the run with the highest main metric, once any is scored; of equals the first.

        Where no task compares them it is the run with the lowest validation loss.
        """
        if self.main_metric is None:
            validated = self.validated_rows()
            return min(validated, key=lambda row: row[VALIDATION])["run"] if validated else None
        selects = self.selects
        if selects is None:
            return self.comparisons[self.main_metric].best()
        return str(max(self.compared_rows(), key=lambda row: row[selects])["run"])

    def validated_rows(self) -> list[Row]:
        """Return the rows of the finished runs that have a validation loss."""
        return [
            row for row in self.rows if row["status"] == "finished" and row[VALIDATION] is not None
        ]

    def drawn_metrics(self) -> list[str]:
        """Return what runs are to be compared by, the main one first."""
        return list(self.comparisons) or ([VALIDATION] if self.validated_rows() else [])

    def label(self, row: Row) -> str:
        """Name a run by its place in the grid."""
        return ", ".join(f"{key}={row[key]}" for key in self.record.swept) or str(row["run"])


def read_results(folder: Path) -> Results:
    """Read what the runs of a sweep have come to so far.

    Raises:
        ValueError: the folder is not a sweep's.
    """
    record = SweepRecord.load(folder)
    runs = [RunFolder(folder / run.folder) for run in record.runs]
    tracked = _tracked(folder)
    rows = [
        _row(run, place.swept, record.tasks, tracked.get(run.name))
        for run, place in zip(runs, record.runs, strict=True)
    ]
    results = Results(folder, record, runs, rows)
    for run in runs:
        results.remarks += find_damage(run)
    for task in record.tasks:
        for metric in _compared_metrics(task, rows):
            _compare(results, task, metric)
    return results


def _tracked(folder: Path) -> dict[str, str | None]:
    """Return the MLflow run of each run that is mirrored."""
    with suppress(Damaged, KeyError, TypeError, AttributeError):  # tracking names it
        stored = read_json(folder / "mlflow.json", dict) or {"children": {}}
        return {name: child["run_id"] for name, child in stored["children"].items()}
    return {}


def find_damage(run: RunFolder) -> list[str]:
    """Return a line for each damaged file that a report would read; it is left out there."""
    status = run.status()
    if status is not None and status.state == "running":
        return []  # its process writes them now
    return [
        f"{run.name}: {name} is damaged and left out: {problem}; {REMEDY}"
        for name, problem in run.find_damage(of_weights=False).items()
    ]


def _row(run: RunFolder, swept: Mapping[str, str], tasks: Sequence[str], tracked: Any) -> Row:
    """Return one row of `results.csv`; what a run has not come to is absent."""
    status = run.status()
    row: Row = {
        "run": run.name,
        **swept,
        "status": status.state if status else "pending",
        "reason": status.reason if status else None,
    }
    trained = run.read_json("training.json") or {}
    seconds = 0.0
    for task in tasks:
        scores = run.read_json(f"evaluation/{task}.json")
        if scores:
            row.update(_task_columns(task, scores))
            seconds += scores["tuned"].get("seconds", 0.0)
        chosen = run.read_json(f"evaluation/{task}.select.json")
        if scores and chosen:
            metrics = chosen["tuned"]["metrics"].items()
            row.update({f"{task}/select_{name}": value for name, value in metrics})
            seconds += chosen["tuned"].get("seconds", 0.0)
    row["train/loss"] = trained.get("loss")
    row[VALIDATION] = trained.get("validation_loss")
    row["evaluation_seconds"] = seconds or None
    row.update({name: trained.get(name) for name in COSTS})
    row["mlflow_run_id"] = tracked
    return row


def _task_columns(task: str, scores: Mapping[str, Any]) -> Row:
    """Return a task's tuned metrics, and for each the base's and the difference to it."""
    tuned = scores["tuned"]["metrics"]
    base = scores["base"]["metrics"] if "base" in scores else {}
    columns: Row = {f"{task}/{name}": value for name, value in tuned.items()}
    for name, value in base.items():
        if not name.endswith("_stderr"):
            columns[f"{task}/base_{name}"] = value
            columns[f"{task}/{name}_diff"] = tuned[name] - value if name in tuned else None
    return columns


def _compare(results: Results, task: str, metric: str) -> None:
    """Compare all runs that have outcomes of a metric, and put what is proven into their rows."""
    pairs = {}
    for run in results.runs:
        pair = read_outcomes(run, task, metric)
        if pair is not None:
            pairs[run.name] = pair
    if not pairs:
        return
    name = f"{task}/{metric}"
    try:
        comparison = compare(pairs)
    except ValueError as error:
        results.remarks.append(f"{name} is not compared: {error}")
        return
    results.comparisons[name] = comparison
    for row in results.rows:
        found = comparison.differences.get(row["run"])
        if found is not None:
            row[f"{name}_diff_low"], row[f"{name}_diff_high"] = found.low, found.high
            row[f"{name}_p"], row[f"{name}_p_adjusted"] = found.p, found.p_adjusted


def read_outcomes(run: RunFolder, task: str, metric: str) -> tuple[Outcomes, Outcomes] | None:
    """Return a run's outcomes on each question, the base's and its own; None without both."""
    sides = read_sides(run, task, metric)
    return (sides["base"], sides["tuned"]) if sides["base"] and sides["tuned"] else None


def read_sides(run: RunFolder, task: str, metric: str) -> dict[str, dict[str, float]]:
    """Return the outcomes of a run's `base` and `tuned` model; none where one was not asked."""
    sides: dict[str, dict[str, float]] = {"base": {}, "tuned": {}}
    if run.read_json(f"evaluation/{task}.json") is None:
        return sides
    for item in run.read_items(task):
        for side, outcomes in sides.items():
            if metric in item.get(side, {}):
                key = f"{item['hash']}:{item['prompt']}"
                while key in outcomes:  # a task may ask the same question twice
                    key += "'"
                outcomes[key] = item[side][metric]
    return sides


def write_csv(results: Results) -> None:
    """Write `results.csv`: one line a run, the columns of all runs, in the order they come."""
    columns = list(dict.fromkeys(name for row in results.rows for name in row))
    tasks = [name for name in columns if "/" in name and name.split("/")[0] in results.record.tasks]
    # Costs and ids go last, also where a run that failed early brings them first.
    last = ["train/loss", VALIDATION, "evaluation_seconds", *COSTS, "mlflow_run_id"]
    first = [name for name in columns if name not in last and name not in tasks]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*first, *tasks, *last], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: for_csv(value) for name, value in row.items()} for row in results.rows)
    write_atomic(results.folder / "results.csv", text.getvalue())


def render_table(results: Results) -> Table:
    """Return the table of a sweep's end: swept values, base and tuned scores, difference, time."""
    rows, swept = results.rows, results.record.swept or ["run"]
    metrics = [
        f"{task}/{name}" for task in results.record.tasks for name in _shown_metrics(task, rows)
    ]
    losses = ["train/loss", *([VALIDATION] if results.validated_rows() else [])]
    numbers = ["\n".join(name.rsplit("/", 1)) for name in (*metrics, *losses, "train/time")]
    table = build_table(*swept, "status", *numbers, right=numbers)
    for row in rows:
        cells = [str(row.get(key, "")) for key in swept]
        cells += [row["status"], *(_score_cell(row, metric) for metric in metrics)]
        cells += [_number(row[name], ".3f") for name in losses]
        cells.append(_number(row["train_seconds"], ".0f", " s"))
        add_row(table, *cells)
    return table


def render_plan(points: Sequence[tuple[Mapping[str, str], str, str]]) -> Table:
    """Return the table of what a sweep is about to do: swept values, run, and what is to come."""
    swept = list(points[0][0])
    table = build_table(*swept, "run", "to come")
    for values, run, prospect in points:
        add_row(table, *(values[key] for key in swept), run, prospect)
    return table


def _compared_metrics(task: str, rows: Sequence[Row]) -> list[str]:
    """Return a task's metrics that have a base beside them, acc and acc_norm first."""
    prefix = f"{task}/base_"
    names = dict.fromkeys(
        name.removeprefix(prefix) for row in rows for name in row if name.startswith(prefix)
    )
    return sorted(names, key=lambda name: name not in MAIN_METRICS)


def _shown_metrics(task: str, rows: Sequence[Row]) -> list[str]:
    without_base = [name for name in MAIN_METRICS if any(f"{task}/{name}" in row for row in rows)]
    return _compared_metrics(task, rows) or without_base


def _score_cell(row: Row, metric: str) -> str:
    task, name = metric.rsplit("/", 1)
    tuned, base = row.get(metric), row.get(f"{task}/base_{name}")
    if tuned is None:
        return ""
    if base is None:
        return f"{tuned:.4f}"
    proven = "*" if (row.get(f"{metric}_p_adjusted") or 1.0) < 0.05 else " "
    return f"{base:.4f} -> {tuned:.4f} \n{tuned - base:+.4f}{proven}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
