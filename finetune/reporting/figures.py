"""Figures of a report, in a palette for colour-blind readers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finetune.reporting.results import Results, Row
from finetune.statistics.metric_names import MetricName

# Okabe and Ito's palette (2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BASE_COLOUR = "#777777"
WIDTH = 7.5  # inches


def draw_figures(results: Results) -> dict[str, Path]:
    """Draw what the results allow into `figures/`; return caption -> file."""
    folder = results.folder / "figures"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    drawn: dict[str, Path] = {}
    metric = results.main_metric
    scored = results.compared_rows()
    if metric in results.comparisons and results.comparisons[metric].has_changes:
        _save(
            drawn, folder / "differences.png", f"Difference to the base in {metric}, 95 % interval",
            _height(scored), lambda axes: _differences(axes, results, metric),
        )  # fmt: skip
    if metric and len(scored) > 1 and results.record.swept:
        name, draw = _grid(results, metric, scored)
        _save(drawn, folder / "grid.png", name, 3.6, draw)
    if any(run.events.exists() for run in results.runs):
        _save(drawn, folder / "loss.png", "Training loss", 3.6, lambda a: _losses(a, results))
    trained = [row for row in scored if row["train_seconds"] is not None]
    if metric and len(trained) > 1:
        _save(
            drawn, folder / "cost.png", f"Training time against {metric}",
            3.6, lambda axes: _cost(axes, results, metric, trained),
        )  # fmt: skip
    return drawn


def _save(
    drawn: dict[str, Path], path: Path, caption: str, height: float, draw: Callable[[Axes], None]
) -> None:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    drawn[caption] = path


def _height(rows: Sequence[Row]) -> float:
    return 1.2 + 0.3 * len(rows)


def _differences(axes: Axes, results: Results, metric: str) -> None:
    """Draw each run's difference to the base with its interval; filled where it is significant."""
    comparison = results.comparisons[metric]
    rows = [row for row in results.rows if row["run"] in comparison.differences]
    for place, row in enumerate(reversed(rows)):
        found = comparison.differences[row["run"]]
        colour = COLOURS[0] if found.is_significant else BASE_COLOUR
        scale = 100 if comparison.is_share else 1
        if found.low is not None and found.high is not None:
            ends = np.array([found.low, found.high]) * scale
            axes.plot(ends, [place, place], color=colour, linewidth=2)
        face = colour if found.is_significant else "white"
        axes.plot(found.value * scale, place, "o", color=colour, markerfacecolor=face)
    axes.axvline(0, color=BASE_COLOUR, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [results.label(row) for row in reversed(rows)])
    unit = "points; " if comparison.is_share else ""
    direction = {True: "higher", False: "lower"}[bool(comparison.metric.higher_is_better)]
    adjusted = " after adjustment" if len(rows) > 1 else ""
    axes.set_xlabel(f"{unit}{direction} is better; filled: significant{adjusted}")


def _grid(results: Results, metric: str, rows: Sequence[Row]) -> tuple[str, Callable[[Axes], None]]:
    """Choose by the number of swept keys: a line, a heat map, or parallel coordinates."""
    swept = results.record.swept
    if len(swept) == 1:
        return f"{metric} over {swept[0]}", lambda axes: _line(axes, metric, swept[0], rows)
    if len(swept) == 2:
        return f"{metric} over the grid", lambda axes: _heat(axes, metric, swept, rows)
    return f"{metric} over the grid", lambda axes: _parallel(axes, metric, swept, rows)


def _line(axes: Axes, metric: str, key: str, rows: Sequence[Row]) -> None:
    column = MetricName.parse(metric).base
    places = range(len(rows))
    axes.plot(places, [row[metric] for row in rows], "o-", color=COLOURS[0], label="tuned")
    base = [row[column] for row in rows if column in row]
    if len(base) == len(rows):
        axes.plot(places, base, ":", color=BASE_COLOUR, label="base")
    axes.set_xticks(places, [str(row[key]) for row in rows])
    axes.set_xlabel(key)
    axes.set_ylabel(metric)
    axes.legend(frameon=False)


def _heat(axes: Axes, metric: str, swept: Sequence[str], rows: Sequence[Row]) -> None:
    across, down = (list(dict.fromkeys(row[key] for row in rows)) for key in swept)
    values = np.full((len(down), len(across)), np.nan)
    for row in rows:
        values[down.index(row[swept[1]]), across.index(row[swept[0]])] = row[metric]
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    axes.imshow(values, cmap="cividis", aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value:.4f}"
        axes.text(
            x, y, text, ha="center", va="center", color="white" if value < middle else "black"
        )
    axes.set_xticks(range(len(across)), across)
    axes.set_yticks(range(len(down)), down)
    axes.set_xlabel(swept[0])
    axes.set_ylabel(swept[1])
    axes.spines[:].set_visible(False)


def _parallel(axes: Axes, metric: str, swept: Sequence[str], rows: Sequence[Row]) -> None:
    """Draw one line a run through its swept values to its score, coloured by the score."""
    from matplotlib import colormaps

    scores = np.array([row[metric] for row in rows])
    span = (scores.max() - scores.min()) or 1.0
    heights = (scores - scores.min()) / span
    known = {key: list(dict.fromkeys(row[key] for row in rows)) for key in swept}
    for row, height in zip(rows, heights, strict=True):
        places = [known[key].index(row[key]) / max(1, len(known[key]) - 1) for key in swept] + [
            height
        ]
        axes.plot(range(len(places)), places, color=colormaps["cividis"](height), alpha=0.9)
    for x, key in enumerate(swept):
        for place, value in enumerate(known[key]):
            axes.text(x, place / max(1, len(known[key]) - 1), f" {value}", fontsize=8)
    for height, score in ((0.0, scores.min()), (1.0, scores.max())):
        axes.text(len(swept), height, f" {score:.4f}", fontsize=8)
    axes.set_xticks(range(len(swept) + 1), [*swept, metric])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _losses(axes: Axes, results: Results) -> None:
    for number, (run, row) in enumerate(zip(results.runs, results.rows, strict=True)):
        losses = run.metric("train/loss")
        if losses:
            steps = [loss.step for loss in losses]
            style = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
            colour = COLOURS[number % len(COLOURS)]
            smooth = _smoothed([loss.value for loss in losses])
            axes.plot(steps, smooth, style, color=colour, label=results.label(row), linewidth=1.4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, smoothed")
    if axes.lines and len(results.runs) <= 12:
        axes.legend(frameon=False, fontsize=8)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving mean (weight .9), started unbiased."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = 0.9 * mean + 0.1 * value, 0.9 * weight + 0.1
        means.append(mean / weight)
    return means


def _cost(axes: Axes, results: Results, metric: str, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows):
        axes.plot(
            row["train_seconds"], row[metric], "o", color=COLOURS[number % len(COLOURS)],
            label=f"{results.label(row)}: {row['num_trainable_parameters']:,} parameters",
        )  # fmt: skip
    axes.set_xlabel("training, seconds")
    axes.set_ylabel(metric)
    if len(rows) <= 12:
        axes.legend(frameon=False, fontsize=8)
