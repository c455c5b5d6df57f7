"""Aggregation: lm-eval's definitions, and resamples of metrics that only it computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lm_eval.api import metrics as stock

from finetune.evaluation.aggregation import (
    RESAMPLES,
    SLOW_RESAMPLES,
    draw_resamples,
    find_definitions,
)
from finetune.evaluation.harness import Item, TaskScore
from finetune.evaluation.scoring import Scoring
from finetune.evaluation.tasks import LoadedTask
from finetune.pipeline.scores import write_scores
from finetune.reporting.outcomes import read_answers, read_resamples
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import Metric
from finetune.statistics.resampling import Resampled
from finetune.tracking.run_folder import RunFolder


def longest(values: list[Any]) -> float:
    """Stand for a task's own aggregation."""
    return float(max(values))


def one_task(aggregation: Any, higher: bool | None = True) -> Any:
    """Return what a task says of its one metric."""
    return SimpleNamespace(
        aggregation=lambda: {"score": aggregation},
        higher_is_better=lambda: {} if higher is None else {"score": higher},
        instances=[],
    )


def loaded(tasks: dict[str, Any], group: Any = None) -> LoadedTask:
    groups = {} if group is None else {"name": group}
    return LoadedTask("name", {"tasks": tasks, "groups": groups}, "digest")


def test_definitions_are_the_tasks_own() -> None:
    """Registered names, a task's own function by its place, filters behind the metric's name."""
    task = loaded({"name": one_task(stock.bleu)})
    assert find_definitions(task, ["score,none", "score_stderr,none", "alias"]) == {
        "score": Metric("bleu", True)
    }
    own = find_definitions(loaded({"name": one_task(longest, None)}), ["score,strict"])
    assert own == {"score_strict": Metric(f"{longest.__module__}.longest", None)}
    assert not own["score_strict"].is_known


@pytest.mark.parametrize(
    ("tasks", "by_size", "expected"),
    [
        ({"a": stock.mean, "b": stock.mean}, True, Metric("mean", True, "by_size")),
        ({"a": stock.mean, "b": stock.mean}, False, Metric("mean", True, "equal")),
        ({"a": stock.mean, "b": stock.bleu}, False, Metric("mixed", True, "equal")),
    ],
)
def test_a_group_has_what_its_tasks_agree_on(
    tasks: dict[str, Any], by_size: bool, expected: Metric
) -> None:
    """Different aggregates of one name are none that is known."""
    group = SimpleNamespace(
        aggregate_metric_list=[SimpleNamespace(metric="score", weight_by_size=by_size)]
    )
    made = {name: one_task(function) for name, function in tasks.items()}
    assert find_definitions(loaded(made, group), ["score,none"])["score"] == expected
    made["b"] = one_task(tasks["b"], higher=False)
    directions = find_definitions(loaded(made, group), ["score,none"])["score"]
    assert directions.higher_is_better is None


def test_stored_resamples_agree_with_the_paired_test() -> None:
    """Of a mean that is drawn as if it were unknown."""
    draw = np.random.default_rng(3)
    before = draw.normal(size=80)
    after = before + draw.normal(0.5, 1, size=80)
    task = loaded({"name": one_task(stock.mean)})
    pairs = list(zip(before.tolist(), after.tolist(), strict=True))
    stored = draw_resamples(task, "score", Metric("mean"), {None: pairs})
    drawn = (np.array(stored[name]) for name in ("bootstrap", "swapped"))
    found = Resampled(before.mean(), after.mean(), 80, *drawn)
    error = (after - before).std() / 80**0.5
    low, high = found.interval
    assert low is not None
    assert high is not None
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found.p < 0.01
    assert len(stored["swapped"]) == RESAMPLES


def test_a_corpus_metric_is_resampled_where_scores_are_written(tmp_path: Any) -> None:
    """BLEU of sentences: the file holds what a report needs, and is not drawn twice."""
    words = [f"the cat number {n} sat on the mat with " + "many " * n for n in range(12)]
    sides = {
        "base": [[text, text.replace("cat", "dog").replace("mat", "hat")] for text in words],
        "tuned": [[text, text.replace("cat", "dog")] for text in words],
    }
    scores = {
        side: {"name": TaskScore(
            "name", "1", 0, {"score": stock.bleu(values)}, 1.0, Scoring(),
            [Item(f"h{n}", "p", {"score": value}) for n, value in enumerate(values)],
            definitions={"score": Metric("bleu", True)},
        )}
        for side, values in sides.items()
    }  # fmt: skip
    run, task = RunFolder(tmp_path), loaded({"name": one_task(stock.bleu)})
    write_scores(run, scores["tuned"], scores["base"], [task])
    stored = run.read_json("resamples/name.json")["score"]
    assert len(stored["bootstrap"]) == SLOW_RESAMPLES
    values = [scores[side]["name"].metrics["score"] for side in ("base", "tuned")]
    changed = read_answers(run, "name", "score").changed
    found = read_resamples(run, MetricName("name", "score"), (values[0], values[1]), changed)
    assert found is not None
    assert found.changed == 12
    low, high = found.interval
    assert low is not None
    assert high is not None
    assert low - 1 < values[1] - values[0] < high + 1
    assert found.p < 0.05
    run.write_json("resamples/name.json", {"score": {**stored, "bootstrap": [1.0]}})
    write_scores(run, scores["tuned"], scores["base"], [task])
    assert run.read_json("resamples/name.json")["score"]["bootstrap"] == [1.0]
