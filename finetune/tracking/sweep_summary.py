"""The summary of a sweep that MLflow shows: best run, verdict, totals, and its base as a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

Numbers = dict[str, float]


@dataclass(frozen=True)
class BaseRun:
    """A base model's scores, shown as a run beside those that were tuned."""

    scores: Numbers = field(default_factory=dict)  # by task/metric, as those of a tuned model
    params: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # that its scoring took


@dataclass(frozen=True)
class SweepSummary:
    """What is known of a sweep beyond the events of its runs; empty until a run is scored."""

    champion: str | None = None  # the best run
    metrics: list[str] = field(default_factory=list)  # of the saved view, sorted by the first
    lowest_first: bool = False  # lower is better in the first of them
    note: str = ""  # the description of the sweep's MLflow run, in Markdown
    values: Numbers = field(default_factory=dict)  # metrics of the sweep's MLflow run
    tags: dict[str, str] = field(default_factory=dict)  # of the sweep's MLflow run
    runs: dict[str, Numbers] = field(default_factory=dict)  # costs and differences, by run
    bases: dict[str, BaseRun] = field(default_factory=dict)  # by the name of the MLflow run

    @classmethod
    def parse(cls, stored: Mapping[str, Any]) -> SweepSummary:
        """Return a stored summary.

        Raises:
            TypeError: it has other fields, or values of wrong types.
        """
        bases = {name: BaseRun(**one) for name, one in dict(stored.get("bases", {})).items()}
        summary = cls(**{**stored, "bases": bases})
        if not summary.is_sound():
            raise TypeError("its values have wrong types")
        return summary

    def is_sound(self) -> bool:
        """Return whether every field has its type."""
        empty = SweepSummary()
        return (
            isinstance(self.champion, str | None)
            and all(
                isinstance(getattr(self, one.name), type(getattr(empty, one.name)))
                for one in fields(self)
                if one.name != "champion"
            )
            and all(isinstance(metric, str) for metric in self.metrics)
            and all(isinstance(text, str) for text in self.tags.values())
            and all(_are_numbers(values) for values in (self.values, *self.runs.values()))
            and all(_are_numbers(base.scores) for base in self.bases.values())
        )


def _are_numbers(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(one, int | float) for one in values.values())
