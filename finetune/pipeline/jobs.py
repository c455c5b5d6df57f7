"""A job, one point of a grid as composed, and what checking it found; both travel to the worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.config.inputs import Inputs
from finetune.config.schema import Config
from finetune.training.grouping import NOT_TRAINED, Limit


@dataclass(frozen=True)
class Job:
    """One point of the grid, as composed; `swept` maps each swept key to its value here.

    Once it is planned, its inputs travel with it: a run is made from what planning found, in the
    folder that planning named.
    """

    config: Config
    yaml: str  # unresolved, so that secrets stay interpolations
    overrides: list[str]
    swept: dict[str, str]
    inputs: Inputs | None = None


@dataclass(frozen=True)
class CheckedJob:
    """What preflight found of a job: its inputs, with its run's folder, or why it cannot run."""

    inputs: Inputs | None
    problems: list[str]
    finished: bool = False  # whether it has all that is asked for
    limit: Limit = NOT_TRAINED  # of the runs that share its step
    forecasts: Sequence[str] = ()  # one line a task that is still to be scored
