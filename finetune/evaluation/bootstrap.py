"""Bootstrapped standard errors: lm-eval's draws, in this process, counted instead of recomputed.

lm-eval opens a pool of processes, which a worker may not have, and calls scikit-learn for each of
100,000 resamples. Draws (by a generator seeded with each chunk's number) and sizes are its own.

Axes: resample, draw (place among the values).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from lm_eval.api import metrics

from finetune.statistics.metrics import f1, matthews
from finetune.substitution import substituted

CHUNK = 1000  # resamples of one seed, as in lm-eval
MOST_DRAWS = 2_000_000  # in memory at a time

Statistic = Callable[[Sequence[Any]], float]
# A statistic of many resamples at once, from the values' codes.
Vectorised = Callable[[np.ndarray], np.ndarray]


@contextmanager
def in_process() -> Iterator[None]:
    """Let lm-eval take its bootstrapped standard errors from here."""
    with substituted(metrics, "bootstrap_stderr", bootstrap_stderr):
        yield


def bootstrap_stderr(statistic: Statistic, values: Sequence[Any], iters: int) -> float:
    """Return the standard deviation of a statistic over resamples, as lm-eval does.

    Args:
        statistic: an aggregation of lm-eval.
        values: one a question: a number, or a pair of gold and predicted label.
        iters: resamples, rounded down to whole chunks.
    """
    chunk = min(CHUNK, iters)
    fast = _vectorised(statistic, values)
    drawn: list[float] = []
    for seed in range(iters // chunk):
        if fast is None:
            drawn += metrics._bootstrap_internal(statistic, chunk)((seed, values))
        else:
            for places in _draws(seed, chunk, len(values)):
                drawn += fast(places).tolist()
    return float(metrics.sample_stddev(drawn))


def _draws(seed: int, num_resamples: int, size: int) -> Iterator[np.ndarray]:
    """Yield places [resample, draw] as `random.Random(seed).choices` draws them, in blocks."""
    _, words, _ = random.Random(seed).getstate()
    generator = np.random.RandomState()
    key, place = np.array(words[:-1], dtype=np.uint32), int(words[-1])
    generator.set_state(("MT19937", key, place, 0, 0.0))
    block = max(1, MOST_DRAWS // size)
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        yield (generator.random_sample((rows, size)) * size).astype(np.intp)


def _vectorised(statistic: Statistic, values: Sequence[Any]) -> Vectorised | None:
    """Return the statistic of blocks of resamples; None where lm-eval's own must be used."""
    if statistic is metrics.perplexity:
        numbers = np.asarray(values, dtype=float)
        return lambda places: np.exp(-numbers[places].mean(axis=1))
    if statistic not in (metrics.matthews_corrcoef, metrics.f1_score):
        return None
    golds, predictions = zip(*values, strict=True)
    labels, codes = np.unique([*golds, *predictions], return_inverse=True)
    pairs = codes[: len(golds)] * len(labels) + codes[len(golds) :]
    if statistic is metrics.matthews_corrcoef:
        return lambda places: matthews(_confusion(pairs[places], len(labels)).astype(float))
    if not set(labels.tolist()) <= {0, 1}:
        return None
    if 1 not in labels:
        return lambda places: np.zeros(len(places))
    positive = labels.tolist().index(1)
    return lambda places: f1(_positives(_confusion(pairs[places], len(labels)), positive))


def _confusion(pairs: np.ndarray, num_labels: int) -> np.ndarray:
    """Count the pairs of each resample [resample, gold, predicted]."""
    size = num_labels**2
    offsets = np.arange(len(pairs))[:, None] * size
    counts = np.bincount((pairs + offsets).ravel(), minlength=len(pairs) * size)
    return counts.reshape(len(pairs), num_labels, num_labels)


def _positives(counts: np.ndarray, positive: int) -> np.ndarray:
    """Return true, predicted and gold positives of each resample, as AGGREGATES sums them."""
    hits = counts[:, positive, positive]
    predicted, gold = counts[:, :, positive].sum(axis=1), counts[:, positive, :].sum(axis=1)
    return np.stack([hits, predicted, gold], axis=-1).astype(float)
