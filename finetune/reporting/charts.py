"""Charts of a report as Vega-Lite specs: inline in report.html, as PNG beside report.md.

A run has its label in every chart (`run`); the page sets the parameter `picked` to the label that
was clicked, and all other runs fade.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import altair as alt
from altair.utils.schemapi import debug_mode

from finetune.reporting.chart_parts import (
    COLOURS,
    GREY,
    HEIGHT,
    MOST_NAMED,
    Chart,
    Records,
    build_chart,
    fade_others,
    inline,
)
from finetune.reporting.curve_charts import draw_curves
from finetune.reporting.effects import KeyEffect, find_effects
from finetune.reporting.grid_charts import draw_grid
from finetune.reporting.results import Results
from finetune.statistics.comparison import Comparison
from finetune.statistics.metric_names import MetricName


def build_charts(results: Results) -> list[Chart]:
    """Return the charts that the results allow, in the order of the page."""
    with debug_mode(False):  # a test validates the specs, which takes half of the time
        scores = [*_differences(results), *draw_grid(results), *_effects(results)]
        return [*scores, *draw_curves(results), *_costs(results)]


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
            yield build_chart("scores", f"differences-{task}", caption, drawn)


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
    runs = alt.Chart(inline(records)).encode(
        y=y, color=colour, opacity=fade_others(), tooltip=tooltip
    )
    zero = alt.Chart(inline([{"base": 0}])).mark_rule(strokeDash=[3, 3], color=GREY)
    x: dict[str, Any] = {"title": title, "axis": alt.Axis(tickCount=8)}
    layers = [  # points first: the order of runs is theirs, also where one has no interval
        zero.encode(x=alt.X("base:Q", **x)),
        runs.mark_point(filled=True, size=30 if many else 80).encode(x=alt.X("difference:Q", **x)),
        runs.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", **x), x2=alt.X2("high:Q")),
    ]
    drawn = alt.layer(*layers).properties(height=alt.Step(5 if many else 22))
    return cast(alt.LayerChart, drawn)


def _effects(results: Results) -> Iterator[Chart]:
    """Yield each setting's effect, where several settings were swept."""
    if len(results.record.swept) < 2 or results.main_metric is None:
        return
    for place, effect in enumerate(find_effects(results)):
        caption = f"Mean {results.main_metric} over {effect.key}"
        if effect.share is not None:
            caption += f": {effect.share:.0%} of the variance between runs"
        yield build_chart("settings", f"effect-{place + 1}", caption, _effect(results, effect))


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
    values = alt.Chart(inline(records)).encode(
        x=alt.X("value:N", sort=None, title=effect.key, axis=alt.Axis(labelAngle=0)),
        tooltip=[alt.Tooltip("value:N"), alt.Tooltip("mean:Q", format=".4f"), alt.Tooltip("runs:Q"),
                 alt.Tooltip("low:Q", format=".4f"), alt.Tooltip("high:Q", format=".4f")],
    )  # fmt: skip
    y = alt.Y("mean:Q", title=f"mean {metric}", scale=alt.Scale(zero=False, padding=12))
    layers: list[Any] = [
        values.mark_rule(strokeWidth=2, color=COLOURS[0]).encode(
            y=alt.Y("low:Q"), y2=alt.Y2("high:Q")
        ),
        values.mark_point(filled=True, size=80, color=COLOURS[0]).encode(y=y),
    ]
    if base is not None:
        rule = alt.Chart(inline([{"base": base}])).mark_rule(strokeDash=[3, 3], color=GREY)
        layers.append(rule.encode(y=alt.Y("base:Q")))
    return cast(alt.LayerChart, alt.layer(*layers).properties(height=HEIGHT))


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
    drawn = alt.Chart(inline(records)).mark_point(filled=True, size=80, color=COLOURS[0]).encode(
        x=alt.X("seconds:Q", title="training, seconds", axis=alt.Axis(tickCount=8),
                scale=alt.Scale(zero=False, padding=14)),
        y=alt.Y("score:Q", title=metric, scale=alt.Scale(zero=False, padding=14)),
        opacity=fade_others(),
        tooltip=[alt.Tooltip("run:N"), alt.Tooltip("seconds:Q", format=".0f"),
                 alt.Tooltip("score:Q", title=metric, format=".4f"),
                 alt.Tooltip("parameters:Q", title="trainable parameters", format=",")],
    ).properties(height=HEIGHT)  # fmt: skip
    yield build_chart("cost", "cost", f"Training time against {metric}", drawn)
