"""Charts of a report as Vega-Lite specs: inline in report.html, as PNG beside report.md.

A run has its label in every chart (`run`); the page sets the parameter `picked` to the label that
was clicked, and all other runs fade.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import altair as alt
from altair.utils.schemapi import debug_mode

from finetune.reporting.curves import CURVES, Point, thin
from finetune.reporting.effects import KeyEffect, find_effects
from finetune.reporting.results import Results
from finetune.reporting.rows import Row
from finetune.statistics.comparison import Comparison
from finetune.statistics.metric_names import MetricName

# Okabe and Ito's palette (2008), for colour-blind readers; its black and yellow are left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#888888"
PICKED = alt.param(name="picked", value=None)
IS_PICKED = "!isValid(picked) || picked === datum.run"
PARALLEL = "parallel"
MOST_NAMED = 40  # runs with their labels on an axis; of more, hovering says which
MOST_COLOURS = len(COLOURS)
MOST_FACETS = 24  # small multiples of a heat map
HEIGHT = 260

Spec = dict[str, Any]
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Chart:
    """One chart: the name of its file, its caption, and its spec without a width."""

    section: str  # of the page: scores, settings, training or cost
    name: str
    caption: str
    spec: Spec

    @property
    def is_wide(self) -> bool:
        """True if it takes the page's width: small multiples, parallel coordinates."""
        return "facet" in self.spec or self.name == PARALLEL


def build_charts(results: Results) -> list[Chart]:
    """Return the charts that the results allow, in the order of the page."""
    with debug_mode(False):  # a test validates the specs, which takes half of the time
        return [*_differences(results), *_grid(results), *_effects(results), *_curves(results),
                *_costs(results)]  # fmt: skip


def _chart(section: str, name: str, caption: str, drawn: alt.TopLevelMixin) -> Chart:
    spec = cast(Any, drawn).add_params(PICKED).to_dict(validate=False)
    spec.pop("config", None)  # of the page, in light or dark
    return Chart(section, name, caption, spec)


def _faded() -> Any:
    return alt.condition(IS_PICKED, alt.value(1.0), alt.value(0.12))


def _data(records: Records) -> Any:
    return alt.InlineData(values=records)


def _differences(results: Results) -> Iterator[Chart]:
    """Yield for each task each run's difference to the base, with its interval."""
    for task in dict.fromkeys(MetricName.parse(name).task for name in results.metrics):
        names = [n for n in results.metrics if MetricName.parse(n).task == task]
        names.sort(key=lambda name: name != results.main_metric)
        compared = [n for n in names if n in results.comparisons]
        changed = [name for name in compared if results.comparisons[name].has_changes]
        if changed:
            caption = f"Difference to the base in {changed[0]}{_describe(results, changed[0])}"
            drawn = _forest(results, results.comparisons[changed[0]])
            yield _chart("scores", f"differences-{task}", caption, drawn)


def _describe(results: Results, metric: str) -> str:
    better = {True: ", higher is better", False: ", lower is better", None: ""}
    return f" with 95 % interval{better[results.metrics[metric].higher_is_better]}"


def _forest(results: Results, comparison: Comparison) -> alt.LayerChart:
    scale = 100 if comparison.is_share else 1
    records: Records = []
    for row in results.rows:
        found = comparison.differences.get(row["run"])
        if found is None:
            continue
        records.append(
            {
                "run": results.label(row),
                "difference": found.value * scale,
                "low": None if found.low is None else found.low * scale,
                "high": None if found.high is None else found.high * scale,
                "p": found.p_adjusted,
                "significant": "significant" if found.is_significant else "not significant",
            }
        )
    many = len(records) > MOST_NAMED
    if many:
        records.sort(key=lambda one: -one["difference"])
    title = "difference, points" if comparison.is_share else "difference"
    y = alt.Y("run:N", sort=None, title=None, axis=alt.Axis(labels=not many, ticks=not many,
              labelLimit=320))  # fmt: skip
    colour = alt.Color(
        "significant:N",
        scale=alt.Scale(domain=["significant", "not significant"], range=[COLOURS[0], GREY]),
        legend=alt.Legend(title=None, orient="top"),
    )
    tooltip = [
        alt.Tooltip("run:N"), alt.Tooltip("difference:Q", format="+.4~g"),
        alt.Tooltip("low:Q", format="+.4~g"), alt.Tooltip("high:Q", format="+.4~g"),
        alt.Tooltip("p:Q", title="p, adjusted", format=".3~g"),
    ]  # fmt: skip
    runs = alt.Chart(_data(records)).encode(y=y, color=colour, opacity=_faded(), tooltip=tooltip)
    zero = alt.Chart(_data([{"base": 0}])).mark_rule(strokeDash=[3, 3], color=GREY)
    return cast(
        alt.LayerChart,
        alt.layer(
            zero.encode(x="base:Q"),
            runs.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title), x2="high:Q"),
            runs.mark_point(filled=True, size=30 if many else 80).encode(x="difference:Q"),
        ).properties(height=alt.Step(5 if many else 22)),
    )


