"""The objective of a sweep: read, checked, averaged, and compared with the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.config import rules
from finetune.config.schema import Config, DataConfig, EvaluationConfig, ModelConfig
from finetune.pipeline.preflight import prepare
from finetune.reporting.results import Results, read_results
from finetune.reporting.verdict import describe_choice, verdict
from finetune.statistics.comparison import compare
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import Metric
from finetune.statistics.objective import Objective
from finetune.statistics.objective_comparison import compare_average
from finetune.tracking.sweep_record import SweepRecord
from tests.conftest import write_rows
from tests.test_results import ACC, LOWER, Task, write_sweep

ARC, OWN = MetricName("arc", "acc"), MetricName("own", "exact_match")
METRICS = {"arc/acc": ACC, "own/exact_match": ACC, "own/loss": LOWER, "arc/acc_norm": ACC}


def results_of(folder: Path, objective: Sequence[str]) -> Results:
    record = SweepRecord.load(folder)
    replace(record, objective=list(objective)).write(folder)
    return read_results(folder)


def sweep_of(
    root: Path, arc: Sequence[Sequence[int]], own: Sequence[Sequence[int]], **losses: Any
) -> Path:
    """Write a sweep of runs with these answers to two tasks, whose base has all wrong."""

    def tasks(first: Sequence[int], second: Sequence[int]) -> dict[str, Task]:
        return {
            "arc": {"acc": (ACC, [0] * len(first), first)},
            "own": {"exact_match": (ACC, [0] * len(second), second)},
        }

    return write_sweep(root, [tasks(*pair) for pair in zip(arc, own, strict=True)], **losses)


@pytest.mark.parametrize(
    ("terms", "weights"),
    [
        (["arc/acc"], {"arc/acc": 1.0}),
        (["arc/acc", "own/exact_match"], {"arc/acc": 0.5, "own/exact_match": 0.5}),
        (["2*arc/acc", "0.5 * own/chrf++"], {"arc/acc": 0.8, "own/chrf++": 0.2}),
    ],
)
def test_terms_are_metrics_with_weights(terms: list[str], weights: dict[str, float]) -> None:
    """Whose sum is 1, so that the mean is on the metrics' scale."""
    found = Objective.parse(terms).weights
    assert {str(name): weight for name, weight in found.items()} == pytest.approx(weights)


@pytest.mark.parametrize(
    ("terms", "problem"),
    [
        (["acc"], "write TASK/METRIC"),
        (["arc/"], "write TASK/METRIC"),
        (["x*arc/acc"], "a weight is a number above 0"),
        (["-1*arc/acc"], "a weight is a number above 0"),
        (["nan*arc/acc"], "a weight is a number above 0"),
        (["arc/acc", "2*arc/acc"], "twice"),
        (["validation/loss", "arc/acc"], "set it alone"),
        (["ark/acc"], "did you mean 'arc'?"),
        (["validation/loss"], "no rows to validate on"),
    ],
)
def test_a_term_that_chooses_nothing_is_refused(terms: list[str], problem: str) -> None:
    """Before anything is loaded."""
    evaluation = EvaluationConfig(tasks=["arc"], objective=terms)
    found = rules.find_problems(Config(data=DataConfig(path="x"), evaluation=evaluation))
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    ("terms", "problem"),
    [
        (["questions/acc_nrm"], "did you mean 'acc_norm'?"),
        (["questions/acc", "heldout/perplexity"], "one direction"),
        (["heldout/perplexity"], None),
        (["questions/acc", "3*demo_science/acc"], None),
    ],
)
def test_metrics_are_looked_up_in_the_tasks(
    tmp_path: Path, terms: list[str], problem: str | None
) -> None:
    """Each task says which it has, and which way is better."""
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(10)]
    asked = [{"question": "Which?", "choices": ["a", "b"], "answer": 0}]
    config = Config(
        model=ModelConfig(path="random://tiny"),
        data=DataConfig(path=str(write_rows(tmp_path / "rows.jsonl", list(rows)))),
        evaluation=EvaluationConfig(
            tasks=["questions", "heldout", "demo_science"],
            questions=str(write_rows(tmp_path / "questions.jsonl", list(asked))),
            limit=4,
            objective=terms,
        ),
    )
    config.data.heldout_fraction = 0.2
    problems = prepare(config).problems
    assert [problem in one for one in problems if problem] == [True] * bool(problem)
    assert len(problems) == bool(problem)


