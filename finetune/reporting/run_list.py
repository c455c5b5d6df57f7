"""The list of runs: state, progress, worker, settings and scores of each, filtered and sorted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from rich.cells import cell_len
from rich.table import Table

from finetune.config.schema import CONDUCT, Config, flatten, marked
from finetune.problems import Refused, nearest
from finetune.reporting.tables import add_row, build_table, shorten_labels
from finetune.statistics.metric_names import MetricName
from finetune.statistics.metrics import show_score
from finetune.tracking.progress import RunState, look_once
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.run_names import shorten_names

NUMBERS = ("step", "loss")
LEAST_SETTINGS = 26  # characters; for less, columns are left out
GAP = 2  # characters between columns


@dataclass(frozen=True)
class ListedRun:
    """A run as it was found."""

    run: RunFolder
    state: RunState
    typed: dict[str, str]  # its overrides, without those of the sweep
    scores: dict[str, float]  # by task/metric

    @classmethod
    def read(cls, run: RunFolder) -> ListedRun:
        conduct = marked(Config, CONDUCT)
        pairs = (one.lstrip("+").partition("=") for one in run.read_overrides())
        typed = {k: value for k, _, value in pairs if k.partition(".")[0] not in conduct}
        return cls(run, look_once(run), typed, _read_scores(run))

    @cached_property
    def settings(self) -> dict[str, str]:
        """All settings as composed, by their keys; those that were typed as they were typed."""
        try:
            composed = dict(flatten(self.run.read_settings()))
        except Refused:  # its damage is printed
            composed = {}
        return {key: str(value) for key, value in composed.items()} | self.typed

    @property
    def columns(self) -> dict[str, Any]:
        """The values of the columns that it can be sorted and filtered by; None: it has none."""
        state, now = self.state, self.state.progress
        return {
            "run": self.run.name,
            "state": state.state,
            "step": now.step if now.max_steps else None,
            "loss": now.loss,
            "worker": state.worker or None,
            "host": state.host or None,
            "started": state.started,
            "ended": state.ended,
        }

    def label(self, keys: Sequence[str]) -> str:
        """Return its typed settings among some keys."""
        return " ".join(f"{key}={self.typed[key]}" for key in keys if key in self.typed)


def _read_scores(run: RunFolder) -> dict[str, float]:
    scores = {}
    for task in run.scored_tasks():
        found = run.read_scores(task)
        for name, metric in (found.tuned.metrics if found else {}).items():
            scores[str(MetricName(task, name))] = metric.value
    return scores


def find_value(listed: Sequence[ListedRun], key: str) -> Callable[[ListedRun], Any]:
    """Return a function that finds a run's value of a column, a metric or a setting.

    Args:
        listed: all runs.
        key: its name; of a metric or setting its last part is enough, where that is one's alone.

    Raises:
        Refused: no run has it.
    """
    if listed and key in listed[0].columns:
        return lambda one: one.columns[key]
    scores = dict.fromkeys(name for one in listed for name in one.scores)
    settings = dict.fromkeys(name for one in listed for name in one.settings)
    for names, separator in ((scores, "/"), (settings, ".")):
        ends = [name for name in names if name == key or name.endswith(f"{separator}{key}")]
        if key in ends or len(ends) == 1:
            name = key if key in ends else ends[0]
            is_score = names is scores
            return lambda one: (one.scores if is_score else one.settings).get(name)
        if ends:
            raise Refused([f"{key} is the end of {', '.join(ends)}; write one of them"])
    columns = listed[0].columns if listed else {}
    known = [*columns, *scores, *dict.fromkeys(key for one in listed for key in one.typed)]
    raise Refused([f"no run has {key}: {nearest(key, known)}, and all settings of a run"])


def choose(listed: Sequence[ListedRun], conditions: Sequence[str]) -> list[ListedRun]:
    """Return the runs that meet all conditions, each `KEY=VALUE` or `KEY=VALUE,VALUE`.

    Raises:
        Refused: a condition is none, or names what no run has.
    """
    chosen = list(listed)
    for condition in conditions:
        key, mark, wanted = condition.partition("=")
        if not mark or not key:
            raise Refused([f"--filter {condition}: write KEY=VALUE, such as state=failed"])
        value_of = find_value(listed, key)
        chosen = [one for one in chosen if _matches(value_of(one), wanted)]
    return chosen


def _matches(value: Any, wanted: str) -> bool:
    """Return whether a value is the wanted one, or one of several; patterns such as `lora*` too."""
    shown = "" if value is None else str(value)
    number = _number(shown)
    return any(
        fnmatchcase(shown, one) or shown == one or (number is not None and number == _number(one))
        for one in (wanted, *wanted.split(","))
    )


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def sort_runs(
    listed: Sequence[ListedRun], key: str | None, *, is_reversed: bool
) -> list[ListedRun]:
    """Return the runs in the order of a value, numbers by size; those without come last.

    Args:
        listed: the runs.
        key: as for `find_value`; None: the order in which they were started.
        is_reversed: from the highest to the lowest.

    Raises:
        Refused: no run has such a value.
    """
    if not listed:
        return []
    value_of = find_value(listed, key or "started")

    def place(one: ListedRun) -> tuple[bool, float, str]:
        value = value_of(one)
        number = _number(value)
        return number is None, math.inf if number is None else number, str(value)

    ordered = sorted(listed, key=lambda one: one.run.name)
    has_value = [one for one in ordered if value_of(one) is not None]
    without = [one for one in ordered if value_of(one) is None]
    return [*sorted(has_value, key=place, reverse=is_reversed), *without]


def find_shared(listed: Sequence[ListedRun]) -> dict[str, str]:
    """Return the typed settings that all of several runs have in common."""
    if len(listed) < 2:
        return {}
    first, *others = (set(one.typed.items()) for one in listed)
    shared = first.intersection(*others)
    return {key: value for key, value in listed[0].typed.items() if (key, value) in shared}


def render_list(listed: Sequence[ListedRun], width: int) -> Table:
    """Return a table of runs that fits so many characters, a column of numbers for each metric.

    Where they do not fit, names are shortened to ids first, and then columns are left out: metrics
    from the last to the second one, host, end, the first metric.
    """
    shared = find_shared(listed)
    keys = list(dict.fromkeys(k for one in listed for k in one.typed if k not in shared))
    labels = [one.label(keys) for one in listed]
    cells = _build_cells(listed)
    scores = [name for name in cells if name not in _FIXED]
    optional = [*reversed(scores[1:]), "host", "ended", *scores[:1]]
    if _room(cells, width) < _needed(labels):
        cells["run"] = shorten_names(cells["run"])
    while optional and _room(cells, width) < min(_needed(shorten_labels(labels)), LEAST_SETTINGS):
        cells.pop(optional.pop(0), None)
    if _room(cells, width) < _needed(labels):
        labels = shorten_labels(labels)
    return _build(cells, labels, right=(*NUMBERS, *map(_heading, scores)))


_FIXED = ("run", "state", "step", "loss", "worker", "host", "ended")


def _build_cells(listed: Sequence[ListedRun]) -> dict[str, list[str]]:
    """Return the cells of each column but the settings; of worker and others only where known."""
    rows = [_fixed_cells(one) for one in listed]
    cells = {name: [row[name] for row in rows] for name in _FIXED}
    cells = {name: texts for name, texts in cells.items() if name in ("run", "state") or any(texts)}
    for name in _order_metrics([one.scores for one in listed]):
        cells[name] = [show_score(one.scores[name]) if name in one.scores else "" for one in listed]
    return cells


def _fixed_cells(one: ListedRun) -> dict[str, str]:
    state, now = one.state, one.state.progress
    ended = datetime.fromtimestamp(state.ended) if state.ended else None
    return {
        "run": one.run.name,
        "state": state.state,
        "step": f"{now.step}/{now.max_steps}" if now.max_steps else "",
        "loss": "" if now.loss is None else f"{now.loss:.3f}",
        "worker": state.worker,
        "host": state.host,
        "ended": f"{ended:%m-%d %H:%M}" if ended else "",
    }


def _order_metrics(scores: Sequence[Mapping[str, float]]) -> list[str]:
    """Return each task's first metric, then each one's second, and so on."""
    numbers: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for one in scores for name in one):
        numbers.setdefault(MetricName.parse(name).task, []).append(name)
    found = [(place, name) for names in numbers.values() for place, name in enumerate(names)]
    return [name for _, name in sorted(found, key=lambda pair: pair[0])]


def _heading(name: str) -> str:
    """Return a column's heading: a metric stands below its task."""
    return "\n".join(name.rsplit("/", 1))


def _room(cells: Mapping[str, Sequence[str]], width: int) -> int:
    """Return the characters that are left for the settings."""
    return width - sum(_width(name, texts) + GAP for name, texts in cells.items())


def _width(name: str, texts: Sequence[str]) -> int:
    return max(cell_len(text) for text in (*_heading(name).split("\n"), *texts))


def _needed(labels: Sequence[str]) -> int:
    """Return the characters of the longest settings, or of their heading."""
    return max(map(cell_len, (*labels, "settings")), default=0)


def _build(
    cells: Mapping[str, Sequence[str]], labels: Sequence[str], right: Sequence[str]
) -> Table:
    """Return the table, its settings before the metrics; only they are broken into lines."""
    fixed = [name for name in cells if name in _FIXED]
    metrics = [name for name in cells if name not in _FIXED]
    settings = ["settings"] if any(labels) else []
    table = build_table(*fixed, *settings, *map(_heading, metrics), right=right)
    for column, name in zip(table.columns, [*fixed, *settings, *metrics], strict=True):
        column.no_wrap = name != "settings"
    for number, label in enumerate(labels):
        before = [cells[name][number] for name in fixed]
        after = [cells[name][number] for name in metrics]
        add_row(table, *before, *([label] if settings else []), *after)
    return table
