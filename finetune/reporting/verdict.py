"""Summarise a sweep in sentences: the best run, and which differences are significant."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.reporting.results import Results
from finetune.reporting.rows import Row
from finetune.statistics.comparison import LEVEL, Comparison, Difference
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import show_score
from finetune.statistics.objective import MEAN, VALIDATION

NOTHING = "No run has been scored yet, so there is nothing to compare."


def verdict(results: Results) -> str:
    """Return a paragraph: the best run by the main metric, then its results in other tasks."""
    main, sentences = results.main_metric, [main_verdict(results)]
    if main is not None:
        sentences += [_verdict_on_other(results, name) for name in _other_tasks(results, main)]
    return " ".join(sentence.strip() for sentence in sentences if sentence)


def main_verdict(results: Results) -> str:
    """Return the sentences on the main metric, or on the validation loss where there is none."""
    main = results.main_metric
    if main is None:
        return _verdict_without_ranking(results)
    comparison = results.comparisons.get(main)
    if comparison is None:
        return _verdict_without_base(results, main).strip()
    if not comparison.has_changes:
        return _no_change(main, len(comparison.differences))
    sentences = (_tie(results, main), _verdict_on_main(results, main, comparison))
    return " ".join(sentence.strip() for sentence in sentences if sentence)


def show_difference(value: float, comparison: Comparison) -> str:
    """Return a difference in points where the metric is a share of questions, else as it is."""
    return f"{value * 100:+.1f}" if comparison.is_share else f"{value:+.4g}"


def show_interval(found: Difference, comparison: Comparison) -> str:
    if found.low is None or found.high is None:
        return ""
    low, high = (show_difference(value, comparison) for value in (found.low, found.high))
    return f"[{low}, {high}]"


def show_detectable(comparison: Comparison) -> str:
    """Return a sentence on the minimum detectable difference, if it is known."""
    if not comparison.detectable:
        return ""
    value = comparison.detectable * 100
    return f"Minimum detectable difference: {value:.1f} points (5 % level, 80 % power)."


def show_direction(metric: str, results: Results) -> str:
    """Return a metric's name, with its direction where a reader may not expect it."""
    notes = ["lower is better"] if results.metrics[metric].higher_is_better is False else []
    if metric == str(MEAN) and results.objective is not None:
        notes.insert(0, results.objective.describe())
    return f"{metric} ({', '.join(notes)})" if notes else metric


def describe_choice(results: Results) -> str:
    """Return a sentence on what chooses the best run; empty where nothing does."""
    if results.main_metric is None:
        return ""
    chosen = results.selects or results.main_metric
    if results.objective is not None:
        return f"The best run is chosen by evaluation.objective: {results.objective.describe()}."
    return (
        f"The best run is chosen by {chosen}, the first metric of the first task; "
        "evaluation.objective names another, or several."
    )


def _p_value(value: float) -> str:
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".", 1)


def _tested(found: Difference, grid: int) -> str:
    """Return p, adjusted where there is more than one run to adjust for."""
    if grid == 1:
        return _p_value(found.p)
    return f"{_p_value(found.p_adjusted)}, adjusted for {grid} runs"


def _change(found: Difference, comparison: Comparison) -> str:
    unit = " points" if comparison.is_share else ""
    interval = show_interval(found, comparison)
    return f"{show_difference(found.value, comparison)}{unit}" + (
        f" {interval}" if interval else ""
    )


def _no_change(metric: str, grid: int) -> str:
    runs = f" in any of {grid} runs" if grid > 1 else ""
    return f"No detectable difference in {metric}: no answer differs from the base's{runs}."


def _tie(results: Results, metric: str) -> str:
    leaders = results.leaders()
    if len(leaders) < 2:
        return ""
    labels = [results.label(row) for row in leaders]
    shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
    first, second = leaders[0][VALIDATION], leaders[1][VALIDATION]
    if first is not None and (second is None or first < second):
        reason = "has the lowest validation loss of them"
    else:
        reason = "comes first in the grid"
    where = "the selection" if results.selects else show_direction(metric, results)
    return f"A tie in {where}: {shown}; {labels[0]} is named since it {reason}."


def _verdict_on_main(results: Results, metric: str, comparison: Comparison) -> str:
    best = results.leaders()[0]
    found = comparison.differences[best["run"]]
    grid = len(comparison.differences)
    if results.selects and grid > 1:
        return _verdict_on_chosen(results, best, metric)
    label, name = results.label(best), show_direction(metric, results)
    change, tested = _change(found, comparison), _tested(found, grid)
    detectable = show_detectable(comparison)
    if not found.changed:
        return f"{_no_proof(name)}: the best, {label}, answers as the base does. {detectable}"
    if not comparison.is_improvement(best["run"]):
        worse = ", significantly worse" if found.is_significant else ""
        return (
            f"{_no_proof(name)}: the best, {label}, differs by {change} ({tested}){worse}. "
            f"{detectable}"
        )
    first = (
        f"{label} scores {show_score(found.tuned)} in {name}, {change} from the base's "
        f"{show_score(found.base)} ({tested})."
    )
    if grid == 1:
        return f"{first} {detectable}"
    better = sum(map(comparison.is_improvement, comparison.differences))
    return (
        f"{first} {better} of {grid} runs are significantly better than the base; the best was "
        "chosen on the questions it is reported on, so its score is slightly optimistic."
    )


