"""Bootstrapped standard errors: lm-eval's own numbers, without its pool, in a daemonic process."""

from __future__ import annotations

import multiprocessing
import random
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest
from lm_eval.api import metrics

from finetune.evaluation import bootstrap

PAIRS = [(i % 2, (i // 2) % 2) for i in range(23)]
NUMBERS = [-i / 7 for i in range(40)]
TEXTS = [("the cat sat on a mat", f"the cat {i} sat on a mat") for i in range(9)]
CASES: dict[str, tuple[Callable[..., float], Sequence[Any], int]] = {
    "mcc": (metrics.matthews_corrcoef, PAIRS, 150),
    "mcc of three labels": (metrics.matthews_corrcoef, [(i % 3, i % 2) for i in range(17)], 150),
    "mcc of one label": (metrics.matthews_corrcoef, [(1, 1)] * 4, 50),
    "mcc of words": (metrics.matthews_corrcoef, [("a", "b"), ("b", "b"), ("a", "a")], 100),
    "f1": (metrics.f1_score, PAIRS, 150),
    "f1 of rare positives": (metrics.f1_score, [(0, 0)] * 6 + [(1, 1)], 150),
    "f1 of none": (metrics.f1_score, [(0, 0)] * 3, 50),
    "f1 of truth values": (metrics.f1_score, [(True, False), (False, True), (True, True)], 150),
    "perplexity": (metrics.perplexity, NUMBERS, 2000),
    "fewer resamples than a chunk": (metrics.perplexity, NUMBERS, 700),
    "resamples beyond whole chunks": (metrics.perplexity, NUMBERS, 1700),
    "median": (metrics.median, NUMBERS, 100),
    "nanmean": (metrics.nanmean, NUMBERS, 100),
    "bleu": (metrics.bleu, TEXTS, 20),
    "chrf": (metrics.chrf, TEXTS, 20),
    "ter": (metrics.ter, TEXTS, 20),
}


@pytest.mark.parametrize("case", CASES)
def test_it_equals_lm_eval_in_a_process_of_its_own(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every aggregation that lm-eval bootstraps, with the same seeds and chunks."""
    statistic, values, iters = CASES[case]
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval's own loop over the same seeds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of a resample without a positive
        direct = metrics.bootstrap_stderr(statistic, values, iters)
        ours = bootstrap.bootstrap_stderr(statistic, values, iters)
    assert ours == pytest.approx(direct, rel=1e-12, abs=1e-15)


def test_draws_are_those_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of numpy's generator draw what `random.choices` draws, in its order."""
    monkeypatch.setattr(bootstrap, "MOST_DRAWS", 50)
    generator = random.Random(3)
    expected = [generator.choices(range(21), k=21) for _ in range(7)]
    assert [row.tolist() for block in bootstrap._draws(3, 7, 21) for row in block] == expected


def _score_as_a_worker(pipe: Connection) -> None:
    with bootstrap.in_process():
        stderr = metrics.stderr_for_metric(metrics.matthews_corrcoef, 1000)
        assert stderr is not None
        pipe.send(stderr(PAIRS))


def test_a_daemonic_process_gets_it_too() -> None:
    """The worker may have no children, so no pool is opened, and nothing is printed."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_score_as_a_worker, args=(theirs,), daemon=True
    )
    process.start()
    theirs.close()
    expected = bootstrap.bootstrap_stderr(metrics.matthews_corrcoef, PAIRS, 1000)
    assert ours.recv() == expected
    process.join()
