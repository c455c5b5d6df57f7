"""A metric's name as `task/metric`, and the columns of results.csv that are made from it."""

from __future__ import annotations

from dataclasses import dataclass

STDERR = "_stderr"  # ends lm-eval's name of a metric's standard error


@dataclass(frozen=True)
class MetricName:
    """A metric of a task; its text, `task/metric`, names it in tables, events and MLflow.

    >>> MetricName.parse("arc_easy/acc").base
    'arc_easy/base_acc'
    """

    task: str
    name: str  # lm-eval's, with a filter's name behind it

    @classmethod
    def parse(cls, text: str) -> MetricName:
        """Return the metric that a text names: a task's name may have slashes, a metric's none."""
        task, slash, name = text.rpartition("/")
        assert slash, f"{text} is no task/metric"
        return cls(task, name)

    def __str__(self) -> str:
        return f"{self.task}/{self.name}"

    @property
    def base(self) -> str:
        """The base's score."""
        return f"{self.task}/base_{self.name}"

    @property
    def selection(self) -> str:
        """The score on the questions that choose the best run."""
        return f"{self.task}/select_{self.name}"

    @property
    def stderr(self) -> str:
        """The tuned model's standard error."""
        return f"{self}{STDERR}"

    @property
    def difference(self) -> str:
        """Tuned minus base; its interval's ends are named after it."""
        return f"{self}_diff"

    @property
    def p(self) -> str:
        """The unadjusted p of the difference."""
        return f"{self}_p"

    @property
    def p_adjusted(self) -> str:
        """The p of the difference, adjusted for the number of runs of the grid."""
        return f"{self}_p_adjusted"
