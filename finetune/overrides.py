"""What is typed on the command line, checked against the schema before Hydra composes it.

Hydra stops at the first wrong override and, for an unknown key, advises a `+` that would slip past
the schema. Here every override is looked at by itself, so that all problems show at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.config import (
    Config,
    Refused,
    SourceConfig,
    build_config,
    conf_dir,
    nearest,
)
from finetune.foreign_configs import find_foreign_problems
from finetune.hydra_overrides import (
    SEARCHPATH,
    find_hydra_problems,
    is_hydra,
    searched_folders,
)
from finetune.ranges import find_problems

OPEN_MAPPINGS = ("evaluation.data_files.", "data.columns.")
MIX = "data.mix."  # its sources' settings are known by number: data.mix.0.weight=2


def find_override_problems(
    arguments: Sequence[str], *, multirun: bool, config_dir: str | None = None
) -> list[str]:
    """Return what is wrong with the overrides, one line each with its remedy.

    Args:
        arguments: overrides as typed, e.g. `lora.r=4,16`.
        multirun: whether comma-separated values are a sweep.
        config_dir: the user's own folder of config groups (`--config-dir`), if any.
    """
    own = [Path(config_dir)] if config_dir else []
    foreign = [
        f"--config-dir {folder}: there is no such folder" for folder in own if not folder.is_dir()
    ]
    own += searched_folders(arguments)
    for folder in filter(Path.is_dir, own):
        foreign += find_foreign_problems(folder, _chosen(arguments))
    if foreign:
        return foreign  # nothing of it may be composed
    folders = [conf_dir(), *filter(Path.is_dir, own)]
    has_packages = any(f"{SEARCHPATH}=" in a and "pkg://" in a for a in arguments)
    problems: list[str] = []
    sound: list[Override] = []
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except (HydraException, ValueError) as error:  # ValueError: a number of 5,000 digits
            problems.append(f"{argument}: {first_line(error)}")
            continue
        found = list(_problems_of(override, folders, elsewhere=has_packages))
        if not found and override.is_sweep_override() and not multirun:
            found = [
                f"{argument}: several values are a sweep; add --multirun (or [a,b] for a list)"
            ]
        problems += found
        if not found:
            sound.append(override)
    return problems + _range_problems(sound, config_dir) if problems else []


def _chosen(arguments: Sequence[str]) -> set[str]:
    """Return the options that are typed, as GROUP/OPTION; those of a grid too."""
    typed = (argument.lstrip("+").partition("=") for argument in arguments)
    return {f"{key}/{value.strip()}" for key, _, values in typed for value in values.split(",")}


def first_line(error: Exception) -> str:
    """Return what an error of Hydra or OmegaConf says, without its trailing key dump."""
    return str(error).strip().split("\n")[0]


def _problems_of(override: Override, folders: list[Path], *, elsewhere: bool) -> Iterator[str]:
    key = override.key_or_group
    foreign = list(find_hydra_problems(override))
    if foreign or is_hydra(override):
        yield from foreign
        return
    groups = sorted({p.name for f in folders for p in f.iterdir() if p.is_dir()} - {"hydra"})
    typed = override.input_line
    is_open = key.startswith(OPEN_MAPPINGS) or re.match(r"data\.mix\.\d+\.columns\.", key)
    if (override.is_add() or override.is_force_add()) and not is_open:
        where = " and ".join(name.rstrip(".") for name in OPEN_MAPPINGS)
        yield f"{typed}: + is for new keys below {where} only; leave it out"
    elif override.is_delete():
        return
    elif key in groups:
        if not elsewhere:
            yield from _option_problems(override, key, folders)
    elif key.startswith(MIX) and not is_open:
        yield from _mix_problems(override)
    elif not is_open:
        yield from _key_problems(override, groups)
    elif key.startswith("evaluation.data_files.") and not override.is_add():
        yield f"{typed}: write +{typed}, since tasks and splits are not settings of their own"


def _option_problems(override: Override, group: str, folders: list[Path]) -> Iterator[str]:
    options = sorted({p.stem for f in folders for p in (f / group).glob("*.yaml")})
    for value in _values(override):
        if value is not None and not isinstance(value, Glob) and str(value) not in options:
            yield f"{group}={value}: there is no such option; {nearest(value, options)}"


def _key_problems(override: Override, groups: list[str]) -> Iterator[str]:
    key = override.key_or_group
    known = list(_known_keys(Config))
    if key not in known:
        section = [k for k in known if k.startswith(key.partition(".")[0] + ".")]
        top = sorted({*groups, *(k.partition(".")[0] for k in known)})
        yield f"{key} is not a setting; {nearest(key, section or top)}"
        return
    for value in _values(override):
        try:
            OmegaConf.update(OmegaConf.structured(Config), key, value)
        except OmegaConfBaseException as error:
            yield f"{key}={value}: {first_line(error)}"


def _mix_problems(override: Override) -> Iterator[str]:
    key = override.key_or_group
    number, _, name = key.removeprefix(MIX).partition(".")
    known = [item.name for item in fields(SourceConfig)]
    if not number.isdigit() or name.partition(".")[0] not in known:
        yield f"{key} is not a setting of data.mix.{number}; {nearest(name, known)}"
        return
    for value in _values(override):
        try:
            OmegaConf.update(OmegaConf.structured(SourceConfig), name, value)
        except OmegaConfBaseException as error:
            yield f"{key}={value}: {first_line(error)}"


def _values(override: Override) -> list[object]:
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


def _known_keys(schema: type) -> Iterator[str]:
    """Yield the dotted names of all settings, sections left out."""
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            assert isinstance(kind, type)
            yield from (f"{name}.{key.name}" for key in fields(kind))
        else:
            yield name


def _range_problems(overrides: list[Override], config_dir: str | None) -> list[str]:
    """Compose what is sound, each swept value once, for problems that only ranges show."""
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    swept = [
        f"{o.get_key_element()}={value}"
        for o in overrides
        if o.is_discrete_sweep()
        for value in o.sweep_string_iterator()
    ]
    searched = [f"hydra.searchpath=[{Path(config_dir).resolve()}]"] if config_dir else []
    problems: dict[str, None] = {}
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for one in [None, *swept]:
            chosen = [*fixed, *searched, *([one] if one else [])]
            try:
                found = find_problems(build_config(compose("config", chosen)))
            except Refused as refused:
                found = refused.problems
            except (HydraException, OmegaConfBaseException) as error:
                found = [first_line(error)]
            problems.update(dict.fromkeys(found))
    return list(problems)
