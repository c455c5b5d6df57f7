"""lm-eval's metrics: aggregation, direction, and terms per question to resample; numpy only.

An aggregate in AGGREGATES is a function of sums over questions, so that resampling questions and
swapping base and tuned answers are sums too. A group of tasks is a mean of its tasks' aggregates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Values = Sequence[Any]  # lm-eval's value of each question: a number, or the pair it aggregates

Grouping = Literal["by_size", "equal"]


@dataclass(frozen=True)
class Metric:
    """A metric's definition: its aggregation over questions, and the direction that is better."""

    aggregation: str = "mean"  # lm-eval's name of it
    higher_is_better: bool | None = True  # None: lm-eval does not say
    grouping: Grouping | None = None  # of a group: the weights of its tasks

    @property
    def is_mean(self) -> bool:
        """True for the plain mean over all questions."""
        return self.aggregation in MEANS and self.grouping != "equal"

    @property
    def is_known(self) -> bool:
        """True if it can be computed from the stored outcomes."""
        return self.aggregation in AGGREGATES

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is, 0 where lm-eval does not say."""
        return 0 if self.higher_is_better is None else 1 if self.higher_is_better else -1

    def best(self, values: Sequence[float]) -> float:
        """Return the best of several values of a metric that has a direction."""
        assert self.higher_is_better is not None, "a metric without a direction is not ranked"
        return max(values) if self.higher_is_better else min(values)


@dataclass(frozen=True)
class Aggregate:
    """One aggregation of lm-eval: terms summed over questions, and the value of the sums."""

    terms: Callable[[Values], Vector]  # [question, term]
    value: Callable[[Vector], Vector]  # [..., term] -> [...]
    scores: Callable[[Values], Vector]  # each question's score; the value rises with it


def _numbers(values: Values | Vector) -> Vector:
    return np.asarray(values, dtype=np.float64)


def _mean_terms(values: Values | Vector) -> Vector:
    numbers = _numbers(values)
    return np.stack([numbers, np.ones_like(numbers)], axis=-1)


def _present_terms(values: Values) -> Vector:
    numbers = _numbers(values)
    return np.stack([np.nan_to_num(numbers), ~np.isnan(numbers)], axis=-1)


def _ratio(sums: Vector) -> Vector:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Vector = sums[..., 0] / sums[..., 1]
    return ratio


def _pair_terms(values: Values) -> Vector:
    return _numbers(values).reshape(len(values), 2)


def _pair_scores(values: Values) -> Vector:
    return -_pair_terms(values)[:, 0]


def _brier_scores(values: Values) -> Vector:
    gold, predicted = zip(*values, strict=True)
    probabilities = _numbers(predicted)
    difference = probabilities - np.eye(probabilities.shape[1])[list(gold)]
    squares: Vector = (difference**2).sum(axis=1)
    return squares


def _is_right(values: Values) -> Vector:
    return np.array([float(gold == predicted) for gold, predicted in values])


def _confusion_terms(values: Values) -> Vector:
    """Return each question's cell of the matrix [gold, predicted], flattened."""
    names = [[json.dumps(label) for label in pair] for pair in values]
    places = {name: n for n, name in enumerate(sorted({name for pair in names for name in pair}))}
    cells = [places[gold] * len(places) + places[predicted] for gold, predicted in names]
    terms: Vector = np.eye(len(places) ** 2)[cells]
    return terms


def _matthews_of_terms(sums: Vector) -> Vector:
    size = round(sums.shape[-1] ** 0.5)
    return matthews(sums.reshape(*sums.shape[:-1], size, size))


def matthews(matrix: Vector) -> Vector:
    """Return the correlation of gold and predicted classes (Gorodkin 2004), as scikit-learn.

    Args:
        matrix: how often each pair occurs, [..., gold, predicted].
    """
    gold, predicted, total = matrix.sum(-1), matrix.sum(-2), matrix.sum((-1, -2))
    right = np.trace(matrix, axis1=-2, axis2=-1)
    together = right * total - (gold * predicted).sum(-1)
    spread = (total**2 - (predicted**2).sum(-1)) * (total**2 - (gold**2).sum(-1))
    return _guarded_ratio(together, np.sqrt(spread))


def _f1_terms(values: Values) -> Vector:
    """Return for each question true positives, predicted positives and gold positives."""
    gold, predicted = (_pair_terms(values)[:, place] == 1 for place in (0, 1))
    return np.stack([gold & predicted, predicted, gold], axis=-1).astype(np.float64)


