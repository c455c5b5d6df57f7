"""Hydra sweeper plugin for `--multirun`: compose every point of the grid, run them as one sweep."""

# No `from __future__ import annotations` here: Hydra runs this file without naming it in
# sys.modules, where the dataclass decorator would look up annotations that are text.

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class FinetuneSweeperConf:
    """The settings of `hydra/sweeper=finetune`: a grid; the sweep's are under `sweep`."""

    _target_: str = "hydra_plugins.finetune_sweeper.FinetuneSweeper"
    params: dict[str, Any] = field(
        default_factory=dict
    )  # setting -> values, as typed: {lora.r: "4,8"}


ConfigStore.instance().store(
    group="hydra/sweeper", name="finetune", node=FinetuneSweeperConf, provider="finetune"
)


class FinetuneSweeper(Sweeper):
    """Take the product of all swept values, in Hydra's order, as one sweep."""

    def __init__(self, params: Mapping[str, Any] | None = None) -> None:
        pass  # Hydra has resolved them: ${lora.r} would be the same in every job

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def sweep(self, arguments: Sequence[str]) -> None:
        """Run the grid; ends the process with the sweep's exit code."""
        from finetune.sweeps.grid import build_jobs
        from finetune.sweeps.planning import announce

        assert self.hydra_context is not None
        assert self.config is not None
        loader = self.hydra_context.config_loader
        jobs, arguments = build_jobs(loader, self.config, arguments, begin=announce)
        from finetune.sweeps.run_sweep import run_sweep

        raise SystemExit(run_sweep(jobs, arguments, sys.argv[1:]))
