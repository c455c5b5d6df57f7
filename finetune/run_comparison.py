"""Compare runs with their base in one metric, by the outcomes that their folders hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose, isfinite

from finetune.comparison import Comparison, compare, compare_stored
from finetune.metrics import Metric
from finetune.outcomes import read_answers, read_resamples
from finetune.run_folder import RunFolder

Scores = Mapping[str, tuple[float, float]]  # by run, what lm-eval reported of base and tuned


def compare_runs(
    runs: Sequence[RunFolder], task: str, name: str, metric: Metric, scores: Scores
) -> Comparison | None:
    """Compare runs with their bases; None where the stored outcomes do not allow it.

    Raises:
        ValueError: the runs were asked different questions.
    """
    compared = _compare_known if metric.is_known else _compare_opaque
    return compared(runs, task, name, metric, scores)


def compare_run(run: RunFolder, task: str, name: str, metric: Metric) -> Comparison | None:
    """Compare one run with its base in one metric; None where that cannot be done."""
    stored = run.read_scores(task)
    if stored is None or stored.base is None:
        return None
    base, tuned = stored.base.value(name), stored.tuned.value(name)
    if base is None or tuned is None or not isfinite(base) or not isfinite(tuned):
        return None
    try:
        return compare_runs([run], task, name, metric, {run.name: (base, tuned)})
    except ValueError:  # other questions on each side
        return None


def _compare_known(
    runs: Sequence[RunFolder], task: str, name: str, metric: Metric, scores: Scores
) -> Comparison | None:
    """Compare from the questions' outcomes; None where they do not give lm-eval's numbers."""
    answers = {run.name: read_answers(run, task, name) for run in runs}
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
    runs: Sequence[RunFolder], task: str, name: str, metric: Metric, scores: Scores
) -> Comparison | None:
    """Compare by the resamples that were stored at scoring; None where there are none."""
    drawn = {run.name: read_resamples(run, task, name, scores[run.name]) for run in runs}
    known = {run: one for run, one in drawn.items() if one is not None}
    if not known:
        return None
    questions = {run.name: len(read_answers(run, task, name).tuned) for run in runs}
    counts = {run: (one.changed, questions[run]) for run, one in known.items()}
    return compare_stored(scores, known, counts, metric)