def _no_proof(name: str) -> str:
    return f"No run is significantly better than the base in {name}"


def _verdict_on_chosen(results: Results, best: Row, metric: str) -> str:
    """Return the verdict on a run that was chosen on other questions than it is reported on.

    It is the only run that is tested, so its own p needs no adjustment for the grid.
    """
    comparison = results.comparisons[metric]
    found = comparison.differences[best["run"]]
    name, label = show_direction(metric, results), results.label(best)
    base = f"from the base's {show_score(found.base)}"
    change = f"{_change(found, comparison)} {base} ({_p_value(found.p)})"
    if found.p < LEVEL and found.value * comparison.metric.sign > 0:
        claim = f"{label} scores {show_score(found.tuned)} in {name}, {change}."
    else:
        claim = f"No significant improvement in {name}: {label} differs by {change}."
    grid = len(comparison.differences)
    by = "by the validation loss" if results.selects == VALIDATION else "on other questions"
    chosen = f"It was chosen from {grid} runs {by}."
    return f"{claim} {chosen} {show_detectable(comparison)}"


def _verdict_without_base(results: Results, metric: str) -> str:
    """Return the run with the best score, where no base was scored."""
    rows = results.compared_rows()
    best = rows and results.leaders()[0]
    assert best, "the main metric has scores"
    of = f" of {len(rows)} runs" if len(rows) > 1 else ""
    direction = "higher" if results.metrics[metric].higher_is_better else "lower"
    score = f"{show_score(best[metric])} ({direction} is better)"
    first = f"{results.label(best)} has the best {metric}{of}, {score}."
    if not of:
        first = f"{results.label(best)} scores {score} in {metric}."
    note = "The base was not scored beside the runs, so no improvement is claimed."
    return " ".join(part for part in (_tie(results, metric), first, note) if part)


def _verdict_without_ranking(results: Results) -> str:
    """Return the run with the lowest validation loss, where no task ranks the runs."""
    validated = results.validated_rows()
    if results.objective is not None and not results.leaders():
        return (
            f"No run has the scores of evaluation.objective ({results.objective.describe()}), so "
            "the runs are not ranked."
        )
    if not validated:
        return _why_unranked(results) or NOTHING
    lowest = results.leaders()[0]
    of = f", of {len(validated)} runs" if len(validated) > 1 else ""
    first = f"{results.label(lowest)} has the lowest validation loss, {lowest[VALIDATION]:.4f}{of}."
    why = _why_unranked(results) or "No task compares the runs with their base."
    return f"{first} {why} No improvement is claimed."


def _why_unranked(results: Results) -> str:
    """Return why scored runs are not ranked by any metric."""
    scored = [name for name in results.metrics if results.scored_rows(name)]
    if not scored:
        return ""
    if any(name in results.refused for name in scored):
        return "The runs were scored on different questions and are not ranked by them."
    return "lm-eval names no direction for any metric of these tasks, so the runs are not ranked."


def _other_tasks(results: Results, main: str) -> Sequence[str]:
    """Return the first metric of each other task; of the main one too, if only that changed."""
    tasks = {MetricName.parse(main).task}
    if main in results.comparisons and not results.comparisons[main].has_changes:
        tasks.clear()  # another metric of the task may have changed
    names: list[str] = []
    first = [] if results.objective is None else list(map(str, results.objective.weights))
    for name in sorted(results.metrics, key=lambda name: name not in first):
        task = MetricName.parse(name).task
        if task not in tasks and name != main and _says_more(results, name, main):
            tasks.add(task)
            names.append(name)
    return names


def _says_more(results: Results, metric: str, main: str) -> bool:
    if MetricName.parse(metric).task == MetricName.parse(main).task:
        return metric in results.comparisons and results.comparisons[metric].has_changes
    return bool(results.scored_rows(metric))


def _verdict_on_other(results: Results, metric: str) -> str:
    """Return a sentence on the best run in another task."""
    best, comparison = results.best_run(), results.comparisons.get(metric)
    row = next(row for row in results.rows if row["run"] == best)
    if comparison is None or best not in comparison.differences:
        score = row.get(metric)
        return (
            "" if score is None else f"In {metric} {results.label(row)} scores {show_score(score)}."
        )
    found, name = comparison.differences[best], show_direction(metric, results)
    if not comparison.has_changes:
        return _no_change(metric, len(comparison.differences))
    label = results.label(row)
    if not found.changed:
        return f"In {name} {label} answers as the base does."
    tested = _tested(found, len(comparison.differences))
    claim, _ = show_claim(found, comparison, found.p_adjusted)
    change = _change(found, comparison)
    return f"In {name} {label} differs from the base by {change} ({tested}): {claim}."


def show_claim(found: Difference, comparison: Comparison, p: float) -> tuple[str, bool]:
    """Return what may be claimed of a difference with this p, and whether it is significant."""
    if not comparison.has_changes or not found.changed:
        return "no detectable difference", False
    if p >= LEVEL:
        return "not significant", False
    better = found.value * comparison.metric.sign
    if not better:
        return "significant", True
    return "significantly better" if better > 0 else "significantly worse", True
