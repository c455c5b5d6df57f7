"""Results of a sweep, read from its runs' files: rows of results.csv, comparisons, best run."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isfinite
from pathlib import Path

from finetune.files import Damaged, JsonLines, read_json, write_atomic
from finetune.reporting.curves import TRAIN_LOSS, Series, select_curves
from finetune.reporting.mixtures import find_machine_mixtures, find_mixtures
from finetune.reporting.rows import Row, build_row, render_csv
from finetune.reporting.run_comparison import ScoredRuns, compare_objective, compare_runs
from finetune.statistics.comparison import Comparison
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import Metric
from finetune.statistics.objective import MEAN, VALIDATION, Objective
from finetune.statistics.objective_comparison import average_metric
from finetune.tracking.events import drop_superseded, read_lines
from finetune.tracking.run_folder import REMEDY, RunFolder
from finetune.tracking.score_files import TaskScores
from finetune.tracking.sweep_record import SweepRecord

MAIN_METRICS = ("acc", "acc_norm")


@dataclass
class Results:
    """A sweep's runs, their rows of `results.csv`, and comparisons with their base."""

    folder: Path
    record: SweepRecord
    runs: list[RunFolder]
    rows: list[Row]
    metrics: dict[str, Metric] = field(default_factory=dict)  # by task/metric, acc first
    comparisons: dict[str, Comparison] = field(default_factory=dict)  # by task/metric
    remarks: list[str] = field(default_factory=list)  # on what was not compared, and why
    refused: set[str] = field(default_factory=set)  # metrics of unequal questions
    scores: list[dict[str, TaskScores | None]] = field(default_factory=list)  # of each run, by task
    scored: dict[str, ScoredRuns] = field(default_factory=dict)  # by task
    curves: dict[str, dict[str, Series]] = field(default_factory=dict)  # by run and metric

    @cached_property
    def objective(self) -> Objective | None:
        """The metrics of `evaluation.objective`; None where it is not set."""
        return Objective.parse(self.record.objective) if self.record.objective else None

    @cached_property
    def main_metric(self) -> str | None:
        """The task/metric that ranks the runs: of `evaluation.objective`, where that names one.

        Else the first task's acc, or its first metric. It has a direction, and all runs that have
        it answered the same questions.
        """
        names = list(self.metrics)
        if self.objective is not None and not self.objective.is_loss:
            names = [self.objective.column]
        ranked = (name for name in names if name in self.metrics)
        return next((name for name in ranked if self._ranks(name, self.metrics[name])), None)

    def _ranks(self, name: str, metric: Metric) -> bool:
        has_direction = metric.higher_is_better is not None
        return has_direction and name not in self.refused and bool(self.scored_rows(name))

    @property
    def selects(self) -> str | None:
        """The column of results.csv that chooses the best run, on other questions or rows.

        Those are of `evaluation.select_split`, or those to validate on.
        """
        if self.main_metric is None:
            return None
        is_loss = self.objective is not None and self.objective.is_loss
        column = VALIDATION if is_loss else MetricName.parse(self.main_metric).selection
        has_all = all(row.get(column) is not None for row in self.compared_rows())
        return column if has_all else None

    def scored_rows(self, name: str) -> list[Row]:
        """Return the rows of the runs that have a score in a metric."""
        return [row for row in self.rows if row.get(name) is not None and isfinite(row[name])]

    def compared_rows(self) -> list[Row]:
        """Return the rows of the runs that are ranked by the main metric."""
        if self.main_metric is None:
            return []
        if self.main_metric not in self.comparisons:
            return self.scored_rows(self.main_metric)
        compared = self.comparisons[self.main_metric].differences
        return [row for row in self.rows if row["run"] in compared]

    def leaders(self) -> list[Row]:
        """Return the rows with the best main metric, in its direction; several are a tie.

        Without a main metric they are those with the lowest validation loss, unless an objective
        names another. The first is the best
        run: ties are broken by validation loss, then by the order of the grid.
        """
        if self.main_metric is None and self.objective is not None and not self.objective.is_loss:
            return []  # it names what no run has
        if self.main_metric is None:
            column, metric, rows = VALIDATION, Metric("mean", False), self.validated_rows()
        else:
            column = self.selects or self.main_metric
            metric = LOSS if column == VALIDATION else self.metrics[self.main_metric]
            rows = self.compared_rows()
        if not rows:
            return []
        best = metric.best([row[column] for row in rows])
        return sorted((row for row in rows if row[column] == best), key=_validation_loss)

    def best_run(self) -> str | None:
        """Return the name of the best run; None before any is scored."""
        leaders = self.leaders()
        return str(leaders[0]["run"]) if leaders else None

    def validated_rows(self) -> list[Row]:
        """Return the rows of the finished runs that have a validation loss."""
        return [
            row for row in self.rows if row["status"] == "finished" and row[VALIDATION] is not None
        ]

    def drawn_metrics(self) -> list[str]:
        """Return the metrics of MLflow's view, the main one first."""
        if self.main_metric is None and self.validated_rows():
            return [VALIDATION, *self.metrics]
        return sorted(self.metrics, key=lambda name: name != self.main_metric)

    @property
    def lowest_first(self) -> bool:
        """True if lower is better in the first of the drawn metrics."""
        drawn = self.drawn_metrics()[:1]
        return [self.metrics.get(name, LOSS).higher_is_better for name in drawn] == [False]

    def label(self, row: Row) -> str:
        """Name a run by its place in the grid."""
        return ", ".join(f"{key}={row[key]}" for key in self.record.swept) or str(row["run"])


