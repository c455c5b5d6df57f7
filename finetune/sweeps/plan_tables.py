"""The plan of a sweep as text: its table, the time it takes, and what is trained together."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from finetune.reporting.tables import (
    add_row,
    build_table,
    find_width,
    shorten_keys,
    show_duration,
)
from finetune.sweeps.planning import Sweep, count_runs
from finetune.tracking.run_names import shorten_names

MOST_NAMED = 4  # runs named in a line; more are counted


def render_plan(sweep: Sweep, width: int) -> Table:
    """Return the table of the plan: swept values, run, and action.

    Where so many characters do not hold it, runs are shown by their short ids, and then keys
    without their sections.
    """
    names = [point.run_name for point in sweep.points]
    short = shorten_keys(sweep.swept)
    for keys, runs in (
        (sweep.swept, names),
        (sweep.swept, shorten_names(names)),
        ([short[key] for key in sweep.swept], shorten_names(names)),
    ):
        rows = [[*keys, "run", "action"]]
        for point, run in zip(sweep.points, runs, strict=True):
            values = [point.job.swept[key] for key in sweep.swept]
            rows.append([*values, run, point.describe_action()])
        if find_width(rows) <= width:
            break
    table = build_table(*rows[0])
    for row in rows[1:]:
        add_row(table, *row)
    return table


def render_groups(sweep: Sweep) -> Iterator[str]:
    """Yield lines on the runs that are trained together, and why others are not."""
    separate: dict[str, list[str]] = {}
    for group in sweep.groups:
        names = [str(sweep.points[index]) for index in group.indices]
        if len(names) > 1:
            yield f"trained together: {'; '.join(names)}"
        elif group.reason is not None:
            separate.setdefault(group.reason, []).extend(names)
    num_training = sum(point.trains for point in sweep.points)
    if num_training > 1:
        for reason, names in separate.items():
            all_of = "all " if len(names) == num_training else ""
            is_named = len(names) <= MOST_NAMED and not all_of
            runs = "; ".join(names) if is_named else f"{all_of}{len(names)} runs"
            yield f"trained separately: {runs} ({reason})"


def render_time(sweep: Sweep, num_workers: int) -> str | None:
    """Return a line on how long training takes, by earlier runs; None where nothing is trained.

    Args:
        sweep: as planned.
        num_workers: that train side by side.
    """
    training = [point for point in sweep.points if point.trains]
    if not training or sweep.config.workers.is_elsewhere:
        return None
    runs = count_runs(len(training))
    known = [point.train_seconds for point in training if point.train_seconds is not None]
    if not known:
        return f"to train: {runs}; how long is known once one has trained here"
    of = "" if len(known) == len(training) else f", by the speed known for {len(known)} of them"
    workers = min(num_workers, len(training))
    on = f" on {workers} workers" if workers > 1 else ""
    seconds = max(sum(known) / len(known) * len(training) / workers, 1.0)
    return f"to train: {runs}, about {show_duration(seconds)}{on}{of}"
