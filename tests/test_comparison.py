"""Statistics against worked examples, and against sweeps whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from finetune.statistics.comparison import (
    Outcomes,
    adjusted_p,
    compare,
    compare_seeds,
    detectable_difference,
    mid_p,
)


def outcomes(values: object) -> Outcomes:
    """Give outcomes their questions' hashes."""
    return {f"q{number}": float(value) for number, value in enumerate(np.asarray(values))}


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    # The paper's example (airway responsiveness, 1 against 7) and what symmetry demands.
    [(1, 7, 0.0391), (7, 1, 0.0391), (0, 0, 1.0), (5, 5, 0.7539)],
)
def test_mid_p_is_the_papers(gained: int, lost: int, p: float) -> None:
    """Recorded references, to four digits."""
    assert mid_p(gained, lost) == pytest.approx(p, abs=5e-5)


def test_the_reference_experiment_is_not_proven_by_unpaired_errors() -> None:
    """33 more right of 2,376: paired and with few flips it is proven, with many it is not."""
    assert mid_p(33 + 20, 20) < 0.001
    assert mid_p(33 + 130, 130) == pytest.approx(0.0541, abs=5e-4)


def test_one_pair_is_compared_question_by_question() -> None:
    """Flips, means, interval and p are those of the library's paired functions."""
    draw = np.random.default_rng(1)
    before = (draw.random(300) < 0.6).astype(float)
    after = np.where(draw.random(300) < 0.1, 1 - before, before)
    comparison = compare({"run": (outcomes(before), outcomes(after))})
    found = comparison.differences["run"]
    assert found.gained is not None
    assert found.lost is not None
    assert (found.gained, found.lost) == ((after > before).sum(), (after < before).sum())
    assert found.value == pytest.approx(after.mean() - before.mean())
    interval = stats.ttest_rel(after, before).confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == mid_p(found.gained, found.lost)
    assert found.p_adjusted == found.p  # a grid of one needs no adjustment
    # Flipping signs draws from the exact binomial.
    exact = stats.binomtest(found.gained, found.gained + found.lost).pvalue
    assert adjusted_p((after - before)[None])[0] == pytest.approx(exact, abs=0.02)
    assert found.questions == 300


def test_questions_are_paired_by_hash_not_by_order() -> None:
    """The same outcomes in another order compare the same."""
    before = outcomes([1, 0, 1, 1, 0, 0])
    after = outcomes([1, 1, 1, 0, 1, 0])
    turned = dict(reversed(list(after.items())))
    assert compare({"a": (before, after)}) == compare({"a": (before, turned)})


def test_unequal_questions_are_refused() -> None:
    """The message names the run and the first question that differs."""
    before = outcomes([1, 0, 1])
    with pytest.raises(ValueError, match=r"run 2 .* 1 differ; q3 is"):
        compare({"run 1": (before, before), "run 2": (before, outcomes([1, 1, 1, 1]))})


def test_no_change_is_no_difference() -> None:
    """Equal outcomes have p 1, no interval, and nothing to detect."""
    before = outcomes([1, 0, 1, 1])
    comparison = compare({"a": (before, before), "b": (before, before)})
    for found in comparison.differences.values():
        assert (found.value, found.low, found.high) == (0, None, None)
        assert (found.changed, found.p, found.p_adjusted) == (0, 1, 1)
    assert comparison.detectable == 0


def test_adjusting_never_helps_and_knows_equal_runs() -> None:
    """P grows with the grid, but nine copies of one run are one run."""
    draw = np.random.default_rng(2)
    change = draw.choice([-1.0, 0.0, 1.0], p=[0.03, 0.9, 0.07], size=500)
    others = draw.choice([-1.0, 0.0, 1.0], p=[0.05, 0.9, 0.05], size=(8, 500))
    alone = adjusted_p(change[None])[0]
    assert adjusted_p(np.vstack([change, *others]))[0] > alone
    assert adjusted_p(np.vstack([change] * 9))[0] == pytest.approx(alone)


def test_a_detectable_difference_is_detected_in_four_of_five() -> None:
    """The formula agrees with experiments drawn from it."""
    changed, questions = 0.1, 2000
    delta = detectable_difference(changed, questions)
    draw = np.random.default_rng(3)
    gained = draw.binomial(questions, (changed + delta) / 2, size=2000)
    lost = draw.binomial(questions, (changed - delta) / 2, size=2000)
    found = np.mean([mid_p(int(a), int(b)) < 0.05 for a, b in zip(gained, lost, strict=True)])
    assert found == pytest.approx(0.8, abs=0.03)


def test_seeds_widen_the_interval() -> None:
    """Where seeds disagree, questions alone would claim too much; covered 95 times of 100."""
    draw = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        before = (draw.random(400) < 0.6).astype(float)
        seeds = []
        for effect in draw.normal(0.02, 0.02, size=4):
            flips = draw.random(400)
            after = np.where((before == 0) & (flips < 0.2 + effect / 0.4), 1.0, before)
            seeds.append(outcomes(np.where((before == 1) & (flips < 0.8 / 6), 0.0, after)))
        found = compare_seeds(outcomes(before), seeds)
        covered += found.low <= 0.02 <= found.high
    assert covered >= 180


def pairs(base: Outcomes, runs: dict[str, Outcomes]) -> dict[str, tuple[Outcomes, Outcomes]]:
    """Put the base beside each run."""
    return {name: (base, run) for name, run in runs.items()}


def simulated(
    draw: np.random.Generator, effect: float = 0.0
) -> tuple[Outcomes, dict[str, Outcomes]]:
    """Return a base at 80 % and nine settings that change a tenth of its answers."""
    base = (draw.random(2376) < 0.8).astype(float)
    runs = {}
    for number in range(9):
        planted = effect if number == 4 else 0.0
        change = draw.random(2376)
        right, wrong = base == 1, base == 0
        after = np.where(right & (change < 0.05 / 0.8), 0.0, base)
        runs[f"run {number}"] = outcomes(
            np.where(wrong & (change < (0.05 + planted) / 0.2), 1.0, after)
        )
    return outcomes(base), runs


@pytest.mark.slow
def test_sweeps_without_an_effect_claim_none() -> None:
    """Of 200 sweeps of nine equal settings at most 16 claim an improvement (nominal 2.5-5 %)."""
    draw = np.random.default_rng(20240601)
    claims = 0
    for _ in range(200):
        base, runs = simulated(draw)
        found = compare(pairs(base, runs), resamples=499).differences.values()
        claims += any(one.is_significant and one.value > 0 for one in found)
    assert claims <= 16


def test_a_planted_improvement_is_found() -> None:
    """Three points of 2,376 questions stand out of nine settings, and are the best."""
    draw = np.random.default_rng(20240602)
    base, runs = simulated(draw, effect=0.03)
    comparison = compare(pairs(base, runs))
    assert comparison.leaders() == ["run 4"]
    assert comparison.differences["run 4"].is_significant