LOSS = Metric("mean", higher_is_better=False)


def _validation_loss(row: Row) -> float:
    return inf if row[VALIDATION] is None else float(row[VALIDATION])


def read_results(folder: Path) -> Results:
    """Read the results of a sweep so far.

    Raises:
        ValueError: the folder is not a sweep's.
    """
    record = SweepRecord.load(folder)
    runs = [RunFolder(folder / run.folder) for run in record.runs]
    scores = [{task: run.read_scores(task) for task in record.tasks} for run in runs]
    rows = [
        build_row(run, place.swept, found)
        for run, place, found in zip(runs, record.runs, scores, strict=True)
    ]
    results = Results(folder, record, runs, rows, scores=scores)
    _add_tracked(results)
    for run, row in zip(runs, rows, strict=True):
        _add_events(results, run, row)
    labels = [results.label(row) for row in rows]
    for task in record.tasks:
        pairs = zip(labels, scores, strict=True)
        known = {label: one for label, found in pairs if (one := found[task]) is not None}
        mixtures = find_mixtures(task, known)
        results.remarks += mixtures.remarks
        results.scored[task] = scored = ScoredRuns.read(
            [run for run, found in zip(runs, scores, strict=True) if found[task]], task
        )
        for name, metric in _gathered(known.values()).items():
            column = MetricName(task, name)
            results.metrics[str(column)] = metric
            if mixtures.questions_differ:
                results.refused.add(str(column))
            _compare(results, scored, column, metric)
    if results.objective is not None and results.objective.column == str(MEAN):
        _add_average(results, results.objective)
    results.remarks += find_machine_mixtures(dict(zip(labels, runs, strict=True)))
    return results


def _add_events(results: Results, run: RunFolder, row: Row) -> None:
    """Add what a run's event log holds, and remarks on its damaged files; the log is read once."""
    lines = read_lines(run.events)
    damage = find_damage(run, lines)
    results.remarks += damage
    lost = [line for line in damage if ": evaluation/" in line or "is not a folder" in line]
    if lost:  # why the row has no scores
        row["reason"] = row["reason"] or lost[0].removeprefix(f"{run.name}: ")
    results.curves[run.name] = curves = select_curves(drop_superseded(lines.values, []))
    if TRAIN_LOSS in curves and not run.find_lost_events(lines):
        row["train/loss"] = curves[TRAIN_LOSS].values[-1]  # of the last step, as MLflow shows it


def _gathered(scores: Iterable[TaskScores]) -> dict[str, Metric]:
    """Return the metrics of a task that any run has, acc and acc_norm first."""
    found: dict[str, Metric] = {}
    for one in scores:
        for name, metric in one.definitions.items():
            found.setdefault(name, metric)
    return dict(sorted(found.items(), key=lambda item: item[0] not in MAIN_METRICS))


