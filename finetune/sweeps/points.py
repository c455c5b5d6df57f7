"""Compose the points of a grid: by Hydra once for each choice of options, and settings on a copy.

Hydra reads and merges all config files anew for each point. Which files these are depends on the
overrides of config groups only; all other overrides are applied to the composed config, here by
Hydra's own function. A point that cannot be composed like this is composed by Hydra itself, which
then also says what is wrong with it.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from finetune.config.composition import COMPOSING_ERRORS

# Of a plugin's own classes, those that are defined within a function, say.
PICKLING_ERRORS = (pickle.PicklingError, AttributeError, TypeError)


class PointComposer:
    """Compose the points of one grid; each gets a config of its own."""

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        """Keep what all points share.

        Args:
            loader: Hydra's, of config groups.
            config: composed without the swept settings.
        """
        self._loader = loader
        self._config = config
        self._parser = OverridesParser.create()
        self._repository = self._find_repository()
        self._parsed: dict[str, tuple[Override, bool]] = {}  # and whether it chooses an option
        self._composed: dict[tuple[str, ...], bytes] = {}  # by the options, a pickled config

    def compose(self, point: Sequence[str]) -> DictConfig:
        """Return what `load_sweep_config` returns for a point's overrides."""
        try:
            return self._compose(point)
        except (*COMPOSING_ERRORS, *PICKLING_ERRORS):
            return self._loader.load_sweep_config(self._config, list(point))

    def _compose(self, point: Sequence[str]) -> DictConfig:
        overrides = [self._parse(text) for text in point]
        if any(one.is_hydra_override() or one.is_sweep_override() for one, _ in overrides):
            raise ValueError("only Hydra knows their place among the others")
        options = tuple(
            text for text, (_, is_option) in zip(point, overrides, strict=True) if is_option
        )
        if options not in self._composed:
            chosen = self._loader.load_sweep_config(self._config, list(options))
            self._composed[options] = pickle.dumps(chosen)
        composed: DictConfig = pickle.loads(self._composed[options])  # noqa: S301  # made here
        settings = [one for one, is_option in overrides if not is_option]
        ConfigLoaderImpl._apply_overrides_to_config(settings, composed)
        _describe_job(composed, [one for one, _ in overrides])
        return composed

    def _parse(self, text: str) -> tuple[Override, bool]:
        if text not in self._parsed:
            (override,) = self._parser.parse_overrides([text])
            is_setting = bool(Overrides(self._repository, [override]).config_overrides)
            self._parsed[text] = override, not is_setting
        return self._parsed[text]

    def _find_repository(self) -> IConfigRepository:
        """Return the config files that Hydra looks options up in, those of its search path too."""
        assert isinstance(self._loader, ConfigLoaderImpl)
        hydra: Any = self._config.hydra
        typed: Any = OmegaConf.to_container(hydra.overrides.hydra)
        name = hydra.job.config_name
        return self._loader._parse_overrides_and_create_caching_repo(name, typed)[1]


def _describe_job(composed: DictConfig, overrides: list[Override]) -> None:
    """Put the job's overrides where Hydra keeps them."""
    hydra: Any = composed.hydra
    typed = hydra.overrides.task
    typed.clear()
    typed.extend([one.input_line for one in overrides])
    style = hydra.job.config.override_dirname
    hydra.job.override_dirname = get_overrides_dirname(
        overrides=overrides,
        kv_sep=style.kv_sep,
        item_sep=style.item_sep,
        exclude_keys=style.exclude_keys,
    )
