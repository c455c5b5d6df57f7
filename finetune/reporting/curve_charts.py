"""Charts of losses, learning rate and gradient norm over the steps of all runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from finetune.reporting.chart_parts import (
    COLOURS,
    HEIGHT,
    IS_OTHER,
    MOST_COLOURS,
    Chart,
    build_chart,
)
from finetune.reporting.curves import CURVES, Point, thin
from finetune.reporting.results import Results

MOST_TICKS = 8


def draw_curves(results: Results) -> Iterator[Chart]:
    """Yield losses, learning rate and gradient norm over the steps of all runs."""
    labels = [results.label(row) for row in results.rows]
    found = [results.curves.get(run.name, {}) for run in results.runs]
    for curve in CURVES:
        points = [
            thin(curve, one[curve.metric], num_runs=len(labels)) if curve.metric in one else []
            for one in found
        ]
        if any(points):
            yield build_chart(
                "training", curve.file, curve.caption, _curve(curve.title, points, labels)
            )


def _curve(title: str, points: Sequence[Sequence[Point]], labels: Sequence[str]) -> Any:
    """Return lines of [run, point]; a run is written as its number, which keeps pages small."""
    lines = [f"{n},{step},{value}" for n, some in enumerate(points) for step, value in some]
    data = alt.InlineData(
        values="\n".join(["n,step,value", *lines]), format=alt.CsvDataFormat(type="csv")
    )
    names = alt.param(name="runs", value=list(labels))
    colour: Any = alt.ColorValue(COLOURS[0])
    if len(labels) <= MOST_COLOURS:
        scale = alt.Scale(domain=list(labels), range=list(COLOURS[: len(labels)]))
        legend = alt.Legend(title=None, orient="top", labelLimit=320, columns=2)
        colour = alt.Color("run:N", scale=scale, legend=None if len(labels) == 1 else legend)
    faint = 1.0 if len(labels) <= MOST_COLOURS else 0.35
    is_short = len(labels) <= MOST_COLOURS and max(map(len, points)) <= 20
    steps = [step for some in points for step, _ in some]
    ticks = max(1, min(MOST_TICKS, max(steps) - min(steps)))  # not between whole steps
    condition = {"test": IS_OTHER, "value": 0.06}
    # A line of some opacity is painted as a layer of the picture; its stroke's costs nothing.
    opacity: dict[str, Any] = {"strokeOpacity": alt.StrokeOpacityValue(faint, condition=condition)}
    if is_short:  # its points fade too
        opacity = {"opacity": alt.OpacityValue(faint, condition=condition)}
    drawn = (
        alt.Chart(data)
        .transform_calculate(run="runs[datum.n]")
        .encode(
            x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickCount=ticks, format="d")),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
            color=colour,
            **opacity,
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("step:Q"),
                alt.Tooltip("value:Q", title=title, format=".4~g"),
            ],
            detail=alt.Detail("run:N"),
        )
    )
    lines_drawn = drawn.mark_line(point=is_short, strokeWidth=1.6)
    return lines_drawn.add_params(names).properties(height=HEIGHT)