def _add_tracked(results: Results) -> None:
    """Add the MLflow run of each run that is mirrored."""
    with suppress(Damaged, KeyError, TypeError, AttributeError):  # the tracker reports it
        stored = read_json(results.folder / "mlflow.json", dict) or {"children": {}}
        tracked = {name: child["run_id"] for name, child in stored["children"].items()}
        for row in results.rows:
            row["mlflow_run_id"] = tracked.get(row["run"])


def find_damage(run: RunFolder, events: JsonLines | None = None) -> list[str]:
    """Return a line for each damaged file that a report would read; it is left out there.

    Args:
        run: the run.
        events: the lines of its event log, where they are read already.
    """
    if problem := run.find_place_problem():
        return [f"{run.name}: {problem}"]
    status = run.status()
    if status is not None and status.state == "running":
        return []  # its process is writing them
    return [
        f"{run.name}: {name} is damaged and left out: {problem}; {REMEDY}"
        for name, problem in run.find_damage(of_weights=False, events=events).items()
    ]


def _compare(results: Results, scored: ScoredRuns, name: MetricName, metric: Metric) -> None:
    """Compare all runs that have a base score, and add intervals and p to their rows."""
    scores = _find_pairs(results, name)
    if not scores or not all(isfinite(value) for pair in scores.values() for value in pair):
        return
    try:
        comparison = compare_runs(scored, name, metric, scores)
    except ValueError as error:
        results.remarks.append(f"{name} is not compared: {error}")
        results.refused.add(str(name))
        return
    if comparison is None:
        results.remarks.append(
            f"{name} is shown, but not compared: its outcomes are missing (with "
            "evaluation.keep_texts=false, those that are texts), or stored by an older version; "
            "run the same command again to score it"
        )
        return
    _add_comparison(results, name, comparison)


def _find_pairs(results: Results, name: MetricName) -> dict[str, tuple[float, float]]:
    """Return the scores of base and tuned model, by run."""
    column = str(name)
    return {
        row["run"]: (row[name.base], row[column])
        for row in results.rows
        if row.get(column) is not None and row.get(name.base) is not None
    }


def _add_comparison(results: Results, name: MetricName, comparison: Comparison) -> None:
    results.comparisons[str(name)] = comparison
    for row in results.rows:
        found = comparison.differences.get(row["run"])
        if found is not None:
            row[f"{name.difference}_low"], row[f"{name.difference}_high"] = found.low, found.high
            row[name.p], row[name.p_adjusted] = found.p, found.p_adjusted


def _add_average(results: Results, objective: Objective) -> None:
    """Add the weighted mean of several metrics as one of its own, which ranks the runs."""
    names = {str(name) for name in objective.weights}
    metric = average_metric(objective, results.metrics) if names <= set(results.metrics) else None
    if metric is None:
        return
    for row in results.rows:
        columns = {str(MEAN): "", MEAN.base: "base", MEAN.selection: "selection"}
        found = {column: objective.average(row, part) for column, part in columns.items()}
        row.update({column: value for column, value in found.items() if value is not None})
        if found[str(MEAN)] is not None and found[MEAN.base] is not None:
            row[MEAN.difference] = row[str(MEAN)] - row[MEAN.base]
    results.metrics = {str(MEAN): metric, **results.metrics}
    runs = set(_find_pairs(results, MEAN))
    try:
        if not results.refused.isdisjoint(names):
            raise ValueError("its metrics were scored on different questions")
        comparison = None
        if runs:
            comparison = compare_objective(results.scored, objective, results.metrics, runs)
    except ValueError as error:
        results.remarks.append(f"{MEAN} is not compared: {error}")
        results.refused.add(str(MEAN))
        return
    if comparison is not None:
        _add_comparison(results, MEAN, comparison)
    elif runs:
        results.remarks.append(
            f"{MEAN} is shown, but not compared: only means over questions are averaged with an "
            "interval"
        )


def write_csv(results: Results) -> None:
    """Write `results.csv`."""
    write_atomic(results.folder / "results.csv", render_csv(results.rows))