def test_another_metric_than_the_first_chooses(tmp_path: Path) -> None:
    """The report says which."""
    folder = sweep_of(tmp_path, [[1, 1, 0, 0], [1, 0, 0, 0]], [[0, 0, 1], [1, 1, 1]])
    assert read_results(folder).best_run() == "run-0"
    assert "arc/acc, the first metric of the first task" in describe_choice(read_results(folder))
    results = results_of(folder, ["own/exact_match"])
    assert results.best_run() == "run-1"
    assert results.main_metric == "own/exact_match"
    assert "evaluation.objective: own/exact_match." in describe_choice(results)


def test_a_weighted_mean_chooses_and_is_compared(tmp_path: Path) -> None:
    """It is one more metric, the first, with the interval that its tasks' questions give."""
    half = [1, 0] * 30
    arc = [[1] * 30 + [0] * 30, half, [0] * 60]
    own = [[0] * 20, [1, 0] * 10, [1] * 20]
    results = results_of(sweep_of(tmp_path, arc, own), ["arc/acc", "3*own/exact_match"])
    first, second, third = results.rows
    assert [row["objective/mean"] for row in results.rows] == [0.125, 0.5, 0.75]
    assert first["objective/base_mean"] == 0.0
    assert third["objective/mean_diff"] == 0.75
    assert next(iter(results.metrics)) == "objective/mean"
    assert results.best_run() == third["run"]
    found = results.comparisons["objective/mean"].differences[second["run"]]
    low, high = 0.5 - 1.96 * spread(half, own[1]), 0.5 + 1.96 * spread(half, own[1])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)
    assert found.p < 0.01
    said = verdict(results)
    assert "objective/mean (0.25 x arc/acc + 0.75 x own/exact_match)" in said
    assert "In arc/acc" in said or "in arc/acc" in said


def spread(arc: Sequence[int], own: Sequence[int]) -> float:
    """Return the standard error of the weighted mean of two independent shares."""
    parts = [0.25**2 * np.var(arc) / len(arc), 0.75**2 * np.var(own) / len(own)]
    return float(np.sqrt(sum(parts)))


def test_metrics_of_the_same_questions_are_drawn_together() -> None:
    """Two equal metrics averaged give the interval of one, not a narrower one."""
    base = {f"q{n}": 0.0 for n in range(40)}
    tuned = {f"q{n}": float(n % 2) for n in range(40)}
    twice = Objective.parse(["arc/acc", "arc/acc_norm"])
    norm = MetricName("arc", "acc_norm")
    found = compare_average(twice, METRICS, {"run": dict.fromkeys((ARC, norm), (base, tuned))})
    assert found is not None
    one = compare({"run": (base, tuned)}, Metric("mean", True, "equal"))
    assert found.differences["run"].low == pytest.approx(one.differences["run"].low)
    assert found.differences["run"].questions == 40


def test_what_is_no_mean_over_questions_is_not_compared() -> None:
    """It is averaged all the same, and the report says so."""
    metrics = {**METRICS, "arc/acc": Metric("matthews_corrcoef", True)}
    sides = ({"q": 0.0}, {"q": 1.0})
    objective = Objective.parse(["arc/acc", "own/exact_match"])
    assert compare_average(objective, metrics, {"run": {ARC: sides, OWN: sides}}) is None


def test_the_validation_loss_chooses_without_looking_at_the_questions(tmp_path: Path) -> None:
    """The chosen run alone is tested, so its p is not adjusted for the grid."""
    folder = sweep_of(
        tmp_path, [[1] * 9 + [0], [1] * 8 + [0, 0]], [[1], [1]], losses=[1.5, 1.2]
    )  # fmt: skip
    results = results_of(folder, ["validation/loss"])
    assert results.best_run() == "run-1"
    assert results.selects == "validation/loss"
    assert "It was chosen from 2 runs by the validation loss." in verdict(results)


def test_an_objective_that_no_run_has_ranks_nothing(tmp_path: Path) -> None:
    """Not even by the validation loss."""
    folder = sweep_of(tmp_path, [[1], [0]], [[1], [0]], losses=[1.5, 1.2])
    for terms in (["arc/acc_norm"], ["arc/acc", "own/f1"]):
        results = results_of(folder, terms)
        assert results.best_run() is None
        assert "No run has the scores of evaluation.objective" in verdict(results)


def test_a_record_of_an_earlier_release_has_no_objective(tmp_path: Path) -> None:
    """Its first metric chooses, as it did."""
    folder = sweep_of(tmp_path, [[1], [0]], [[0], [1]])
    path = folder / "sweep.yaml"
    path.write_text(path.read_text().replace("objective: []\n", ""))
    assert read_results(folder).best_run() == "run-0"
