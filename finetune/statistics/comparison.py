"""Paired tests and intervals of tuned models against their base, on the same questions.

Pure: outcomes in, numbers out. A mean has McNemar's mid-p or the paired t-test, another aggregate
is resampled (resampling.py). Each p is also adjusted for the number of runs of the grid (max-T).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from finetune.statistics.metrics import AGGREGATES, MEANS, Metric, Strata
from finetune.statistics.resampling import Resampled, draw_swaps, max_t, resample_all

Outcomes = Mapping[str, Any]  # question's hash -> lm-eval's value: 1 right, 0 wrong, or another
Matrix = npt.NDArray[np.float64]  # [run, question]

LEVEL = 0.05  # two-sided
POWER_QUANTILES = (1.959964, 0.841621)  # of a 5 % test, and of 80 % power
RESAMPLES = 9999
BATCH = 500  # sign flips at a time


@dataclass(frozen=True)
class Difference:
    """A tuned model against its base on the same questions."""

    questions: int
    base: float
    tuned: float
    low: float | None  # of tuned - base, 95 %, paired; None where all changes are equal
    high: float | None
    gained: int | None  # questions answered better; None where single questions have no score
    lost: int | None  # questions answered worse
    changed: int  # questions whose outcome differs
    p: float  # unadjusted
    p_adjusted: float  # for the number of runs of the grid

    @property
    def value(self) -> float:
        return self.tuned - self.base

    @property
    def is_significant(self) -> bool:
        """True if significant after adjustment for the grid, at the 5 % level."""
        return self.p_adjusted < LEVEL


@dataclass(frozen=True)
class Comparison:
    """All runs of a grid against the base, on one metric."""

    metric: Metric
    differences: dict[str, Difference]  # by run
    # Minimum detectable difference (5 % level, 80 % power); None unless outcomes are 0 or 1.
    detectable: float | None
    is_share: bool  # the metric is a share of questions: differences are in points

    @property
    def has_changes(self) -> bool:
        """Whether any answer of any run differs from the base's."""
        return any(found.changed for found in self.differences.values())

    def is_improvement(self, run: str) -> bool:
        """Return whether a run is significantly better than its base, after adjustment."""
        found = self.differences[run]
        return found.is_significant and found.value * self.metric.sign > 0

    def leaders(self) -> list[str]:
        """Return the runs with the best score; several are a tie, none without a direction."""
        if self.metric.higher_is_better is None:
            return []
        best = self.metric.best([found.tuned for found in self.differences.values()])
        return [run for run, found in self.differences.items() if found.tuned == best]


