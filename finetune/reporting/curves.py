"""Curves of a run's training for a chart: smoothed where they are noisy, and thinned out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.statistics.objective import VALIDATION

MOST_POINTS = 12_000  # in the charts of all runs
FEWEST_POINTS = 16  # of a run, however many runs there are
MOMENT = 0.9  # weight of what was before, of the smoothed ones

Point = tuple[int, float]  # step and value


@dataclass(frozen=True)
class Series:
    """A metric's values over the steps of a run."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Curve:
    """One kind of curve: the metric in the event log, and its words in the chart."""

    metric: str
    file: str
    title: str
    caption: str
    is_smoothed: bool = False


TRAIN_LOSS = "train/loss"
CURVES = (
    Curve(TRAIN_LOSS, "loss", "training loss, smoothed", "Training loss", is_smoothed=True),
    Curve(VALIDATION, "validation-loss", "validation loss", "Validation loss"),
    Curve("train/lr", "lr", "learning rate", "Learning rate"),
    Curve("train/grad_norm", "grad-norm", "gradient norm, smoothed", "Gradient norm before "
          "clipping", is_smoothed=True),
)  # fmt: skip


def select_curves(events: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Return the values of each curve's metric that a run's events have."""
    metrics = {curve.metric for curve in CURVES}
    found: dict[str, Series] = {}
    for event in events:
        if event["event"] == "metric" and (key := event["key"]) in metrics:
            series = found.setdefault(key, Series([], []))
            series.steps.append(event["step"])
            series.values.append(event["value"])
    return found


def thin(curve: Curve, series: Series, *, num_runs: int) -> list[Point]:
    """Return a curve's points; the more runs share a chart, the fewer each has."""
    steps, most = series.steps, max(FEWEST_POINTS, MOST_POINTS // num_runs // len(CURVES))
    values = smooth(series.values) if curve.is_smoothed else series.values
    places = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    return [(steps[place], float(f"{values[place]:.5g}")) for place in places.tolist()]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential moving mean, started unbiased."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = MOMENT * mean + (1 - MOMENT) * value, MOMENT * weight + (1 - MOMENT)
        means.append(mean / weight)
    return means
