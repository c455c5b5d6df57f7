"""Charts of losses, learning rate and gradient norm over the steps of all runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from finetune.reporting.seeds import SEED_KEYS

MOST_TICKS = 8


@dataclass(frozen=True)
class Runs:
    """The labels of runs, and what their lines are coloured by: the run, or a setting's value."""

    labels: list[str]
    groups: list[str]  # of each run
    title: str | None = None  # of the groups, where they are not the runs

    @property
    def are_few(self) -> bool:
        return len(self.labels) <= MOST_COLOURS

    def colour(self) -> Any:
        """Return the colours with their legend; one colour where there are too many groups."""
        names = list(dict.fromkeys(self.groups))
        if len(names) > MOST_COLOURS:
            return alt.ColorValue(COLOURS[0])
        scale = alt.Scale(domain=names, range=list(COLOURS[: len(names)]))
        columns = 2 if self.title is None else alt.Undefined
        legend = alt.Legend(title=self.title, orient="top", labelLimit=320, columns=columns)
        return alt.Color("group:N", scale=scale, legend=None if len(names) == 1 else legend)


def draw_curves(results: Results) -> Iterator[Chart]:
    """Yield losses, learning rate and gradient norm over the steps of all runs."""
    runs, found = name_runs(results), [results.curves.get(run.name, {}) for run in results.runs]
    for curve in CURVES:
        points = [
            thin(curve, one[curve.metric], num_runs=len(found)) if curve.metric in one else []
            for one in found
        ]
        if any(points):
            drawn = _curve(curve.title, points, runs)
            yield build_chart("training", curve.file, curve.caption, drawn)


def name_runs(results: Results) -> Runs:
    """Return the runs; many are coloured by the first swept setting that has few values."""
    labels = [results.label(row) for row in results.rows]
    if len(labels) > MOST_COLOURS:
        for key in results.record.swept:
            values = [str(row[key]) for row in results.rows]
            if key not in SEED_KEYS and 1 < len(set(values)) <= MOST_COLOURS:
                return Runs(labels, values, key)
    return Runs(labels, labels)


def _curve(title: str, points: Sequence[Sequence[Point]], runs: Runs) -> Any:
    """Return lines of [run, point]; a run is written as its number, which keeps pages small."""
    lines = [f"{n},{step},{value}" for n, some in enumerate(points) for step, value in some]
    data = alt.InlineData(
        values="\n".join(["n,step,value", *lines]), format=alt.CsvDataFormat(type="csv")
    )
    is_short = runs.are_few and max(map(len, points)) <= 20
    steps = [step for some in points for step, _ in some]
    ticks = max(1, min(MOST_TICKS, max(steps) - min(steps)))  # not between whole steps
    drawn = (
        alt.Chart(data)
        .transform_calculate(run="runs[datum.n]", group="groups[datum.n]")
        .encode(
            x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickCount=ticks, format="d")),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
            color=runs.colour(),
            **_opacity(runs, is_short=is_short),
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("step:Q"),
                alt.Tooltip("value:Q", title=title, format=".4~g"),
            ],
            detail=alt.Detail("run:N"),
        )
    )
    names = (alt.param(name="runs", value=runs.labels), alt.param(name="groups", value=runs.groups))
    lines_drawn = drawn.mark_line(point=is_short, strokeWidth=1.6)
    return lines_drawn.add_params(*names).properties(height=HEIGHT)


def _opacity(runs: Runs, *, is_short: bool) -> dict[str, Any]:
    """Return the opacity of lines, and of their points where they have any.

    A line of some opacity is painted as a layer of the picture; its stroke's costs nothing.
    """
    faint, condition = 1.0 if runs.are_few else 0.4, {"test": IS_OTHER, "value": 0.06}
    if is_short:
        return {"opacity": alt.OpacityValue(faint, condition=condition)}
    return {"strokeOpacity": alt.StrokeOpacityValue(faint, condition=condition)}
