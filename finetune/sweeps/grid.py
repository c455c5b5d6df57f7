"""Compose the jobs of a grid with Hydra, from the command line or the Python API."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.types import RunMode
from hydra.version import VersionBase, setbase
from omegaconf import DictConfig, OmegaConf

from finetune.config.command_line import find_settings_typed_twice
from finetune.config.composition import (
    AS_A_SWEEP,
    COMPOSING_ERRORS,
    config_dir_of,
    explain,
    find_grid_problems,
)
from finetune.config.grammar import rewrite, without_null
from finetune.config.hydra_launchers import find_composed_problem
from finetune.config.overrides import find_override_problems, with_grid
from finetune.config.paths import conf_dir
from finetune.config.resolvers import OPERATORS, resolvers_put_back
from finetune.config.schema import register
from finetune.pipeline.jobs import Job
from finetune.problems import Refused
from finetune.sweeps.planning import build_job, sweep_name
from finetune.sweeps.points import PointComposer

# Hydra's global state of a process.
STATE = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)
HYDRA_RESOLVERS = ("now", "hydra", "python_version")
COMPOSING = threading.Lock()  # all threads share that state


@dataclass(frozen=True)
class Grid:
    """The jobs of a grid, the overrides that make them, and the sweep's name."""

    jobs: list[Job]
    arguments: list[str]
    name: str
    again: list[str]  # arguments of the command that does the same


def build_jobs(
    loader: ConfigLoader,
    config: DictConfig,
    arguments: Sequence[str],
    *,
    begin: Callable[[int], object] = lambda num_jobs: None,
) -> tuple[list[Job], list[str]]:
    """Compose every point of a grid, in Hydra's order.

    Args:
        loader: Hydra's, of config groups.
        config: composed without the swept settings.
        arguments: the overrides as typed.
        begin: called with the number of points, before they are composed.

    Returns:
        The jobs, and the overrides, those of a grid in a config file included.

    Raises:
        Refused: an installed package's config chooses one of Hydra's launchers.
    """
    problem = find_composed_problem(config.hydra)
    if problem is not None:
        raise Refused([problem])
    params: Any = OmegaConf.to_container(config.hydra.sweeper.params, resolve=False)
    arguments = with_grid(params, arguments, config_dir_of(config.hydra))
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    last = {override.key_or_group: override for override in overrides}  # of a key typed twice
    swept = [key for key, override in last.items() if override.is_sweep_override()]
    composer, jobs = PointComposer(loader, config), []
    points = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    begin(len(points))
    for point in points:
        composed = composer.compose(without_null(point))
        HydraConfig.instance().set_config(composed)
        jobs.append(build_job(composed, swept=swept))
    return jobs, arguments


def compose_grid(overrides: Sequence[str], config_dir: str | None, *, is_sweep: bool) -> Grid:
    """Check and compose the overrides of a Python call, as the command does typed ones.

    Args:
        overrides: such as `lora.r=4,16`.
        config_dir: a folder of the user's own config groups, if any.
        is_sweep: whether several values of a setting are a grid.

    Raises:
        Refused: they have problems.
    """
    with _hydra_set_aside():
        register()
        try:
            arguments = _checked(overrides, config_dir, is_sweep=is_sweep)
            return _compose(arguments, config_dir, is_sweep=is_sweep)
        except Refused as refused:
            called = [p.replace(AS_A_SWEEP, "call finetune.sweep") for p in refused.problems]
            raise Refused(called) from None
        except COMPOSING_ERRORS as error:
            raise Refused(explain(error, overrides, config_dir)) from None


@contextmanager
def _hydra_set_aside() -> Iterator[None]:
    """Reset Hydra's global state for a block, and restore the caller's afterwards."""
    with COMPOSING:
        kept = {kind: Singleton._instances.pop(kind, None) for kind in STATE}
        store = ConfigStore.instance()
        stored, store.repo = store.repo, dict(store.repo)  # the caller's may have a schema too
        setbase("1.3")
        try:
            with resolvers_put_back([*OPERATORS, *HYDRA_RESOLVERS]):
                yield
        finally:
            store.repo = stored
            for kind, instance in kept.items():
                Singleton._instances.pop(kind, None)
                if instance is not None:
                    Singleton._instances[kind] = instance


def _checked(overrides: Sequence[str], config_dir: str | None, *, is_sweep: bool) -> list[str]:
    """Return overrides in Hydra's grammar.

    Raises:
        Refused: they have problems.
    """
    problems = [
        f"{one!r} is no override; give each as text, 'KEY=VALUE'"
        if not isinstance(one, str)
        else f"{one} is a flag of the command; leave it out"
        for one in overrides
        if not isinstance(one, str) or one.startswith("-")
    ]
    problems = problems or [*find_settings_typed_twice(overrides)]
    if problems:
        raise Refused(problems)
    arguments = without_null([rewrite(one) for one in overrides])
    problems = find_override_problems(arguments, multirun=is_sweep, config_dir=config_dir)
    if problems:
        raise Refused(problems)
    return arguments


def _compose(arguments: list[str], config_dir: str | None, *, is_sweep: bool) -> Grid:
    search_path = create_config_search_path(str(conf_dir()))
    if config_dir is not None:
        folder = f"file://{os.path.abspath(config_dir)}"
        search_path.prepend("command-line", folder, anchor="schema")  # as for --config-dir
    loader = ConfigLoaderImpl(config_search_path=search_path)
    Hydra("finetune", loader)  # its resolvers
    mode = RunMode.MULTIRUN if is_sweep else RunMode.RUN
    config = loader.load_configuration("config", arguments, run_mode=mode)
    if is_sweep:
        typed: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        jobs, arguments = build_jobs(loader, config, typed)
    else:
        HydraConfig.instance().set_config(config)
        if problems := find_grid_problems(config.hydra):
            raise Refused(problems)
        jobs = [build_job(config, swept=[])]
        arguments = jobs[0].overrides
    flags = [] if config_dir is None else ["--config-dir", os.path.abspath(config_dir)]
    again = [*arguments, *flags, *(["--multirun"] if is_sweep else [])]
    return Grid(jobs, arguments, sweep_name(jobs, arguments), again)
