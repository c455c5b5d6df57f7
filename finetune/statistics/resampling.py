"""Paired bootstrap and permutation test (swapped answers), for metrics that are not means.

Axes: resample, question, term (of metrics.AGGREGATES).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

from finetune.statistics.metrics import AGGREGATES, Metric, Strata, Values, Vector, aggregate

RESAMPLES = 1999
LEVEL = 0.05
SEED = 0  # the same answers give the same numbers; equal questions the same swaps
MOST_DRAWS = 1_000_000  # held in memory at a time
MOST_TERMS = 20_000_000  # of the runs that are resampled together


@dataclass(frozen=True)
class Resampled:
    """A tuned model's difference to its base, with its bootstrap and permutation distributions."""

    base: float
    tuned: float
    changed: int  # questions whose outcome differs
    bootstrap: Vector  # tuned - base over questions drawn with replacement
    swapped: Vector  # the same with base and tuned swapped at random, question by question

    @cached_property
    def interval(self) -> tuple[float, float] | tuple[None, None]:
        """The 95 % percentile interval; none where the resamples do not differ."""
        low, high = np.quantile(self.bootstrap, (LEVEL / 2, 1 - LEVEL / 2))
        return (float(low), float(high)) if low < high else (None, None)

    @property
    def p(self) -> float:
        """The two-sided p: the share of swaps with a difference as large."""
        return float(_share_as_large(np.abs(self.swapped), abs(self.tuned - self.base)))


def _share_as_large(drawn: Vector, observed: float) -> float:
    # Sums in another order may differ in the last bit; a tie counts against the claim.
    as_large = (drawn >= observed - 1e-9 * max(1.0, observed)).sum()
    return float(as_large + 1) / (len(drawn) + 1)


def max_t(drawn: Sequence[Resampled]) -> Vector:
    """Return each run's p adjusted for all of them (Westfall and Young's max-T).

    Each run's differences are divided by their spread over the swaps, which are the same for all
    runs; with unequal numbers of swaps there is no joint distribution: Holm's adjustment.
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
    return resample_all(metric, [(before, after)], strata)[0]


def resample_all(
    metric: Metric, pairs: Sequence[tuple[Values, Values]], strata: Strata
) -> list[Resampled]:
    """Resample a metric of several runs' answers to the same questions, by the same draws."""
    runs = [_terms(metric, *pair) for pair in pairs]
    values = [[float(aggregate(metric, side, strata)) for side in sides] for sides in runs]
    changed = [int((before != after).any(axis=1).sum()) for before, after in runs]
    nothing = np.zeros(RESAMPLES)
    found = [
        Resampled(base, tuned, count, nothing, nothing)
        for (base, tuned), count in zip(values, changed, strict=True)
    ]
    for places in _batches([n for n, count in enumerate(changed) if count], runs):
        terms = np.stack([runs[n] for n in places], axis=1)  # [side, run, question, term]
        drawn = _bootstrap(metric, terms, strata), _swap(metric, terms, strata)
        for n, bootstrap, swapped in zip(places, *drawn, strict=True):
            found[n] = replace(found[n], bootstrap=bootstrap, swapped=swapped)
    return found


def _batches(places: Sequence[int], runs: Sequence[tuple[Vector, Vector]]) -> Iterator[list[int]]:
    """Batch runs whose terms have the same shape (it depends on the classes), as memory allows."""
    for shape in dict.fromkeys(runs[n][0].shape for n in places):
        same = [n for n in places if runs[n][0].shape == shape]
        most = max(1, MOST_TERMS // (2 * shape[0] * shape[1]))
        yield from (same[start : start + most] for start in range(0, len(same), most))


def _terms(metric: Metric, before: Values, after: Values) -> tuple[Vector, Vector]:
    terms = AGGREGATES[metric.aggregation].terms([*before, *after])
    return terms[: len(before)], terms[len(before) :]


def _bootstrap(metric: Metric, terms: Vector, strata: Strata) -> Vector:
    """Draw questions with replacement within each task, the same for all runs: [run, resample]."""
    value, batch = AGGREGATES[metric.aggregation].value, _batch_size(terms)
    draw, differences = np.random.default_rng(SEED), []
    for start in range(0, RESAMPLES, batch):
        rows = min(batch, RESAMPLES - start)
        parts = []
        for stratum in strata.places:
            counts = _draw_counts(draw, rows, len(stratum))
            before, after = _weighted_sums(counts, terms[:, :, stratum])
            parts.append(value(after) - value(before))
        differences.append(np.tensordot(strata.weights, np.stack(parts), axes=1))
    return np.concatenate(differences, axis=1)


def _batch_size(terms: Vector) -> int:
    """Return the resamples drawn at a time; it changes the random draws."""
    return max(1, MOST_DRAWS // int(terms.shape[2]))


def _draw_counts(draw: np.random.Generator, rows: int, size: int) -> Vector:
    """Return how often each question is drawn: [resample, question]."""
    if size == 1:  # always drawn once, without using the generator
        return np.ones((rows, 1))
    places = draw.integers(0, size, (rows, size))
    offsets = np.arange(rows)[:, None] * size
    counts = np.bincount((places + offsets).ravel(), minlength=rows * size)
    return counts.reshape(rows, size).astype(np.float64)


def _weighted_sums(weights: Vector, terms: Vector) -> Vector:
    """Sum terms over questions: [resample, question], [..., question, term] -> [..., term].

    Returns:
        [..., resample, term], by one product of matrices for all runs.
    """
    *outer, questions, width = terms.shape
    columns = np.moveaxis(terms, -2, 0).reshape(questions, -1)
    sums = (weights @ columns).reshape(len(weights), *outer, width)
    return np.moveaxis(sums, 0, -2)


def _swap(metric: Metric, terms: Vector, strata: Strata) -> Vector:
    """Swap both models' answers to random questions: [run, resample]; the same ones for all."""
    value, (before, after) = AGGREGATES[metric.aggregation].value, terms
    differences = []
    for swaps in draw_swaps(terms.shape[2], RESAMPLES, _batch_size(terms)):
        parts = []
        for stratum in strata.places:
            one, other = before[:, stratum], after[:, stratum]
            moved = _weighted_sums(swaps[:, stratum], other - one)
            was, became = (side.sum(axis=1)[:, None] for side in (one, other))
            parts.append(value(became - moved) - value(was + moved))
        differences.append(np.tensordot(strata.weights, np.stack(parts), axes=1))
    return np.concatenate(differences, axis=1)


def draw_swaps(questions: int, resamples: int, batch: int) -> Iterator[Vector]:
    """Yield which questions' answers are swapped (1) or not (0): [resample, question].

    The draws are those of `scipy.stats.permutation_test` of type "samples", which takes seconds
    for the questions' own arrays; of few questions all combinations are used.
    """
    if resamples >= 2**questions:
        yield np.array(list(product((0.0, 1.0), repeat=questions)))
        return
    batch, draw = min(batch, resamples), np.random.default_rng(SEED)
    pairs = np.tile(np.arange(2), (batch, questions, 1))
    for start in range(0, resamples, batch):
        swaps = draw.permuted(pairs, axis=-1)[: resamples - start, :, 0]
        yield swaps.astype(np.float64)
