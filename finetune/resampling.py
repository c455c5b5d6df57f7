"""Paired bootstrap and swaps of base and tuned answers, for aggregates that are no mean.

Axes: resample, question, term (of metrics.AGGREGATES).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import stats

from finetune.metrics import AGGREGATES, Metric, Strata, Values, Vector, aggregate

RESAMPLES = 1999
LEVEL = 0.05
SEED = 0  # the same answers give the same numbers; equal questions the same swaps
MOST_DRAWS = 1_000_000  # that stand in memory at a time


@dataclass(frozen=True)
class Resampled:
    """A tuned model's difference to its base, and what it could as well have been."""

    base: float
    tuned: float
    changed: int  # questions whose outcome is another
    bootstrap: Vector  # tuned - base over questions drawn with replacement
    swapped: Vector  # the same with base and tuned swapped at random, question by question

    @cached_property
    def interval(self) -> tuple[float, float] | tuple[None, None]:
        """The 95 % percentile interval; none where the resamples do not differ."""
        low, high = np.quantile(self.bootstrap, (LEVEL / 2, 1 - LEVEL / 2))
        return (float(low), float(high)) if low < high else (None, None)

    @property
    def p(self) -> float:
        """The share of swaps with a difference as large, two-sided."""
        return float(_share_as_large(np.abs(self.swapped), abs(self.tuned - self.base)))


def _share_as_large(drawn: Vector, observed: float) -> float:
    # Sums in another order may differ in the last bit; a tie counts against the claim.
    as_large = (drawn >= observed - 1e-9 * max(1.0, observed)).sum()
    return float(as_large + 1) / (len(drawn) + 1)


def max_t(drawn: Sequence[Resampled]) -> Vector:
    """Return each run's p adjusted for all of them (Westfall and Young's max-T).

    Each run's differences are divided by their spread over the swaps, which are the same for all
    runs; with unequal numbers of swaps there is no joint distribution: Holm's adjustment instead.
    """
    if len({len(one.swapped) for one in drawn}) > 1:
        return holm([one.p for one in drawn])
    scales = [float(np.sqrt((one.swapped**2).mean())) or 1.0 for one in drawn]
    largest = np.max(
        [np.abs(one.swapped) / scale for one, scale in zip(drawn, scales, strict=True)], axis=0
    )
    return np.array(
        [
            _share_as_large(largest, abs(one.tuned - one.base) / scale)
            for one, scale in zip(drawn, scales, strict=True)
        ]
    )


def holm(p: Sequence[float]) -> Vector:
    """Return p adjusted by Holm's step-down procedure (1979)."""
    order = np.argsort(p)
    steps = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def resample(metric: Metric, before: Values, after: Values, strata: Strata) -> Resampled:
    """Resample a known metric of two models' answers to the same questions.

    Args:
        metric: one of metrics.AGGREGATES.
        before: the base's values, one a question.
        after: the tuned model's.
        strata: the questions' tasks; they are drawn within each.
    """
    terms = AGGREGATES[metric.aggregation].terms([*before, *after])
    one, other = terms[: len(before)], terms[len(before) :]
    base, tuned = (float(aggregate(metric, side, strata)) for side in (one, other))
    changed = int((one != other).any(axis=1).sum())
    if not changed:
        nothing = np.zeros(RESAMPLES)
        return Resampled(base, tuned, 0, nothing, nothing)
    drawn = _bootstrap(metric, one, other, strata)
    return Resampled(base, tuned, changed, drawn, _swap(metric, one, other, strata))


def _bootstrap(metric: Metric, one: Vector, other: Vector, strata: Strata) -> Vector:
    """Draw questions with replacement, within each task, for both models alike."""

    def difference(*places: npt.NDArray[np.intp], axis: int = -1) -> Vector:
        value = AGGREGATES[metric.aggregation].value
        drawn = zip(strata.places, several(places), strict=True)
        sums = [_counts(p, len(stratum)) @ both[stratum] for stratum, p in drawn]
        parts = [value(each[..., width:]) - value(each[..., :width]) for each in sums]
        total: Vector = np.tensordot(strata.weights, np.stack(parts), axes=1)
        return total

    both, width = np.concatenate([one, other], axis=1), one.shape[1]

    def several(places: Sequence[npt.NDArray[np.intp]]) -> Sequence[npt.NDArray[np.intp]]:
        # A task of one question is always drawn as it is; scipy takes no sample of one.
        drawn = iter(places)
        shape = places[0].shape[:-1]
        return [
            next(drawn) if len(stratum) > 1 else np.zeros((*shape, 1), dtype=np.intp)
            for stratum in strata.places
        ]

    # Places within each task.
    samples = [np.arange(len(stratum)) for stratum in strata.places if len(stratum) > 1]
    if not samples:
        return np.full(RESAMPLES, float(difference(np.zeros(0, dtype=np.intp))))
    result = stats.bootstrap(
        samples,
        difference,
        n_resamples=RESAMPLES,
        batch=max(1, MOST_DRAWS // len(one)),
        vectorized=True,
        axis=-1,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    return np.asarray(result.bootstrap_distribution, dtype=np.float64)


def _counts(places: npt.NDArray[np.intp], size: int) -> Vector:
    """Return how often each question was drawn: [..., draw] -> [..., question]."""
    rows = places.reshape(-1, places.shape[-1])
    offsets = np.arange(len(rows))[:, None] * size
    counts = np.bincount((rows + offsets).ravel(), minlength=len(rows) * size)
    return counts.reshape(*places.shape[:-1], size).astype(np.float64)


def _swap(metric: Metric, one: Vector, other: Vector, strata: Strata) -> Vector:
    """Swap both models' answers to random questions; the same ones whatever the answers."""
    value = AGGREGATES[metric.aggregation].value

    def difference(signed: npt.NDArray[np.float64], axis: int = -1) -> Vector:
        swaps = (signed < 0).astype(np.float64)  # [..., question]
        parts = []
        for stratum in strata.places:
            moved = swaps[..., stratum] @ (other - one)[stratum]
            before, after = one[stratum].sum(axis=0), other[stratum].sum(axis=0)
            parts.append(value(after - moved) - value(before + moved))
        total: Vector = np.tensordot(strata.weights, np.stack(parts), axes=1)
        return total

    # The questions' numbers, whose signs "samples" flips.
    result = stats.permutation_test(
        (np.arange(1.0, len(one) + 1),),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, MOST_DRAWS // len(one)),
        axis=-1,
        rng=np.random.default_rng(SEED),
    )
    return np.asarray(result.null_distribution, dtype=np.float64)
