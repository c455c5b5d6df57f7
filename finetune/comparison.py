"""What a sweep's scores prove: paired statistics on the questions' own outcomes.

Pure: outcomes in, numbers out. Every setting answered the questions that the base answered, so
only the questions whose outcome changed count. Claims are adjusted for the size of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

Outcomes = Mapping[str, float]  # question's hash -> 1 right, 0 wrong (or a score in between)
Matrix = npt.NDArray[np.float64]  # [run, question]

LEVEL = 0.05  # two-sided
POWER_QUANTILES = (1.959964, 0.841621)  # of a 5 % test, and of 80 % power
RESAMPLES = 9999
SEED = 0  # of the sign flips: the same outcomes give the same p


@dataclass(frozen=True)
class Difference:
    """A tuned model against its base on the same questions."""

    questions: int
    base: float
    tuned: float
    low: float  # of tuned - base, 95 %, paired
    high: float
    gained: int  # questions that became right
    lost: int  # questions that became wrong
    p: float  # as if this were the only run
    p_adjusted: float  # for the whole grid

    @property
    def value(self) -> float:
        return self.tuned - self.base

    @property
    def is_proven(self) -> bool:
        """Whether the grid's adjusted p allows a claim."""
        return self.p_adjusted < LEVEL


@dataclass(frozen=True)
class Comparison:
    """All runs of a grid against the base, on one metric."""

    differences: dict[str, Difference]  # by run
    detectable: float  # the smallest difference seen in four of five such experiments

    def best(self) -> str:
        """Return the run with the highest score; of equal ones the first."""
        return max(self.differences, key=lambda run: self.differences[run].tuned)


def compare(
    pairs: Mapping[str, tuple[Outcomes, Outcomes]], resamples: int = RESAMPLES
) -> Comparison:
    """Compare every run with its base, question by question.

    Args:
        pairs: by run, the outcomes of its base and its own; at least one run.
        resamples: sign flips of the adjusted p.

    Raises:
        ValueError: a run was asked other questions than the first one's base.
    """
    questions = list(next(iter(pairs.values()))[0])
    before = np.array([_aligned(questions, base, name) for name, (base, _) in pairs.items()])
    after = np.array([_aligned(questions, tuned, name) for name, (_, tuned) in pairs.items()])
    changes = after - before
    adjusted = adjusted_p(changes, resamples)
    differences = {
        name: _difference(before[number], after[number], float(adjusted[number]))
        for number, name in enumerate(pairs)
    }
    changed = float((changes != 0).mean())
    return Comparison(differences, detectable_difference(changed, len(questions)))


def _aligned(questions: Sequence[str], outcomes: Outcomes, name: str) -> list[float]:
    other = sorted(set(questions) ^ outcomes.keys())
    if other:
        raise ValueError(
            f"{name} was not asked the same questions as the others: {len(other)} differ, "
            f"the first, {other[0][:12]}, {'only it' if other[0] in outcomes else 'not it'}"
        )
    return [outcomes[question] for question in questions]


def _difference(before: npt.NDArray[Any], after: npt.NDArray[Any], adjusted: float) -> Difference:
    gained, lost = int((after > before).sum()), int((after < before).sum())
    is_binary = bool(np.isin([before, after], (0, 1)).all())
    low, high = paired_interval(before, after)
    return Difference(
        questions=len(before),
        base=float(before.mean()),
        tuned=float(after.mean()),
        low=low,
        high=high,
        gained=gained,
        lost=lost,
        p=mid_p(gained, lost) if is_binary else _paired_p(before, after),
        p_adjusted=adjusted,
    )


def mid_p(gained: int, lost: int) -> float:
    """Return the two-sided mid-p of McNemar's test (Fagerland, Lydersen, Laake 2013)."""
    if gained + lost == 0:
        return 1.0
    exact = stats.binomtest(gained, gained + lost).pvalue
    return float(min(1.0, exact - stats.binom.pmf(gained, gained + lost, 0.5)))


def paired_interval(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference."""
    if len(before) < 2 or not (after - before).std():
        value = float((after - before).mean())
        return value, value
    interval = stats.ttest_rel(after, before).confidence_interval(1 - LEVEL)
    return float(interval.low), float(interval.high)


def _paired_p(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> float:
    if not (after - before).std():
        return 1.0
    return float(stats.ttest_rel(after, before).pvalue)


def adjusted_p(changes: Matrix, resamples: int = RESAMPLES) -> npt.NDArray[np.float64]:
    """Return each run's p, two-sided, adjusted for all runs (Westfall and Young's max-T).

    Without an effect each question's changes could as well have the other sign, for all runs
    together, since they share base and question: this keeps how alike the runs are.

    Args:
        changes: tuned - base, [run, question].
        resamples: random sign flips.
    """
    scale = np.sqrt((changes**2).sum(axis=1))
    weights = (changes / np.where(scale == 0, 1, scale)[:, None]).T  # [question, run]
    observed = np.abs(weights.sum(axis=0))

    def largest(signed: npt.NDArray[Any], axis: int = -1) -> npt.NDArray[Any]:
        largest_of: npt.NDArray[Any] = np.abs(np.sign(signed) @ weights).max(axis=-1)
        return largest_of

    # The questions' numbers, whose signs "samples" flips, each for all runs at once.
    questions = np.arange(1.0, changes.shape[1] + 1)
    drawn = stats.permutation_test(
        (questions,),
        largest,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=500,
        alternative="greater",
        axis=-1,
        rng=np.random.default_rng(SEED),
    ).null_distribution
    # Sums in another order may differ in the last bit; a tie counts against the claim.
    as_large = (drawn[:, None] >= observed[None, :] - 1e-9).sum(axis=0)
    adjusted: npt.NDArray[np.float64] = (as_large + 1) / (len(drawn) + 1)
    return adjusted


def detectable_difference(changed: float, questions: int) -> float:
    """Return the difference that such an experiment finds in four of five cases (Connor 1987).

    Args:
        changed: share of questions whose outcome changes.
        questions: how many there are.
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
    """One setting over several seeds against the base."""

    seeds: int
    value: float  # mean of tuned - base
    low: float
    high: float


def compare_seeds(base: Outcomes, seeds: Sequence[Outcomes]) -> SeedDifference:
    """Compare a setting's seeds with the base; questions and seeds are both a sample.

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
