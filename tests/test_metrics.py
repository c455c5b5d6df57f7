"""Metrics: aggregate, direction, interval and p of each kind, held against lm-eval's own table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api import metrics as stock
from scipy import stats

from finetune.evaluation.harness import TaskScore, score
from finetune.evaluation.tasks import load_task
from finetune.statistics.comparison import compare
from finetune.statistics.metrics import AGGREGATES, Metric, Strata, compute, guess_metric
from finetune.statistics.resampling import holm, max_t, resample
from tests.test_harness import plain_lm, tiny_lm
from tests.test_tasks import Rows, all_of_mmlu, arc_rows, ask_stock, local

WORDS = "the cat sat on a mat while rain fell and birds sang of iron milk".split()  # noqa: SIM905


def sentences(count: int = 9) -> list[str]:
    return [" ".join(WORDS[n % 5 : 5 + n % 9]) + f" {n}." for n in range(count)]


def rows_of(name: str) -> Rows:
    """Return a few rows in the columns of a stock task's data."""
    texts = sentences()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {
        "lambada_openai": {"test": [{"text": text} for text in texts]},
        "wikitext": {"test": [{"page": f" = Title = \n {text}"} for text in texts]},
        "cola": {
            "validation": [
                {"sentence": text, "label": n % 2, "idx": n} for n, text in enumerate(texts)
            ]
        },
        "mrpc": {
            "validation": [
                {"sentence1": text, "sentence2": text[:9], "label": n % 3 % 2, "idx": n}
                for n, text in enumerate(texts)
            ]
        },
        "crows_pairs_english": {
            "test": [{"sent_more": text, "sent_less": text[4:]} for text in texts]
        },
    }
    if name in rows:
        ((_, found),) = rows[name].items()
        return dict.fromkeys(("train", "validation", "test"), found)
    if name == "mmlu":  # one question of each task, two of the first thirty
        return {split: found[:87] for split, found in all_of_mmlu().items()}
    return arc_rows()


def recomputed(score: TaskScore, metric: str) -> float:
    """Return a metric from the questions' stored values alone."""
    having = [item for item in score.items if metric in item.outcomes]
    members = {n: item.member for n, item in enumerate(having) if item.member is not None}
    values = [item.outcomes[metric] for item in having]
    return compute(score.definitions[metric], values, members)


