"""Without `evaluation.keep_texts` no generated text is stored, wherever a score comes from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from finetune.config.schema import Config, EvaluationConfig
from finetune.evaluation import harness
from finetune.evaluation.harness import Item, ScoreStore, TaskScore
from finetune.evaluation.scoring import Scoring
from finetune.pipeline.scores import Scorer, write_scores
from finetune.statistics.metrics import Metric
from finetune.tracking.run_folder import RunFolder

SECRET = "a private answer"  # noqa: S105
OUTCOMES = {
    "exact_match": 1.0,
    "bleu": [["gold"], [f"{SECRET}!"]],  # what its aggregation reads
    "squad": {"prediction": SECRET},
    "mcc": [1, 0],
}


def score(said: object = SECRET) -> TaskScore:
    """Return a score as it is stored with texts."""
    items = [Item("h", "p", dict(OUTCOMES), said=said), Item("i", "q", {"acc": 1.0}, said=[-1.5])]
    definitions = {"exact_match": Metric(), "bleu": Metric("bleu", True)}
    return TaskScore(
        "t", "1", 0, {"exact_match": 1.0, "bleu": 2.0}, 1.0, Scoring(), items,
        definitions=definitions,
    )  # fmt: skip


def find_texts(folder: Path) -> list[str]:
    """Return the files that hold a generated text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if SECRET in path.read_text(errors="replace")]


def test_texts_leave_a_score_and_numbers_stay() -> None:
    """Answers and what metrics keep of them; log-likelihoods, pairs of classes and scores stay."""
    first, second = score().without_texts().items
    assert (first.said, second.said) == (None, [-1.5])
    assert first.outcomes == {"exact_match": 1.0, "mcc": [1, 0]}


@pytest.mark.parametrize("keep_texts", [True, False])
def test_scores_that_were_stored_with_texts_bring_none_into_a_run(
    tmp_path: Path, keep_texts: bool
) -> None:
    """Those of the shared base, and those that the run stored when it was made with texts."""
    run = RunFolder(tmp_path)
    ScoreStore(run.evaluation / "scores").write("a" * 64, score())
    write_scores(run, {"t": score()}, {"t": score()}, keep_texts=True)
    assert len(find_texts(tmp_path)) == 2
    write_scores(run, {"t": score()}, {"t": score()}, keep_texts=keep_texts)
    assert len(find_texts(tmp_path)) == (2 if keep_texts else 0)
    (first, second) = run.read_items("t")
    assert first["tuned"]["exact_match"] == 1.0
    assert second["said"] == {"tuned": [-1.5], "base": [-1.5]}
    kept = ScoreStore(run.evaluation / "scores").read("t", "a" * 64)
    assert kept == (score() if keep_texts else score().without_texts())


@pytest.mark.parametrize("keep_texts", [True, False])
def test_the_shared_score_of_a_base_keeps_no_text_that_was_private_once(
    tmp_path: Path, keep_texts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its texts leave the cache; a score without them is computed again where they are kept."""
    config = Config(evaluation=EvaluationConfig(keep_texts=keep_texts))
    scorer = Scorer(config, MagicMock(), ScoreStore(tmp_path), None)
    monkeypatch.setattr(Scorer, "identity", lambda *_: "a" * 64)
    task = SimpleNamespace(name="t", key="t", selects=False)
    scorer.store.write("a" * 64, score())
    found = scorer.read([task])["t"]  # type: ignore[list-item]
    assert found == (score() if keep_texts else score().without_texts())
    assert len(find_texts(tmp_path)) == int(keep_texts)
    scorer.store.write("a" * 64, score().without_texts())
    assert scorer.has([task]) == (not keep_texts)  # type: ignore[list-item]


def test_a_score_is_made_without_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none reaches the run's scores or the cache of the base's."""
    sample = {
        "doc_id": 0, "doc_hash": "h", "prompt_hash": "p", "filter": "none",
        "metrics": ["exact_match", "bleu"], "resps": [[SECRET]], **OUTCOMES,
    }  # fmt: skip
    for keep_texts in (True, False):
        made = score_samples([sample], EvaluationConfig(keep_texts=keep_texts), monkeypatch)
        assert (SECRET in repr(made)) == keep_texts
        assert made.items[0].outcomes["exact_match"] == 1.0


def score_samples(
    samples: list[dict[str, object]],
    evaluation: EvaluationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> TaskScore:
    """Return the score that lm-eval's samples give."""
    results = {
        "n-shot": {"t": 0}, "versions": {"t": 1}, "samples": {"t": samples},
        "results": {"t": {"exact_match,none": 1.0}},
    }  # fmt: skip
    monkeypatch.setattr("lm_eval.evaluator.evaluate", lambda *_, **__: results)
    monkeypatch.setattr(harness, "find_definitions", lambda *_: {})
    monkeypatch.setattr(harness, "chat_settings", lambda *_: {})
    task = SimpleNamespace(name="t", tasks={"t": MagicMock()}, loaded=None, digest="d")
    lm = SimpleNamespace(scoring=Scoring(), model=SimpleNamespace(dtype="torch.float32"))
    return harness.score(lm, task, evaluation)  # type: ignore[arg-type]
