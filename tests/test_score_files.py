"""The file of a task's scores is read as it was written, by this release or an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.evaluation.harness import Item, TaskScore
from finetune.evaluation.scoring import Scoring
from finetune.files import Damaged
from finetune.pipeline.scores import write_scores
from finetune.statistics.metrics import Metric
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.score_files import MetricScore, parse_scores

ACC = Metric("mean", True)
LOSS = Metric("perplexity", False, "by_size")


def score(value: float) -> TaskScore:
    """Return what one model's scoring gives."""
    return TaskScore(
        task="arc",
        version="1.0",
        num_fewshot=2,
        metrics={"acc": value, "acc_stderr": 0.1, "loss": 3.0},
        seconds=1.5,
        scoring=Scoring("shared", sampled=3),
        items=[Item("h", "p", {"acc": 1.0})],
        definitions={"acc": ACC, "loss": LOSS},
        setup={"limit": 8, "num_fewshot": None, "dtype": "float32"},
    )


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    """By the writer of a run, so that neither side changes alone."""
    run = RunFolder(tmp_path / "run")
    write_scores(run, {"arc": score(0.5)}, {"arc": score(0.25)})
    scores = run.read_scores("arc")
    assert scores is not None
    assert scores.base is not None
    assert scores.tuned.metrics == {
        "acc": MetricScore(0.5, 0.1, ACC), "loss": MetricScore(3.0, None, LOSS)
    }  # fmt: skip
    assert scores.definitions == {"acc": ACC, "loss": LOSS}
    assert scores.base.value("acc") == 0.25
    assert scores.base.value("f1") is None
    assert (scores.tuned.num_questions, scores.tuned.seconds) == (1, 1.5)
    assert scores.tuned.scoring["sampled"] == 3
    assert scores.tuned.setup == {
        "version": "1.0", "num_fewshot": None, "num_questions": 1, "limit": 8, "dtype": "float32",
    }  # fmt: skip
    assert list(scores.sides) == ["tuned", "base"]


def test_a_task_without_scores_has_none(tmp_path: Path) -> None:
    """Before it is scored there is no file."""
    assert RunFolder(tmp_path / "run").read_scores("arc") is None


def test_scores_of_an_older_release_are_read() -> None:
    """They have neither definitions nor setup, seconds or counts."""
    scores = parse_scores({"tuned": {"metrics": {"acc": 1, "perplexity": 9.0}}})
    assert scores.base is None
    assert scores.tuned.metrics["acc"] == MetricScore(1, None, Metric("mean", True))
    assert scores.tuned.metrics["perplexity"].definition.higher_is_better is False
    assert (scores.tuned.num_questions, scores.tuned.seconds, scores.tuned.setup) == (None, 0, {})


GOOD = {"metrics": {"acc": 0.5}}


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"base": GOOD},
        {"tuned": []},
        {"tuned": {}},
        {"tuned": {"metrics": []}},
        {"tuned": {"metrics": {"acc": "high"}}},
        {"tuned": GOOD, "base": None},
        {"tuned": GOOD, "base": {"metrics": None}},
        {"tuned": GOOD | {"seconds": "1"}},
        {"tuned": GOOD | {"num_questions": "8"}},
        {"tuned": GOOD | {"definitions": []}},
        {"tuned": GOOD | {"definitions": {"acc": "mean"}}},
        {"tuned": GOOD | {"definitions": {"acc": {"aggregation": 1}}}},
        {"tuned": GOOD | {"definitions": {"acc": {"higher_is_better": "yes"}}}},
        {"tuned": GOOD | {"setup": [1]}},
        {"tuned": GOOD | {"scoring": "plain"}},
    ],
)
def test_what_holds_no_scores_is_damaged(stored: dict[str, Any], tmp_path: Path) -> None:
    """Whatever part of it is of another shape; its run names the file and reads no scores."""
    with pytest.raises(Damaged, match="it holds no scores"):
        parse_scores(stored)
    run = RunFolder(tmp_path / "run")
    run.write_json("evaluation/arc.json", stored)
    assert run.read_scores("arc") is None
    assert run.find_damage()["evaluation/arc.json"] == "it holds no scores"


def test_what_a_later_release_says_besides_is_left_out() -> None:
    """A definition may have more fields than this one knows."""
    side = GOOD | {"definitions": {"acc": {"aggregation": "mean", "unit": "share"}}, "more": 1}
    assert parse_scores({"tuned": side}).definitions == {"acc": Metric("mean")}