def _grid(results: Results) -> Iterator[Chart]:
    """Yield the main metric over the grid: a line, or a heat map with small multiples."""
    metric, swept, rows = results.main_metric, results.record.swept, results.compared_rows()
    if metric is None or not swept or len(rows) < 2:
        return
    if len(swept) == 1:
        yield _chart("scores", "grid", f"{metric} over {swept[0]}", _line(results, metric, rows))
        return
    facets = [len({row[key] for row in rows}) for key in swept[2:4]]
    if len(swept) <= 4 and prod(facets) <= MOST_FACETS:
        yield _chart("scores", "grid", f"{metric} over the grid", _heat(results, metric, rows))

    elif len(swept) > 4:
        yield _chart("scores", PARALLEL, f"Settings and {metric} of each run",
                     _parallel(results, metric, rows))  # fmt: skip


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
    opacity = alt.condition("isValid(picked) && picked !== datum.run", alt.value(0.06),
                            alt.value(0.7))  # fmt: skip
    lines = alt.Chart(_data(records)).mark_line(strokeWidth=1.6).encode(
        x=x, y=y, color=colour, detail="run:N", strokeOpacity=opacity,
        tooltip=["run:N", alt.Tooltip("score:Q", title=metric, format=".4f")],
    )  # fmt: skip
    texts = alt.Chart(_data(marks)).mark_text(align="right", dx=-6, dy=-6, fontSize=11)
    labels = texts.encode(x=x, y=y, text="text:N")
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
        "run:N",
        alt.Tooltip("tuned:Q", format=".4f"),
        alt.Tooltip("base:Q", format=".4f"),
    ]
    runs = alt.Chart(_data(records)).encode(x=x, y=y, tooltip=tooltip)
    layers: list[Any] = [
        runs.mark_line(color=COLOURS[0]),
        runs.mark_point(filled=True, size=80, color=COLOURS[0]).encode(opacity=_faded()),
    ]
    if all(one["base"] is not None for one in records):
        layers.append(runs.mark_line(strokeDash=[3, 3], color=GREY).encode(y="base:Q"))
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
        opacity=_faded(),
        tooltip=["run:N", alt.Tooltip("score:Q", title=metric, format=".4f")],
    )
    colour = alt.Color("score:Q", title=metric, scale=alt.Scale(scheme="cividis", domain=domain),
                       legend=None if low == high else alt.Legend(format=".3f"))  # fmt: skip
    ink = alt.condition("datum.ink === 'white'", alt.value("white"), alt.value("black"))
    layers: Any = alt.layer(
        cells.mark_rect().encode(color=colour),
        cells.mark_text(fontSize=11).encode(text="text:N", color=ink),
        data=_data(records),
    )
    if len(swept) == 2:
        return layers.properties(height=alt.Step(34))
    sides = {
        side: alt.Row(f"key{place}:N", title=swept[place], sort=None) if side == "row"
        else alt.Column(f"key{place}:N", title=swept[place], sort=None)
        for side, place in zip(("column", "row"), range(2, len(swept)), strict=False)
    }  # fmt: skip
    return layers.properties(height=alt.Step(28), width=alt.Step(58)).facet(**sides)


def _effects(results: Results) -> Iterator[Chart]:
    """Yield each setting's effect, where several settings were swept."""
    if len(results.record.swept) < 2 or results.main_metric is None:
        return
    for place, effect in enumerate(find_effects(results)):
        caption = f"Mean {results.main_metric} over {effect.key}"
        if effect.share is not None:
            caption += f": {effect.share:.0%} of the variance between runs"
        yield _chart("settings", f"effect-{place + 1}", caption, _effect(results, effect))


