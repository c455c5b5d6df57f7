"""Resampling by matrices: the draws and figures of scipy's bootstrap and permutation test."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from finetune.statistics.comparison import adjusted_p
from finetune.statistics.metrics import AGGREGATES, Metric, Strata
from finetune.statistics.resampling import (
    MOST_DRAWS,
    RESAMPLES,
    SEED,
    draw_swaps,
    resample,
    resample_all,
)

PAIR = {"matthews_corrcoef": 3, "f1": 2}  # classes
SIZES = {"one task": [60], "few questions": [9], "tasks": [1, 2, 40, 7], "ones": [1, 1, 1]}


def draw_values(aggregation: str, size: int, seed: int) -> list[Any]:
    """Return values as lm-eval hands them to an aggregation."""
    drawn: list[Any] = _draw(aggregation, size, seed).tolist()
    return drawn


def _draw(aggregation: str, size: int, seed: int) -> Any:
    draw = np.random.default_rng(seed)
    if aggregation in PAIR:
        return draw.integers(0, PAIR[aggregation], (size, 2))
    if aggregation == "mean":
        return draw.integers(0, 2, size).astype(float)
    if aggregation == "weighted_perplexity":
        return np.stack([-draw.random(size), draw.integers(1, 9, size)], axis=1)
    return -draw.random(size)


def strata_of(metric: Metric, name: str) -> Strata:
    members = [f"task{n}" for n, size in enumerate(SIZES[name]) for _ in range(size)]
    return Strata.build(metric, members)


def by_scipy(metric: Metric, before: list[Any], after: list[Any], strata: Strata) -> list[Any]:
    """Return both distributions as scipy draws them, question by question."""
    found = AGGREGATES[metric.aggregation]
    terms = found.terms([*before, *after])
    one, other = terms[: len(before)], terms[len(before) :]
    batch = max(1, MOST_DRAWS // len(one))

    def total(sums: list[Any]) -> Any:
        return np.tensordot(strata.weights, np.stack(sums), axes=1)

    def of_drawn(*drawn: Any, axis: int = -1) -> Any:
        given, shape = iter(drawn), drawn[0].shape[:-1]
        sums = []
        for stratum in strata.places:
            places = next(given) if len(stratum) > 1 else np.zeros((*shape, 1), dtype=int)
            sides = (found.value(side[stratum][places].sum(axis=-2)) for side in (one, other))
            sums.append(next(sides) * -1 + next(sides))
        return total(sums)

    def of_signed(signed: Any, axis: int = -1) -> Any:
        swapped = (signed < 0)[..., None]
        sums = []
        for stratum in strata.places:
            where = swapped[..., stratum, :]
            first = np.where(where, other[stratum], one[stratum]).sum(axis=-2)
            last = np.where(where, one[stratum], other[stratum]).sum(axis=-2)
            sums.append(found.value(last) - found.value(first))
        return total(sums)

    samples = [np.arange(len(stratum)) for stratum in strata.places if len(stratum) > 1]
    settings: dict[str, Any] = {"n_resamples": RESAMPLES, "batch": batch, "vectorized": True}
    bootstrap = np.full(RESAMPLES, of_drawn(np.zeros(0, dtype=int))) if not samples else None
    if samples:
        bootstrap = stats.bootstrap(
            samples, of_drawn, method="percentile", rng=np.random.default_rng(SEED), **settings
        ).bootstrap_distribution
    swapped = stats.permutation_test(
        (np.arange(1.0, len(one) + 1),), of_signed, permutation_type="samples",
        rng=np.random.default_rng(SEED), **settings,
    ).null_distribution  # fmt: skip
    return [bootstrap, swapped]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    "aggregation", ["mean", "perplexity", "weighted_perplexity", "matthews_corrcoef", "f1"]
)
def test_draws_and_figures_are_those_of_scipy(aggregation: str, sizes: str) -> None:
    """To the last bit where sums are of whole numbers; p and interval follow from them."""
    metric, size = Metric(aggregation, True, "equal"), sum(SIZES[sizes])
    before, after = (draw_values(aggregation, size, seed) for seed in (1, 2))
    strata = strata_of(metric, sizes)
    found = resample(metric, before, after, strata)
    bootstrap, swapped = by_scipy(metric, before, after, strata)
    close = 0 if aggregation in ("mean", "f1") else 1e-12
    np.testing.assert_allclose(found.bootstrap, bootstrap, rtol=0, atol=close)
    np.testing.assert_allclose(found.swapped, swapped, rtol=0, atol=close)


def test_runs_together_have_the_figures_of_each_alone() -> None:
    """Also runs that predict more classes, and one that changes nothing."""
    metric = Metric("matthews_corrcoef", True, "equal")
    strata = strata_of(metric, "tasks")
    size = sum(SIZES["tasks"])
    values = [draw_values("matthews_corrcoef", size, seed) for seed in range(4)]
    values[3][5] = [7, 7]
    pairs = [(values[0], one) for one in (*values[1:], values[0], values[2])]
    together = resample_all(metric, pairs, strata)
    for pair, one in zip(pairs, together, strict=True):
        alone = resample(metric, *pair, strata)
        assert (one.base, one.tuned, one.changed) == (alone.base, alone.tuned, alone.changed)
        np.testing.assert_allclose(one.bootstrap, alone.bootstrap, rtol=0, atol=1e-12)
        np.testing.assert_allclose(one.swapped, alone.swapped, rtol=0, atol=1e-12)
    assert [one.changed for one in together].count(0) == 1


@pytest.mark.parametrize("questions", [3, 10, 11, 300])
def test_sign_flips_are_those_of_scipy(questions: int) -> None:
    """Of few questions all, in the same order; of many the same random ones, in batches."""
    flips = np.concatenate([1 - 2 * one for one in draw_swaps(questions, 1234, 500)])
    numbers = np.arange(1.0, questions + 1)
    expected = stats.permutation_test(
        (numbers,), lambda signed, axis=-1: (signed * np.sqrt(numbers)).sum(axis=axis),
        permutation_type="samples", vectorized=True, n_resamples=1234, batch=500,
        rng=np.random.default_rng(SEED),
    ).null_distribution  # fmt: skip
    np.testing.assert_allclose((flips * numbers * np.sqrt(numbers)).sum(axis=1), expected)


def test_the_adjusted_p_of_earlier_releases_is_kept() -> None:
    """Recorded before the flips were drawn here."""
    draw = np.random.default_rng(3)
    changes = draw.integers(-1, 2, (3, 40)).astype(float)
    changes[1] = np.abs(changes[1]) * (draw.random(40) < 0.3)
    assert adjusted_p(changes).tolist() == [0.956, 0.0093, 0.9163]
