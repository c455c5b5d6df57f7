"""Return types of the Python API: `Run` and `Results`, read from files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from finetune.config.schema import Config
from finetune.escaping import for_terminal
from finetune.reporting.end_tables import render_end
from finetune.reporting.results import Results as SweepResults
from finetune.reporting.rows import list_columns
from finetune.reporting.tables import WIDTH_OF_A_FILE
from finetune.reporting.verdict import verdict
from finetune.statistics.comparison import Comparison
from finetune.statistics.metric_names import STDERR
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.score_files import ModelScore

if TYPE_CHECKING:
    from pandas import DataFrame

PENDING = "pending"  # the status of a run that has not begun, as in results.csv


@dataclass(frozen=True)
class Run:
    """One run, read from its folder at each access.

    Examples:
        >>> run = finetune.open_run("outputs/tiny-demo-lora-r4-1f0c8a52d7e9")
        >>> run.status
        'finished'
        >>> run.metric("train/loss")[1]
        4.87
    """

    path: Path
    """The run's folder, absolute."""

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, status={self.status!r})"

    @property
    def name(self) -> str:
        """The folder's name, as in the column `run` of results.csv."""
        return self.path.name

    @property
    def status(self) -> str:
        """`pending`, `running`, `finished`, `failed`, `interrupted` or `diverged`."""
        status = self._folder.status()
        return status.state if status else PENDING

    @property
    def reason(self) -> str | None:
        """The cause where it failed, diverged or was interrupted; None otherwise."""
        status = self._folder.status()
        return status.reason if status else None

    @property
    def config(self) -> Config:
        """The settings that it was composed of, interpolations resolved.

        Raises:
            Refused: its config.yaml is missing or damaged.
        """
        return self._folder.read_config()

    @property
    def overrides(self) -> list[str]:
        """The overrides of the run, such as `["model=tiny", "lora.r=4"]`."""
        return self._folder.read_overrides()

    @property
    def adapter(self) -> Path | None:
        """The folder of its adapter, or model of `peft.method=full`; None before it is trained."""
        folders = (self._folder.adapter, self._folder.model)
        return next((one for one in folders if one.is_dir()), None)

    def metric(self, key: str) -> dict[int, float]:
        """Return a metric by step, e.g. `train/loss` (nats a token) or `validation/loss`.

        Empty where the run has none of that name.
        """
        return {one.step: one.value for one in self._folder.metric(key)}

    def scores(self, *, base: bool = False) -> dict[str, dict[str, float]]:
        """Return the scores by task and metric: `{"arc_easy": {"acc": 0.71, "acc_stderr": ...}}`.

        Args:
            base: return those of the base model instead of the tuned one's.
        """
        side = "base" if base else "tuned"
        found = {task: self._folder.read_scores(task) for task in self._folder.scored_tasks()}
        return {
            task: _numbers(one.sides[side])
            for task, one in found.items()
            if one is not None and side in one.sides
        }

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(self.path)


def _numbers(side: ModelScore) -> dict[str, float]:
    """Return a model's metrics, each followed by its standard error where lm-eval names one."""
    found: dict[str, float] = {}
    for name, score in side.metrics.items():
        found[name] = score.value
        if isinstance(score.stderr, int | float):
            found[f"{name}{STDERR}"] = score.stderr
    return found


@dataclass(frozen=True, repr=False)
class Results:
    """The results of a sweep. A notebook shows them as a table.

    Examples:
        >>> results = finetune.sweep("model=tiny", "lora.r=2,4", "evaluation.limit=8")
        >>> results.best.overrides
        ['model=tiny', 'lora.r=4', 'evaluation.limit=8']
        >>> results.to_frame()[["lora.r", "status", "demo_science/acc"]]
    """

    path: Path
    """The sweep's folder, absolute, with report.html and results.csv."""

    runs: list[Run]
    """One a row, in the grid's order."""

    rows: list[dict[str, Any]]
    """One dict a run, keyed by the columns of results.csv; what a run lacks is None or absent."""

    best: Run | None
    """The run with the best main metric, chosen on `evaluation.select_split` where that is set;
    without scores the one with the lowest validation loss. None where no run is ranked."""

    comparisons: dict[str, Comparison]
    """By `task/metric`: each run against the base on the same questions. `differences[run.name]`
    has value, low and high (95 %), p, and p_adjusted for the number of runs."""

    verdict: str
    """The report's conclusion: the best run, and whether it is significantly better."""

    text: str
    """The table and the verdict, as the command prints them."""

    def to_frame(self) -> DataFrame:
        """Return the rows as a pandas DataFrame, its columns as in results.csv.

        Swept settings that are numbers are numbers there.
        """
        import pandas

        frame = pandas.DataFrame(self.rows, columns=list_columns(self.rows))
        for name in frame.columns[frame.dtypes != "float64"]:
            numbers = pandas.to_numeric(frame[name], errors="coerce")
            if numbers.notna().any() and numbers.notna().equals(frame[name].notna()):
                frame[name] = numbers
        return frame

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        console = Console(record=True, file=io.StringIO(), width=WIDTH_OF_A_FILE)
        console.print(self.text, markup=False, highlight=False)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def view_results(found: SweepResults) -> Results:
    """Return the public view of a sweep's results."""
    runs = {one.name: Run(one.path.resolve()) for one in found.runs}
    best = found.best_run()
    said = for_terminal(verdict(found)) if best is not None or found.metrics else ""
    console = Console(file=io.StringIO(), width=WIDTH_OF_A_FILE)
    with console.capture() as table:
        console.print(render_end(found, WIDTH_OF_A_FILE))
    return Results(
        path=found.folder.resolve(),
        runs=[runs[one.name] for one in found.runs],
        rows=found.rows,
        best=None if best is None else runs[best],
        comparisons={str(metric): one for metric, one in found.comparisons.items()},
        verdict=said,
        text=f"{table.get()}\n{said}".rstrip(),
    )