def compare(
    pairs: Mapping[str, tuple[Outcomes, Outcomes]],
    metric: Metric | None = None,
    members: Mapping[str, str] | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare every run with its base, question by question.

    Args:
        pairs: by run, the outcomes of its base and of the tuned model; at least one run.
        metric: what the outcomes are aggregated to; the mean where none is named.
        members: the task of each question, where several tasks are a group.
        weights: of the tasks; None takes the metric's.
        resamples: sign flips of the adjusted p of a mean.

    Raises:
        ValueError: a run was scored on other questions than the first run's base.
    """
    metric = metric or Metric()
    questions = list(next(iter(pairs.values()))[0])
    before = [_aligned(questions, base, name) for name, (base, _) in pairs.items()]
    after = [_aligned(questions, tuned, name) for name, (_, tuned) in pairs.items()]
    scores = AGGREGATES[metric.aggregation].scores
    befores = np.array([scores(values) for values in before])
    afters = np.array([scores(values) for values in after])
    is_share = bool(((befores >= 0) & (befores <= 1) & (afters >= 0) & (afters <= 1)).all())
    if metric.is_mean:
        differences, detectable = _compare_means(list(pairs), befores, afters, resamples)
    else:
        strata = Strata.build(metric, [(members or {}).get(one) for one in questions], weights)
        drawn = resample_all(metric, list(zip(before, after, strict=True)), strata)
        detectable, differences = None, _compare_resampled(list(pairs), drawn, befores, afters)
    if metric.higher_is_better is False:
        differences = {name: _turned(found) for name, found in differences.items()}
    is_share = is_share and metric.aggregation in (*MEANS, "nanmean", "f1")
    return Comparison(metric, differences, detectable, is_share)


def compare_stored(
    scores: Mapping[str, tuple[float, float]],
    drawn: Mapping[str, Resampled],
    changed: Mapping[str, tuple[int, int]],
    metric: Metric,
) -> Comparison:
    """Compare runs in a metric that only lm-eval can compute, by resamples stored at scoring.

    Args:
        scores: by run, the metric's value of base and tuned model.
        drawn: by run, its stored resamples; those of runs with equal questions share their swaps.
        changed: by run, how many questions have another outcome, and how many there are.
        metric: the metric.
    """
    adjusted = max_t(list(drawn.values()))
    differences = {}
    for run, p_adjusted in zip(drawn, adjusted, strict=True):
        num_changed, questions = changed[run]
        low, high = drawn[run].interval if num_changed else (None, None)
        p = drawn[run].p if num_changed else 1.0
        differences[run] = Difference(
            questions, *scores[run], low, high, None, None, num_changed,
            p, p if len(drawn) == 1 else float(p_adjusted),
        )  # fmt: skip
    return Comparison(metric, differences, None, is_share=False)


def _compare_means(
    names: Sequence[str], before: Matrix, after: Matrix, resamples: int
) -> tuple[dict[str, Difference], float | None]:
    changes = after - before
    adjusted = adjusted_p(changes, resamples) if len(names) > 1 else [None]
    differences = {
        name: _difference(before[number], after[number], adjusted[number])
        for number, name in enumerate(names)
    }
    if not _is_binary(before, after):
        return differences, None
    return differences, detectable_difference(float((changes != 0).mean()), changes.shape[1])


def _compare_resampled(
    names: Sequence[str], drawn: Sequence[Resampled], before: Matrix, after: Matrix
) -> dict[str, Difference]:
    adjusted = max_t(drawn)
    differences = {}
    for number, (name, one) in enumerate(zip(names, drawn, strict=True)):
        rose, fell = (int((sign * (after - before)[number] > 0).sum()) for sign in (1, -1))
        low, high = one.interval if one.changed else (None, None)
        p_adjusted = one.p if len(names) == 1 else float(adjusted[number])
        differences[name] = Difference(
            before.shape[1], one.base, one.tuned, low, high, rose, fell, one.changed,
            one.p, p_adjusted,
        )  # fmt: skip
    return differences


def _turned(found: Difference) -> Difference:
    """Count a question whose score fell as gained, where lower is better."""
    return replace(found, gained=found.lost, lost=found.gained)


def _aligned(questions: list[str], outcomes: Outcomes, name: str) -> list[Any]:
    if list(outcomes) == questions:
        return list(outcomes.values())
    other = sorted(set(questions) ^ outcomes.keys())
    if other:
        raise ValueError(
            f"{name} was not scored on the same questions as the others: {len(other)} differ; "
            f"{other[0][:12]} is {'only in it' if other[0] in outcomes else 'missing from it'}"
        )
    return [outcomes[question] for question in questions]


def _is_binary(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> bool:
    return bool(np.isin([before, after], (0, 1)).all())


def _difference(
    before: npt.NDArray[Any], after: npt.NDArray[Any], adjusted: float | None
) -> Difference:
    gained, lost = int((after > before).sum()), int((after < before).sum())
    low, high = paired_interval(before, after)
    p = mid_p(gained, lost) if _is_binary(before, after) else _paired_p(before, after)
    return Difference(
        questions=len(before),
        base=float(before.mean()),
        tuned=float(after.mean()),
        low=low,
        high=high,
        gained=gained,
        lost=lost,
        changed=gained + lost,
        p=p,
        p_adjusted=p if adjusted is None else float(adjusted),
    )


def mid_p(gained: int, lost: int) -> float:
    """Return the two-sided mid-p of McNemar's test (Fagerland, Lydersen, Laake 2013)."""
    if gained + lost == 0:
        return 1.0
    exact = stats.binomtest(gained, gained + lost).pvalue
    return float(min(1.0, exact - stats.binom.pmf(gained, gained + lost, 0.5)))


def paired_interval(
    before: npt.NDArray[Any], after: npt.NDArray[Any]
) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % interval of the mean difference; none where all changes are equal."""
    if len(before) < 2 or not (after - before).std():
        return None, None
    interval = stats.ttest_rel(after, before).confidence_interval(1 - LEVEL)
    return float(interval.low), float(interval.high)


def _paired_p(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> float:
    if not (after - before).std():
        return 1.0
    return float(stats.ttest_rel(after, before).pvalue)


def adjusted_p(changes: Matrix, resamples: int = RESAMPLES) -> npt.NDArray[np.float64]:
    """Return each run's p, two-sided, adjusted for all runs (Westfall and Young's max-T).

    Under the null hypothesis the signs of a question's changes are exchangeable. They are flipped
    for all runs together, which keeps the correlation between runs.

    Args:
        changes: tuned - base, [run, question].
        resamples: random sign flips.
    """
    scale = np.sqrt((changes**2).sum(axis=1))
    weights = (changes / np.where(scale == 0, 1, scale)[:, None]).T  # [question, run]
    observed = np.abs(weights.sum(axis=0))
    drawn = np.concatenate(
        [
            np.abs((1 - 2 * swaps) @ weights).max(axis=-1)
            for swaps in draw_swaps(changes.shape[1], resamples, BATCH)
        ]
    )
    # Sums in another order may differ in the last bit; a tie counts against the claim.
    as_large = (drawn[:, None] >= observed[None, :] - 1e-9).sum(axis=0)
    adjusted: npt.NDArray[np.float64] = (as_large + 1) / (len(drawn) + 1)
    return adjusted


def detectable_difference(changed: float, questions: int) -> float:
    """Return the minimum detectable difference at 5 % level and 80 % power (Connor 1987).

    Args:
        changed: share of questions whose outcome changes.
        questions: number of questions.
    """
    if changed == 0:
        return 0.0
    by_level, by_power = POWER_QUANTILES

    def excess(delta: float) -> float:
        spread = by_level * np.sqrt(changed) + by_power * np.sqrt(max(0.0, changed - delta**2))
        return float(delta - spread / np.sqrt(questions))

    return float(optimize.brentq(excess, 0.0, 2.0))


@dataclass(frozen=True)
class SeedDifference:
    """The difference of one setting to the base, over several seeds."""

    seeds: int
    value: float  # mean of tuned - base
    low: float
    high: float


def compare_seeds(base: Outcomes, seeds: Sequence[Outcomes]) -> SeedDifference:
    """Compare a setting's seeds with the base; questions and seeds are both random samples.

    The variance is that over questions of the seeds' mean plus that over seeds of the questions'
    mean; degrees of freedom by Satterthwaite (1946).

    Args:
        base: the base model's outcomes.
        seeds: at least two runs that differ in their seed alone.
    """
    before = np.array(list(base.values()), dtype=np.float64)
    after = np.array([_aligned(list(base), one, f"seed {n}") for n, one in enumerate(seeds)])
    changes = after - before  # [seed, question]
    parts = np.array(
        [
            changes.mean(axis=0).var(ddof=1) / changes.shape[1],
            changes.mean(axis=1).var(ddof=1) / changes.shape[0],
        ]
    )
    value, error = float(changes.mean()), float(np.sqrt(parts.sum()))
    if error == 0:
        return SeedDifference(len(seeds), value, value, value)
    freedom = parts.sum() ** 2 / (parts**2 / (np.array(changes.shape[::-1]) - 1)).sum()
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    return SeedDifference(len(seeds), value, value - half, value + half)