KINDS = {
    "arc_easy": {"acc": ("mean", True), "acc_norm": ("mean", True)},
    "lambada_openai": {"perplexity": ("perplexity", False), "acc": ("mean", True)},
    "wikitext": {
        "word_perplexity": ("weighted_perplexity", False),
        "byte_perplexity": ("weighted_perplexity", False),
        "bits_per_byte": ("bits_per_byte", False),
    },
    "cola": {"mcc": ("matthews_corrcoef", True)},
    "mrpc": {"acc": ("mean", True), "f1": ("f1", True)},
    "crows_pairs_english": {"likelihood_diff": ("mean", False), "pct_stereotype": ("mean", False)},
    "mmlu": {"acc": ("mean", True)},
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_metric_is_lm_evals(name: str, tmp_path: Path) -> None:
    """Value, aggregate and direction are those of lm-eval's table, also from the stored values."""
    lm = tiny_lm()
    rows = rows_of(name)
    extra = {} if name == "arc_easy" else {"num_fewshot": 0}
    settings = local(tmp_path, name, rows, **extra)
    ours = score(lm, load_task(name, settings), settings)
    theirs = ask_stock(name, rows, plain_lm(lm), **extra)
    kinds = {
        metric: (known.aggregation, known.higher_is_better)
        for metric, known in ours.definitions.items()
    }
    assert kinds == KINDS[name]
    for metric, (_, direction) in KINDS[name].items():
        table = theirs["results"][name][f"{metric},none"]
        assert ours.metrics[metric] == pytest.approx(table, rel=1e-4)
        assert recomputed(ours, metric) == pytest.approx(ours.metrics[metric], rel=1e-9)
        told = theirs["higher_is_better"]  # nothing of a group of groups
        assert told["mmlu_anatomy" if name == "mmlu" else name][metric] is direction
        grouping = "by_size" if name == "mmlu" else None
        assert ours.definitions[metric].grouping == grouping
        assert guess_metric(metric).higher_is_better is direction


def test_an_unweighted_group_is_the_mean_of_its_tasks(tmp_path: Path) -> None:
    """A macro mean gives each task the same weight, however many questions it has."""
    lm, settings = tiny_lm(), local(tmp_path, "mmlu", rows_of("mmlu"), num_fewshot=0)
    task = load_task("mmlu", settings)
    for config in task.loaded["groups"]["mmlu"].aggregate_metric_list:
        config.weight_by_size = False
    found = score(lm, task, settings)
    assert found.definitions["acc"] == Metric("mean", True, "equal")
    assert len({sum(item.member == name for item in found.items) for name in found.members}) > 1
    assert recomputed(found, "acc") == pytest.approx(found.metrics["acc"], rel=1e-9)
    assert found.metrics["acc"] == pytest.approx(
        np.mean([metrics["acc"] for metrics in found.members.values() if metrics])
    )


def values_of(aggregation: str, draw: np.random.Generator, count: int = 60) -> list[Any]:
    """Draw what lm-eval would aggregate."""
    pairs = np.stack([-draw.gamma(5, 9, count), draw.integers(3, 40, count)], axis=1)
    labels = draw.integers(0, 2, (count, 2))
    labels[: count // 2, 1] = labels[: count // 2, 0]
    if aggregation in ("weighted_perplexity", "bits_per_byte"):
        return list(pairs.tolist())
    if aggregation in ("matthews_corrcoef", "f1"):
        return list(labels.tolist())
    if aggregation == "brier_score":
        return [
            [int(gold), shares.tolist()]
            for gold, shares in zip(labels[:, 0], draw.dirichlet(np.ones(3), count), strict=True)
        ]
    numbers = -draw.gamma(2, 1, count)
    if aggregation == "nanmean":
        numbers[::7] = np.nan
    return list(numbers.tolist())


@pytest.mark.parametrize("aggregation", AGGREGATES)
@pytest.mark.parametrize("seed", range(3))
def test_aggregates_are_lm_evals_functions(aggregation: str, seed: int) -> None:
    """The same number as the registered function, for several draws."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    values = values_of(aggregation, np.random.default_rng(seed))
    theirs = AGGREGATION_REGISTRY[aggregation](values)
    assert compute(Metric(aggregation), values) == pytest.approx(float(theirs), rel=1e-9)


def test_degenerate_labels_are_scored_as_lm_eval_does() -> None:
    """One label on one side: 0, and no division by zero."""
    for aggregation, function in (
        ("matthews_corrcoef", stock.matthews_corrcoef),
        ("f1", stock.f1_score),
    ):
        values = [[0, 0], [1, 0], [1, 0]]
        assert compute(Metric(aggregation), values) == float(function(values)) == 0


def test_several_classes_correlate_as_in_scikit_learn() -> None:
    """Matthews' coefficient of three labels."""
    draw = np.random.default_rng(5)
    values = draw.integers(0, 3, (50, 2)).tolist()
    expected = float(stock.matthews_corrcoef(values))
    assert compute(Metric("matthews_corrcoef"), values) == pytest.approx(expected)


def outcomes(values: list[Any]) -> dict[str, Any]:
    return {f"q{number}": value for number, value in enumerate(values)}


@pytest.mark.parametrize("aggregation", AGGREGATES)
@pytest.mark.parametrize("higher", [True, False])
def test_the_interval_is_of_the_quantity_that_is_shown(aggregation: str, higher: bool) -> None:
    """Interval and difference have one scale and sign; a better run is claimed in its direction."""
    draw = np.random.default_rng(7)
    before = values_of(aggregation, draw, 200)
    after = improved(aggregation, before)
    metric = Metric(aggregation, higher)
    found = compare({"run": (outcomes(before), outcomes(after))}, metric)
    run = found.differences["run"]
    assert run.base == pytest.approx(compute(metric, before))
    assert run.tuned == pytest.approx(compute(metric, after))
    assert run.low is not None
    assert run.high is not None
    assert run.low < run.value < run.high
    assert run.is_significant
    assert found.is_improvement("run") == ((run.value > 0) == higher)
    assert run.p == run.p_adjusted
    assert run.gained is not None
    assert run.lost is not None
    assert (run.gained > run.lost) == ((run.value > 0) == higher)


def improved(aggregation: str, values: list[Any]) -> list[Any]:
    """Change three of four questions alike: more likely, or right."""
    if aggregation in ("weighted_perplexity", "bits_per_byte"):
        return [[a * (0.9 if n % 4 else 1), b] for n, (a, b) in enumerate(values)]
    if aggregation in ("matthews_corrcoef", "f1"):
        return [[gold, gold if n % 4 else predicted] for n, (gold, predicted) in enumerate(values)]
    if aggregation == "brier_score":
        return [
            [gold, (np.eye(3)[gold] * 0.5 + np.array(shares) * 0.5).tolist() if n % 4 else shares]
            for n, (gold, shares) in enumerate(values)
        ]
    return [value * (0.7 if n % 4 else 1) for n, value in enumerate(values)]


def test_a_macro_mean_is_resampled_within_its_tasks() -> None:
    """The interval is that of the mean of two means, not of the pooled questions."""
    draw = np.random.default_rng(11)
    sizes = (400, 20)
    members = [name for name, size in zip("ab", sizes, strict=True) for _ in range(size)]
    before = (draw.random(420) < 0.5).astype(float).tolist()
    after = [1.0 if draw.random() < 0.3 else value for value in before]
    metric = Metric("mean", True, "equal")
    tasks = dict(zip(outcomes(before), members, strict=True))
    pairs = {"run": (outcomes(before), outcomes(after))}
    found = compare(pairs, metric, tasks).differences["run"]
    parts = [
        np.array(after)[np.array(members) == name] - np.array(before)[np.array(members) == name]
        for name in "ab"
    ]
    assert found.value == pytest.approx(np.mean([part.mean() for part in parts]))
    error = np.sqrt(sum(part.var() / len(part) for part in parts)) / 2
    assert found.low is not None
    assert found.high is not None
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.12)


def test_swaps_of_a_mean_agree_with_the_paired_test() -> None:
    """Where both apply, resampling gives the p and the interval of Student's paired test."""
    draw = np.random.default_rng(13)
    before = draw.normal(size=150)
    after = before + draw.normal(0.11, 0.6, size=150)
    strata = Strata.build(Metric(), [None] * 150)
    found = resample(Metric(), before.tolist(), after.tolist(), strata)
    test = stats.ttest_rel(after, before)
    assert found.p == pytest.approx(test.pvalue, abs=0.03)
    interval = test.confidence_interval()
    assert found.interval == pytest.approx((interval.low, interval.high), abs=0.02)


def test_a_grid_of_perplexities_is_adjusted_jointly() -> None:
    """Equal runs cost nothing, others do, and Holm stands in where the swaps are not shared."""
    draw = np.random.default_rng(17)
    metric = Metric("perplexity", False)
    before = values_of("perplexity", draw, 100)
    changes = [draw.normal(0.12, 0.5, 100) for _ in range(6)]
    runs = [(np.array(before) + change).tolist() for change in changes]
    drawn = [resample(metric, before, run, Strata.build(metric, [None] * 100)) for run in runs]
    adjusted = max_t(drawn)
    assert all(adjusted >= [one.p for one in drawn])
    assert max_t([drawn[0]] * 6)[0] == pytest.approx(drawn[0].p)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_sweeps_of_f1_without_an_effect_claim_few() -> None:
    """Of 60 pairs of models that answer alike but for chance, about one in twenty differs."""
    draw = np.random.default_rng(19)
    claims = 0
    for _ in range(60):
        gold = draw.integers(0, 2, 80)
        sides = [np.where(draw.random(80) < 0.7, gold, 1 - gold) for _ in range(2)]
        before, after = (np.stack([gold, side], axis=1).tolist() for side in sides)
        strata = Strata.build(Metric("f1"), [None] * 80)
        claims += resample(Metric("f1"), before, after, strata).p < 0.05
    assert claims <= 7


@pytest.mark.parametrize("aggregation", AGGREGATES)
def test_equal_answers_are_no_difference(aggregation: str) -> None:
    """No interval of width zero, p 1, nothing changed."""
    values = outcomes(values_of(aggregation, np.random.default_rng(23)))
    found = compare({"a": (values, values), "b": (values, values)}, Metric(aggregation))
    for run in found.differences.values():
        assert (run.changed, run.low, run.high, run.p, run.p_adjusted) == (0, None, None, 1, 1)


def test_a_metric_without_a_direction_has_no_leader() -> None:
    """It is compared, and never ranked or claimed."""
    before, after = outcomes([0.0] * 30), outcomes([1.0] * 20 + [0.0] * 10)
    found = compare({"a": (before, after), "b": (before, before)}, Metric("mean", None))
    assert found.differences["a"].is_significant
    assert found.leaders() == []
    assert not found.is_improvement("a")
    assert guess_metric("something_else").higher_is_better is None
    assert guess_metric("exact_match_strict-match").higher_is_better is True


def test_the_best_of_a_metric_where_lower_is_better_is_the_lowest() -> None:
    """Ties are all named."""
    base = outcomes([3.0, 4.0, 5.0])
    runs = {"a": [3.0, 3.0, 4.0], "b": [1.0, 1.0, 2.0], "c": [2.0, 1.0, 1.0]}
    found = compare({name: (base, outcomes(v)) for name, v in runs.items()}, Metric("mean", False))
    assert found.leaders() == ["b", "c"]
