"""Compare runs with their base in one metric, by the outcomes that their folders hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isclose, isfinite

from finetune.reporting.outcome_tables import OutcomeTable, read_tables
from finetune.reporting.outcomes import find_answers, read_resamples
from finetune.statistics.comparison import Comparison, compare, compare_stored
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import Metric
from finetune.statistics.objective import Objective
from finetune.statistics.objective_comparison import Sides, compare_average
from finetune.tracking.run_folder import RunFolder

Scores = Mapping[str, tuple[float, float]]  # by run, what lm-eval reported of base and tuned


@dataclass(frozen=True)
class ScoredRuns:
    """Runs that one task scored, and each one's outcomes by its name."""

    runs: Sequence[RunFolder]
    tables: Mapping[str, OutcomeTable]

    @classmethod
    def read(cls, runs: Sequence[RunFolder], task: str) -> ScoredRuns:
        """Read the outcomes of runs that have scores once, for all metrics."""
        return cls(runs, read_tables(runs, task))


def compare_runs(
    scored: ScoredRuns, name: MetricName, metric: Metric, scores: Scores
) -> Comparison | None:
    """Compare runs with their bases; None where the stored outcomes do not allow it.

    Args:
        scored: the task's runs.
        name: of the metric.
        metric: its definition.
        scores: of the runs that are compared.

    Raises:
        ValueError: the runs were scored on different questions.
    """
    compared = _compare_known if metric.is_known else _compare_opaque
    return compared(scored, name, metric, scores)


def compare_objective(
    scored: Mapping[str, ScoredRuns],
    objective: Objective,
    metrics: Mapping[str, Metric],
    runs: Collection[str],
) -> Comparison | None:
    """Compare runs with their bases in a weighted mean; None where that has no interval.

    Args:
        scored: the runs of each task.
        objective: the metrics and weights.
        metrics: their definitions.
        runs: those that have all scores.

    Raises:
        ValueError: the runs were scored on different questions.
    """
    answers: dict[str, dict[MetricName, Sides]] = {name: {} for name in runs}
    for name in objective.weights:
        for run in runs:
            one = find_answers(scored[name.task].tables[run], name.name)
            answers[run][name] = (one.base, one.tuned)
    return compare_average(objective, metrics, answers)


def compare_run(run: RunFolder, task: str, name: str, metric: Metric) -> Comparison | None:
    """Compare one run with its base in one metric; None where that cannot be done."""
    stored = run.read_scores(task)
    if stored is None or stored.base is None:
        return None
    base, tuned = stored.base.value(name), stored.tuned.value(name)
    if base is None or tuned is None or not isfinite(base) or not isfinite(tuned):
        return None
    try:
        scored = ScoredRuns.read([run], task)
        return compare_runs(scored, MetricName(task, name), metric, {run.name: (base, tuned)})
    except ValueError:  # other questions on each side
        return None


def _compare_known(
    scored: ScoredRuns, name: MetricName, metric: Metric, scores: Scores
) -> Comparison | None:
    """Compare from the questions' outcomes; None where they do not give lm-eval's numbers."""
    answers = {
        run.name: find_answers(scored.tables[run.name], name.name)
        for run in scored.runs
        if run.name in scores
    }
    answers = {run: one for run, one in answers.items() if one.base and one.tuned}
    if not answers:
        return None
    members = next(iter(answers.values())).members
    pairs = {run: (one.base, one.tuned) for run, one in answers.items()}
    try:
        comparison = compare(pairs, metric, members)
    except (TypeError, IndexError):  # outcomes that are not this metric's
        return None
    for run, found in comparison.differences.items():
        pairwise = zip(scores[run], (found.base, found.tuned), strict=True)
        if not all(isclose(*pair, rel_tol=1e-6, abs_tol=1e-9) for pair in pairwise):
            return None
    return comparison


def _compare_opaque(
    scored: ScoredRuns, name: MetricName, metric: Metric, scores: Scores
) -> Comparison | None:
    """Compare by the resamples that were stored at scoring; None where there are none."""
    drawn, counts = {}, {}
    for run in scored.runs:
        if run.name not in scores:
            continue
        answers = find_answers(scored.tables[run.name], name.name)
        found = read_resamples(run, name, scores[run.name], answers.changed)
        if found is not None:
            drawn[run.name] = found
            counts[run.name] = (found.changed, len(answers.tuned))
    return compare_stored(scores, drawn, counts, metric) if drawn else None
