"""Compare settings with the base over all of their seeds, where seeds were swept."""

from __future__ import annotations

from collections import defaultdict

from finetune.reporting.outcomes import find_outcomes
from finetune.reporting.results import Results
from finetune.reporting.verdict import show_difference
from finetune.statistics.comparison import compare_seeds
from finetune.statistics.metric_names import MetricName

SEED_KEYS = ("training.seed", "training.data_seed")


def compare_all_seeds(results: Results) -> dict[str, tuple[int, str, str]]:
    """Compare settings over their seeds, where seeds were swept and the main metric is a mean.

    Returns:
        By setting: the number of seeds, the difference and its interval.
    """
    metric = results.main_metric
    keys = [key for key in results.record.swept if key not in SEED_KEYS]
    if metric not in results.comparisons or len(keys) == len(results.record.swept):
        return {}
    comparison, name = results.comparisons[metric], MetricName.parse(metric)
    if not comparison.metric.is_mean or name.task not in results.scored:
        return {}
    settings: dict[str, list[str]] = defaultdict(list)
    for row in results.rows:
        if row["run"] in comparison.differences:
            label = ", ".join(f"{key}={row[key]}" for key in keys) or "all seeds"
            settings[label].append(row["run"])
    tables, found = results.scored[name.task].tables, {}
    for label, runs in settings.items():
        if len(runs) > 1:
            pairs = [find_outcomes(tables[run], name.name) for run in runs]
            one = compare_seeds(pairs[0][0], [tuned for _, tuned in pairs])
            value, *ends = (show_difference(n, comparison) for n in (one.value, one.low, one.high))
            interval = " to ".join(ends) if one.low < one.high else ""
            found[label] = (len(runs), value, interval)
    return found
