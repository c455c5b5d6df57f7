"""Jobs: a composed point of the grid, and the result of its checks; both go to the worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.config.inputs import Inputs
from finetune.config.schema import Config
from finetune.training.grouping import NOT_TRAINED, Limit


@dataclass(frozen=True)
class Job:
    """One point of the grid, as composed; `swept` maps each swept key to its value here.

    Once it is planned, its inputs go with it: the run uses the inputs and the folder that planning
    found.
    """

    config: Config
    yaml: str  # unresolved, so that secrets stay interpolations
    overrides: list[str]
    swept: dict[str, str]
    inputs: Inputs | None = None


@dataclass(frozen=True)
class CheckedJob:
    """The result of a job's preflight: its inputs and the run's folder, or why it cannot run."""

    inputs: Inputs | None
    problems: list[str]
    finished: bool = False  # whether all that is asked for is there already
    limit: Limit = NOT_TRAINED  # of the runs that are trained together with it
    forecasts: Sequence[str] = ()  # one line a task that is still to be scored
    base_scores: tuple[str, ...] = ()  # files of the base's scores that are not there yet
    base: str = ""  # a digest of the base that a worker loads for it
    rows: float = 0.0  # that it trains on, about; each epoch's count
    row_seconds: float | None = None  # to train on one; None: not known