def _effect(results: Results, effect: KeyEffect) -> alt.LayerChart:
    metric = results.main_metric
    assert metric is not None, "an effect is one on the main metric"
    bases = [row[column] for row in results.compared_rows()
             if (column := MetricName.parse(metric).base) in row]  # fmt: skip
    base = bases[0] if bases and len(set(bases)) == 1 else None
    records: Records = [
        {
            "value": one.value, "mean": one.mean, "runs": one.runs,
            "low": None if base is None or one.low is None else base + one.low,
            "high": None if base is None or one.high is None else base + one.high,
        }
        for one in effect.values
    ]  # fmt: skip
    values = alt.Chart(_data(records)).encode(
        x=alt.X("value:N", sort=None, title=effect.key, axis=alt.Axis(labelAngle=0)),
        tooltip=["value:N", alt.Tooltip("mean:Q", format=".4f"), "runs:Q",
                 alt.Tooltip("low:Q", format=".4f"), alt.Tooltip("high:Q", format=".4f")],
    )  # fmt: skip
    y = alt.Y("mean:Q", title=f"mean {metric}", scale=alt.Scale(zero=False, padding=12))
    layers: list[Any] = [
        values.mark_rule(strokeWidth=2, color=COLOURS[0]).encode(y=alt.Y("low:Q"), y2="high:Q"),
        values.mark_point(filled=True, size=80, color=COLOURS[0]).encode(y=y),
    ]
    if base is not None:
        rule = alt.Chart(_data([{"base": base}])).mark_rule(strokeDash=[3, 3], color=GREY)
        layers.append(rule.encode(y="base:Q"))
    return cast(alt.LayerChart, alt.layer(*layers).properties(height=HEIGHT))


def _curves(results: Results) -> Iterator[Chart]:
    """Yield losses, learning rate and gradient norm over the steps of all runs."""
    labels = [results.label(row) for row in results.rows]
    found = [results.curves.get(run.name, {}) for run in results.runs]
    for curve in CURVES:
        points = [
            thin(curve, one[curve.metric], num_runs=len(labels)) if curve.metric in one else []
            for one in found
        ]
        if any(points):
            yield _chart("training", curve.file, curve.caption, _curve(curve.title, points, labels))


def _curve(title: str, points: Sequence[Sequence[Point]], labels: Sequence[str]) -> Any:
    """Return lines of [run, point]; a run is written as its number, which keeps pages small."""
    lines = [f"{n},{step},{value}" for n, some in enumerate(points) for step, value in some]
    data = alt.InlineData(
        values="\n".join(["n,step,value", *lines]), format=alt.CsvDataFormat(type="csv")
    )
    names = alt.param(name="runs", value=list(labels))
    colour: Any = alt.value(COLOURS[0])
    if len(labels) <= MOST_COLOURS:
        scale = alt.Scale(domain=list(labels), range=list(COLOURS[: len(labels)]))
        legend = alt.Legend(title=None, orient="top", labelLimit=320, columns=2)
        colour = alt.Color("run:N", scale=scale, legend=None if len(labels) == 1 else legend)
    faint = alt.value(1.0 if len(labels) <= MOST_COLOURS else 0.35)
    shown = alt.condition("isValid(picked) && picked !== datum.run", alt.value(0.06), faint)
    is_short = len(labels) <= MOST_COLOURS and max(map(len, points)) <= 20
    # A line of some opacity is painted as a layer of the picture; its stroke's costs nothing.
    drawn = (
        alt.Chart(data)
        .transform_calculate(run="runs[datum.n]")
        .encode(
            x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
            color=colour,
            **{"opacity" if is_short else "strokeOpacity": shown},
            tooltip=["run:N", "step:Q", alt.Tooltip("value:Q", title=title, format=".4~g")],
            detail="run:N",
        )
    )
    lines_drawn = drawn.mark_line(point=is_short, strokeWidth=1.6)
    return lines_drawn.add_params(names).properties(height=HEIGHT)


def _costs(results: Results) -> Iterator[Chart]:
    metric = results.main_metric
    rows = [row for row in results.compared_rows() if row["train_seconds"] is not None]
    if metric is None or len(rows) < 2:
        return
    records = [
        {"run": results.label(row), "seconds": row["train_seconds"], "score": row[metric],
         "parameters": row["num_trainable_parameters"]}
        for row in rows
    ]  # fmt: skip
    drawn = alt.Chart(_data(records)).mark_point(filled=True, size=80, color=COLOURS[0]).encode(
        x=alt.X("seconds:Q", title="training, seconds", axis=alt.Axis(tickCount=8),
                scale=alt.Scale(zero=False, padding=14)),
        y=alt.Y("score:Q", title=metric, scale=alt.Scale(zero=False, padding=14)),
        opacity=_faded(),
        tooltip=["run:N", alt.Tooltip("seconds:Q", format=".0f"),
                 alt.Tooltip("score:Q", title=metric, format=".4f"),
                 alt.Tooltip("parameters:Q", title="trainable parameters", format=",")],
    ).properties(height=HEIGHT)  # fmt: skip
    yield _chart("cost", "cost", f"Training time against {metric}", drawn)
