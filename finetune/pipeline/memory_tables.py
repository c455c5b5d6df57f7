"""Memory estimates as text: one run's parts, the runs of a grid, or one run on the usual cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from rich.table import Table

from finetune.config.schema import Config
from finetune.models.quantization import as_loaded
from finetune.models.shape import Shape, find_shape, load_config
from finetune.pipeline.card_table import describe_remedies, find_fits, render_fits
from finetune.pipeline.jobs import Job
from finetune.pipeline.memory_estimate import (
    ASSUMED_CARD_GIB,
    GIB,
    DeviceMemory,
    Estimate,
    estimate,
    find_problem,
)
from finetune.reporting.tables import add_row, build_table, print_table, print_text

ASSUMED = (
    f"training.device is cuda, and this machine has no GPU: one of {ASSUMED_CARD_GIB:g} GiB is "
    "assumed; --gib N is for another one, --cards for the usual ones"
)


@dataclass(frozen=True)
class Point:
    """A point of the grid: its swept values, the model as loaded, and the device it is to fit."""

    swept: dict[str, str]
    config: Config
    shape: Shape
    device: DeviceMemory

    @property
    def need(self) -> Estimate:
        return estimate(self.config, self.shape, self.device)

    @property
    def problem(self) -> str | None:
        tokens = self.config.training.most_tokens()
        return find_problem(self.config, self.shape, self.device, tokens)


def build_point(job: Job, gib: float | None) -> Point:
    """Return a job with its model's sizes and its device.

    Args:
        job: as composed.
        gib: memory to fit into; None: what is free, or assumed.

    Raises:
        ValueError, OSError: the model cannot be found.
    """
    model = as_loaded(job.config.model, load_config(job.config.model))
    device, shape = DeviceMemory.find(job.config, gib), find_shape(job.config.model)
    return Point(job.swept, replace(job.config, model=model), shape, device)


def print_points(points: Sequence[Point]) -> int:
    """Print one run's parts, or the peaks of several; return the exit code: 1 if one is too big."""
    return print_parts(points[0]) if len(points) == 1 else print_grid(points)


def print_parts(point: Point) -> int:
    """Print one run's parts, and whether it fits; return the exit code."""
    print_table(render(point.need, point.device))
    if point.device.is_assumed:
        print_text(ASSUMED)
    print_text(f"\n{point.problem or 'it fits'}")
    return int(point.problem is not None)


def render(need: Estimate, device: DeviceMemory) -> Table:
    """Return the table of parts, their peak, and the free memory."""
    table = build_table("part", "GiB", right=("GiB",))
    for name, value in asdict(need).items():
        add_row(table, name, f"{value / GIB:.2f}")
    add_row(table, "peak", f"{need.total / GIB:.2f}")
    add_row(table, device.describe(), f"{device.free / GIB:.2f}")
    return table


def print_grid(points: Sequence[Point]) -> int:
    """Print the peak of each run of a grid, and remedies; return the exit code."""
    print_table(render_grid(points))
    if any(point.device.is_assumed for point in points):
        print_text(ASSUMED)
    problems = list(dict.fromkeys(point.problem for point in points if point.problem))
    for problem in problems:
        print_text(f"\n{problem}")
    if not problems:
        print("\nall fit")
    return int(bool(problems))


def render_grid(points: Sequence[Point]) -> Table:
    """Return the table of a grid: swept values, main parts, peak, memory, whether it fits."""
    numbers = ("weights", "activations", "peak GiB", "of")
    table = build_table(*points[0].swept, *numbers, "fits", right=numbers)
    for point in points:
        need = point.need
        sizes = (need.weights, need.activations, need.total, point.device.free)
        shown = (f"{size / GIB:.2f}" for size in sizes)
        add_row(table, *point.swept.values(), *shown, "no" if point.problem else "yes")
    return table


def print_cards(point: Point) -> None:
    """Print whether a run fits each of the usual GPUs, and the remedies."""
    fits = find_fits(point.config, point.shape)
    print_table(render_fits(fits))
    for line in describe_remedies(fits):
        print_text(f"\n{line}")
