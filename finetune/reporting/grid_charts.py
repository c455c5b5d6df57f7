"""Charts of the main metric over the grid: a line, a heat map, or parallel coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, cast

import altair as alt

from finetune.reporting.chart_parts import (
    COLOURS,
    GREY,
    HEIGHT,
    IS_OTHER,
    MOST_FACETS,
    PARALLEL,
    Chart,
    Records,
    build_chart,
    fade_others,
    inline,
)
from finetune.reporting.results import Results
from finetune.reporting.rows import Row
from finetune.statistics.metric_names import MetricName


def draw_grid(results: Results) -> Iterator[Chart]:
    """Yield the main metric over the grid: a line, a heat map with small multiples, or parallels.

    Parallel coordinates are drawn where a heat map would need a fifth key, or too many multiples.
    """
    metric, swept, rows = results.main_metric, results.record.swept, results.compared_rows()
    if metric is None or not swept or len(rows) < 2:
        return
    if len(swept) == 1:
        drawn = _line(results, metric, rows)
        yield build_chart("scores", "grid", f"{metric} over {swept[0]}", drawn)
        return
    facets = [len({row[key] for row in rows}) for key in swept[2:4]]
    if len(swept) <= 4 and prod(facets) <= MOST_FACETS:
        yield build_chart("scores", "grid", f"{metric} over the grid", _heat(results, metric, rows))
    else:
        caption = f"Settings and {metric} of each run"
        yield build_chart("scores", PARALLEL, caption, _parallel(results, metric, rows))


def _parallel(results: Results, metric: str, rows: Sequence[Row]) -> alt.LayerChart:
    """Return parallel coordinates: an axis for each setting, and one for the metric."""
    scores = [row[metric] for row in rows]
    low, extent = min(scores), max(scores) - min(scores)
    axes = {key: list(dict.fromkeys(str(row[key]) for row in rows)) for key in results.record.swept}
    records: Records = []
    for row, score in zip(rows, scores, strict=True):
        places = {key: _place(values, str(row[key])) for key, values in axes.items()}
        places[metric] = (score - low) / extent if extent else 0.5
        common = {"run": results.label(row), "score": score}
        records += [{"axis": key, "place": round(place, 4), **common}
                    for key, place in places.items()]  # fmt: skip
    marks = [{"axis": key, "place": _place(values, value), "text": value}
             for key, values in axes.items() for value in values]  # fmt: skip
    marks += [{"axis": metric, "place": place, "text": f"{low + place * extent:.4f}"}
              for place in ((0, 1) if extent else (0.5,))]  # fmt: skip
    axis = alt.Axis(labelAngle=-20, labelLimit=120, grid=True)
    x = alt.X("axis:N", sort=None, title=None, axis=axis)
    y = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=[0, 1]))
    colour = alt.Color("score:Q", title=metric, scale=alt.Scale(scheme="cividis"))
    opacity = alt.StrokeOpacityValue(0.7, condition={"test": IS_OTHER, "value": 0.06})
    lines = alt.Chart(inline(records)).mark_line(strokeWidth=1.6).encode(
        x=x, y=y, color=colour, detail=alt.Detail("run:N"), strokeOpacity=opacity,
        tooltip=[alt.Tooltip("run:N"), alt.Tooltip("score:Q", title=metric, format=".4f")],
    )  # fmt: skip
    texts = alt.Chart(inline(marks)).mark_text(align="right", dx=-6, dy=-6, fontSize=11)
    labels = texts.encode(x=x, y=y, text=alt.Text("text:N"))
    return cast(alt.LayerChart, alt.layer(lines, labels).properties(height=HEIGHT))


def _place(values: Sequence[str], value: str) -> float:
    """Return a value's place on its axis, 0 to 1."""
    return values.index(value) / (len(values) - 1) if len(values) > 1 else 0.5


def _line(results: Results, metric: str, rows: Sequence[Row]) -> alt.LayerChart:
    (key,) = results.record.swept
    base = MetricName.parse(metric).base
    records = [
        {"run": results.label(row), "value": str(row[key]), "tuned": row[metric],
         "base": row.get(base)}
        for row in rows
    ]  # fmt: skip
    x = alt.X("value:N", sort=None, title=key, axis=alt.Axis(labelAngle=0))
    y = alt.Y("tuned:Q", title=metric, scale=alt.Scale(zero=False, padding=12))
    tooltip: list[Any] = [
        alt.Tooltip("run:N"),
        alt.Tooltip("tuned:Q", format=".4f"),
        alt.Tooltip("base:Q", format=".4f"),
    ]
    runs = alt.Chart(inline(records)).encode(x=x, y=y, tooltip=tooltip)
    layers: list[Any] = [
        runs.mark_line(color=COLOURS[0]),
        runs.mark_point(filled=True, size=80, color=COLOURS[0]).encode(opacity=fade_others()),
    ]
    if all(one["base"] is not None for one in records):
        layers.append(runs.mark_line(strokeDash=[3, 3], color=GREY).encode(y=alt.Y("base:Q")))
    return cast(alt.LayerChart, alt.layer(*layers).properties(height=HEIGHT))


def _heat(results: Results, metric: str, rows: Sequence[Row]) -> Any:
    swept = results.record.swept
    scores = [row[metric] for row in rows]
    low, high = min(scores), max(scores)
    middle = (low + high) / 2
    records = [
        {
            "run": results.label(row),
            "score": row[metric],
            "text": f"{row[metric]:.4f}",
            "ink": "white" if low < high and row[metric] < middle else "black",
            **{f"key{place}": str(row[key]) for place, key in enumerate(swept)},
        }
        for row in rows
    ]
    # Where all are equal, one bright colour; a domain without extent would be drawn black.
    domain = [low, high] if low < high else [low - 1, low]
    cells = alt.Chart().encode(
        x=alt.X("key0:N", sort=None, title=swept[0], axis=alt.Axis(labelAngle=0)),
        y=alt.Y("key1:N", sort=None, title=swept[1]),
        opacity=fade_others(),
        tooltip=[alt.Tooltip("run:N"), alt.Tooltip("score:Q", title=metric, format=".4f")],
    )
    colour = alt.Color("score:Q", title=metric, scale=alt.Scale(scheme="cividis", domain=domain),
                       legend=None if low == high else alt.Legend(format=".3f"))  # fmt: skip
    ink = alt.ColorValue("black", condition={"test": "datum.ink === 'white'", "value": "white"})
    layers: Any = alt.layer(
        cells.mark_rect().encode(color=colour),
        cells.mark_text(fontSize=11).encode(text=alt.Text("text:N"), color=ink),
        data=inline(records),
    )
    if len(swept) == 2:
        return layers.properties(height=alt.Step(34))
    sides = {
        side: alt.Row(f"key{place}:N", title=swept[place], sort=None) if side == "row"
        else alt.Column(f"key{place}:N", title=swept[place], sort=None)
        for side, place in zip(("column", "row"), range(2, len(swept)), strict=False)
    }  # fmt: skip
    return layers.properties(height=alt.Step(28), width=alt.Step(58)).facet(**sides)