def f1(sums: Vector) -> Vector:
    """Return F1 from true, predicted and gold positives [..., 3], as scikit-learn."""
    return _guarded_ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _guarded_ratio(above: Vector, below: Vector) -> Vector:
    """Return above / below, 0 where below is 0, as scikit-learn."""
    ratio: Vector = np.divide(above, below, out=np.zeros_like(below), where=below != 0)
    return ratio


AGGREGATES: dict[str, Aggregate] = {
    "mean": Aggregate(_mean_terms, _ratio, _numbers),
    "nanmean": Aggregate(_present_terms, _ratio, _numbers),
    "brier_score": Aggregate(lambda v: _mean_terms(_brier_scores(v)), _ratio, _brier_scores),
    "perplexity": Aggregate(
        _mean_terms, lambda sums: np.exp(-_ratio(sums)), lambda v: -_numbers(v)
    ),
    # of pairs (log-likelihood, number of words or bytes)
    "weighted_perplexity": Aggregate(_pair_terms, lambda sums: np.exp(-_ratio(sums)), _pair_scores),
    "bits_per_byte": Aggregate(_pair_terms, lambda sums: -_ratio(sums) / np.log(2), _pair_scores),
    # of pairs (gold, predicted)
    "matthews_corrcoef": Aggregate(_confusion_terms, _matthews_of_terms, _is_right),
    "f1": Aggregate(_f1_terms, f1, _is_right),
}  # fmt: skip
MEANS = ("mean", "brier_score")

# lm-eval's own metrics, for scores that were stored before their definition was stored with them.
DIRECTIONS = {
    **dict.fromkeys(
        (
            "acc", "acc_norm", "acc_mutual_info", "acc_bytes", "acc_all", "exact_match", "mcc",
            "f1", "bleu", "chrf", "chrf++", "likelihood", "em", "acc_taught", "acc_control",
        ),
        True,
    ),
    **dict.fromkeys(
        (
            "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score",
            "ter", "likelihood_diff", "pct_stereotype",
        ),
        False,
    ),
}  # fmt: skip


def guess_metric(name: str) -> Metric:
    """Return the definition of a metric whose score was stored without one: a mean.

    Args:
        name: with the filter's name behind it, as in `exact_match_strict-match`.
    """
    known = [known for known in DIRECTIONS if name == known or name.startswith(f"{known}_")]
    return Metric("mean", DIRECTIONS[max(known, key=len)] if known else None)


def show_score(value: float | None) -> str:
    """Return a score with four decimals, or five digits where it is large."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.5g}"


@dataclass(frozen=True)
class Strata:
    """The tasks of a group: the positions of each task's questions, and its weight."""

    places: list[npt.NDArray[np.intp]]
    weights: Vector

    @classmethod
    def build(
        cls,
        metric: Metric,
        members: Sequence[str | None],
        weights: Mapping[str, float] | None = None,
    ) -> Strata:
        """Sort questions by task; without a group there is a single task.

        Args:
            metric: says how the tasks are weighted.
            members: the task of each question.
            weights: of the tasks, in place of the metric's.
        """
        if metric.grouping is None:
            return cls([np.arange(len(members))], np.ones(1))
        names = np.array([str(member) for member in members])
        found = {name: np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())}
        places = list(found.values())
        sizes = np.array([len(one) if metric.grouping == "by_size" else 1 for one in places])
        if weights is not None:
            sizes = np.array([weights[name] for name in found])
        return cls(places, sizes / sizes.sum())


def aggregate(metric: Metric, terms: Vector, strata: Strata) -> Vector:
    """Return the metric's value of each set of answers: [..., question, term] -> [...]."""
    value = AGGREGATES[metric.aggregation].value
    parts = [value(terms[..., places, :].sum(axis=-2)) for places in strata.places]
    total: Vector = np.tensordot(strata.weights, np.stack(parts), axes=1)
    return total


def compute(metric: Metric, values: Values, members: Mapping[int, str] | None = None) -> float:
    """Return the metric's value of one model's answers; `members` maps question to task."""
    strata = Strata.build(metric, [(members or {}).get(n) for n in range(len(values))])
    return float(aggregate(metric, AGGREGATES[metric.aggregation].terms(values), strata))
