"""Table of costs: seconds, tokens a second, memory, energy and losses of each run, and their sums.

A run's training seconds are kept in its checkpoints, so that one which was killed and resumed
counts each step once, and neither its pauses nor steps that were repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.reporting.results import Results
from finetune.reporting.rows import ENERGY, MEAN_LOSS, Row
from finetune.reporting.score_tables import Cell, ScoreTable
from finetune.statistics.objective import VALIDATION

COLUMNS = {
    "training, s": "train_seconds", "evaluation, s": "evaluation_seconds",
    "tokens/s": "tokens_per_second", "peak memory, GiB": "peak_memory_gib",
    "energy, Wh": ENERGY, "trainable parameters": "num_trainable_parameters",
    "mean loss": MEAN_LOSS, "last loss": "train/loss", "validation loss": VALIDATION,
}  # fmt: skip


def build_costs(results: Results) -> ScoreTable:
    """Return the table of costs; validation loss and energy have a column where any run has one."""
    unknown = [] if results.validated_rows() else [VALIDATION]
    unknown += [] if any(row.get(ENERGY) for row in results.rows) else [ENERGY]
    columns = {name: key for name, key in COLUMNS.items() if key not in unknown}
    rows = [
        [Cell(results.label(row)), Cell(row["status"]),
         *(Cell(show_number(row.get(key))) for key in columns.values())]
        for row in results.rows
    ]  # fmt: skip
    return ScoreTable("Cost", ["run", "status", *columns], rows, list(_notes(results)))


def _notes(results: Results) -> Iterator[str]:
    trained, scored = (_sum(results.rows, key) for key in ("train_seconds", "evaluation_seconds"))
    bases = _base_seconds(results)
    parts = [(trained, "training"), (scored, "scoring the tuned models"), (bases, "the base")]
    shown = [f"{show_duration(seconds)} {what}" for seconds, what in parts if seconds]
    if energy := _sum(results.rows, ENERGY):
        shown.append(f"{energy:,.4g} Wh of GPUs in training")
    if shown:
        yield f"In all: {', '.join(shown)}. Steps before an interruption are counted once."


def _sum(rows: list[Row], key: str) -> float:
    return float(sum(row.get(key) or 0.0 for row in rows))


def _base_seconds(results: Results) -> float:
    """Return the seconds of scoring the base: once for all runs that share the score."""
    bases = {
        (task, scores.base.seconds)
        for found in results.scores
        for task, scores in found.items()
        if scores is not None and scores.base is not None
    }
    return sum(seconds for _, seconds in bases)


def show_duration(seconds: float) -> str:
    """Return a time as `35 s`, `12 min` or `3 h 20 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def show_number(value: Any) -> str:
    """Return a number with four digits, or a whole number with all of them; empty for none."""
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
