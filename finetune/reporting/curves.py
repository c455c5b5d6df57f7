"""Curves of a run's training for a chart: smoothed where they are noisy, and thinned out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.statistics.objective import VALIDATION
from finetune.tracking.events import read_events, select_metric
from finetune.tracking.run_folder import RunFolder

MOST_POINTS = 12_000  # in the charts of all runs: a picture takes half a millisecond a point
FEWEST_POINTS = 16  # of a run, however many runs there are
MOMENT = 0.9  # weight of what was before, of the smoothed ones

Point = tuple[int, float]  # step and value


@dataclass(frozen=True)
class Curve:
    """One kind of curve: the metric in the event log, and its words in the chart."""

    metric: str
    file: str
    title: str
    caption: str
    is_smoothed: bool = False


CURVES = (
    Curve("train/loss", "loss", "training loss, smoothed", "Training loss", is_smoothed=True),
    Curve(VALIDATION, "validation-loss", "validation loss", "Validation loss"),
    Curve("train/lr", "lr", "learning rate", "Learning rate"),
    Curve("train/grad_norm", "grad-norm", "gradient norm, smoothed", "Gradient norm before "
          "clipping", is_smoothed=True),
)  # fmt: skip


def read_curves(run: RunFolder, *, num_runs: int) -> dict[Curve, list[Point]]:
    """Return a run's curves; the more runs share a chart, the fewer points each has."""
    events = list(read_events(run.events)) if run.events.exists() else []
    most = max(FEWEST_POINTS, MOST_POINTS // num_runs // len(CURVES))
    found = {}
    for curve in CURVES:
        measured = select_metric(events, curve.metric)
        if measured:
            values = [one.value for one in measured]
            values = smooth(values) if curve.is_smoothed else values
            found[curve] = _thinned([one.step for one in measured], values, most)
    return found


def _thinned(steps: Sequence[int], values: Sequence[float], most: int) -> list[Point]:
    places = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    return [(steps[place], float(f"{values[place]:.5g}")) for place in places.tolist()]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential moving mean, started unbiased."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = MOMENT * mean + (1 - MOMENT) * value, MOMENT * weight + (1 - MOMENT)
        means.append(mean / weight)
    return means
