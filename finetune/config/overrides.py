"""Check command-line overrides against the schema, before Hydra composes them.

Hydra stops at the first wrong override and, for an unknown key, suggests a `+` that would bypass
the schema. Here every override is checked by itself, so that all problems are listed at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Glob, Override, QuotedString
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.commands import find_word_problem
from finetune.config.composition import AS_A_SWEEP, COMPOSING_ERRORS, explain, find_value_problems
from finetune.config.foreign_configs import find_foreign_problems
from finetune.config.grammar import (
    NO_EXPERIMENT,
    grid_arguments,
    key_of,
    parse,
    rewrite,
    without_null,
)
from finetune.config.hydra_overrides import (
    SEARCHPATH,
    find_hydra_problems,
    is_hydra,
    searched_folders,
)
from finetune.config.paths import conf_dir
from finetune.config.rules import find_problems
from finetune.config.schema import Config, SourceConfig, build_config, default_settings, register
from finetune.config.yaml_files import describe_kind
from finetune.problems import Refused, first_line, nearest

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
        f"--config-dir {folder}: is a file, not a folder; name the folder of experiment/ or lora/"
        if folder.exists()
        else f"--config-dir {folder}: there is no such folder"
        for folder in own
        if not folder.is_dir()
    ]
    own += searched_folders(arguments)
    for folder in filter(Path.is_dir, own):
        foreign += find_foreign_problems(folder, _chosen(arguments))
    if foreign:
        return foreign  # nothing of it may be composed
    folders = [conf_dir(), *filter(Path.is_dir, own)]
    has_packages = any(f"{SEARCHPATH}=" in a and "pkg://" in a for a in arguments)
    problems = find_value_problems(arguments, config_dir)
    sound: list[Override] = []
    for argument in arguments:
        try:
            override = parse(argument)
        except ValueError as error:
            problems.append(_unread(argument, error))
            continue
        found = list(_problems_of(override, folders, elsewhere=has_packages))
        if not found and override.is_sweep_override() and not multirun:
            found = [f"{argument}: several values are a sweep; {AS_A_SWEEP} (or [a,b] for a list)"]
        problems += found
        if not found:
            sound.append(override)
    if not problems:
        return []
    wrong = {key_of(argument) for argument in arguments} - {o.key_or_group for o in sound}
    ranges = _range_problems(sound, folders, config_dir)
    # A setting whose value is wrong as typed has none there.
    return problems + [one for one in ranges if one.split(" ")[0] not in wrong]


def _chosen(arguments: Sequence[str]) -> set[str]:
    """Return the options that are typed, as GROUP/OPTION; those of a grid too."""
    typed = (argument.lstrip("+").partition("=") for argument in arguments)
    return {f"{key}/{value.strip()}" for key, _, values in typed for value in values.split(",")}


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
        if not is_open:
            yield _undeleted(key, groups, folders)
    elif override.is_interval_sweep():
        yield (
            f"{typed}: an interval has no values to run one by one; list them, as a,b,c, or as "
            "range(START,STOP,STEP)"
        )
    elif key in groups:
        if not elsewhere:
            yield from _option_problems(override, key, folders)
    elif key.startswith(MIX) and not is_open:
        yield from _mix_problems(override)
    elif not is_open:
        yield from _key_problems(override, groups)
    elif key.startswith("evaluation.data_files.") and not override.is_add():
        yield f"{typed}: write +{typed}, since tasks and splits are not keys of the schema"


def _option_problems(override: Override, group: str, folders: list[Path]) -> Iterator[str]:
    options = _options(group, folders)
    if _glob(override) is not None:
        if not _strings(override, folders):
            yield f"{override.input_line}: no option matches; known: {', '.join(options)}"
        return
    for value in _values(override):
        if value == []:
            yield f"{group}=[] names no option; write {group}=OPTION, or leave it out"
        if isinstance(value, dict):
            typed = " ".join(f"{group}.{key}={one}" for key, one in value.items())
            yield f"{override.input_line} names no option; set {typed}"
            continue
        for option in value if isinstance(value, list) else [value]:
            shown = "null" if option is None else str(option)
            if shown not in options and f"{group}={shown}" != NO_EXPERIMENT:
                yield f"{group}={shown}: there is no such option; {nearest(shown, options)}"


def _options(group: str, folders: list[Path]) -> list[str]:
    return sorted({p.stem for f in folders for p in (f / group).glob("*.yaml")})


def _key_problems(override: Override, groups: list[str]) -> Iterator[str]:
    key = override.key_or_group
    known = list(_kinds(Config))
    if key not in known:
        section = [k for k in known if k.startswith(key.partition(".")[0] + ".")]
        top = sorted({*groups, *(k.partition(".")[0] for k in known)})
        yield f"{key} is not a setting; {nearest(key, section or top)}"
        return
    if _glob(override) is not None:
        yield f"{override.input_line}: glob() chooses options of a group, and {key} is a setting"
        return
    for value in _values(override):
        try:
            OmegaConf.update(default_settings(), key, value)
        except OmegaConfBaseException as error:
            takes = describe_kind(_kinds(Config)[key])
            yield f"{key}={value}: {first_line(error)}; it takes {takes}"


def _mix_problems(override: Override) -> Iterator[str]:
    key = override.key_or_group
    number, _, name = key.removeprefix(MIX).partition(".")
    known = [item.name for item in fields(SourceConfig)]
    if not number.isdigit() or name.partition(".")[0] not in known:
        yield f"{key} is not a setting of data.mix.{number}; {nearest(name, known)}"
        return
    for value in _values(override):
        try:
            OmegaConf.update(default_settings(SourceConfig), name, value)
        except OmegaConfBaseException as error:
            yield f"{key}={value}: {first_line(error)}"


def _values(override: Override) -> list[object]:
    if not override.is_sweep_override():
        return [override.value()]
    return [v.text if isinstance(v, QuotedString) else v for v in override.sweep_iterator()]


def _strings(override: Override, folders: list[Path]) -> list[str]:
    """Return each value of a sweep as text; those of glob() are options of a group."""
    glob = _glob(override)
    if glob is not None:
        return glob.filter(_options(override.key_or_group, folders))
    return list(override.sweep_string_iterator())


def _glob(override: Override) -> Glob | None:
    value: Any = override._value  # Hydra's annotation leaves glob() out
    return value if isinstance(value, Glob) else None


def _unread(argument: str, error: Exception) -> str:
    """Describe why an argument is no override; a single word may be meant as a command."""
    if "=" not in argument and re.fullmatch(r"[\w.-]+", argument):
        groups = [path.name for path in conf_dir().iterdir() if path.is_dir()]
        return find_word_problem(argument, [*groups, *_kinds(Config)])
    what = "commas, quotes or brackets" if argument.isascii() else "letters outside ASCII"
    key, _, value = argument.partition("=")
    shown = f": '{key}=\"{value}\"'" if not set("'\"") & set(value) else ""
    return f"{argument}: {first_line(error)}; put a value with {what} in quotes{shown}"


def _undeleted(key: str, groups: list[str], folders: list[Path]) -> str:
    if key in groups:
        none = "none" if "none" in _options(key, folders) else "OPTION"
        return f"~{key}: the defaults of {key} would stay in force; set {key}={none}"
    return f"~{key}: a setting cannot be deleted; set {key}=VALUE, or leave it out"


def _kinds(schema: type) -> dict[str, Any]:
    """Return the kinds of all settings by their dotted names, sections left out."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            hints = get_type_hints(kind)
            kinds |= {f"{name}.{key.name}": hints[key.name] for key in fields(kind)}
        else:
            kinds[name] = kind
    return kinds


def _range_problems(
    overrides: list[Override], folders: list[Path], config_dir: str | None
) -> list[str]:
    """Compose the valid overrides, each swept value once, to check ranges too."""
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    swept = [
        f"{o.get_key_element()}={value}"
        for o in overrides
        if o.is_discrete_sweep()
        for value in _strings(o, folders)
    ]
    searched = [f"hydra.searchpath=[{Path(config_dir).resolve()}]"] if config_dir else []
    problems: dict[str, None] = {}
    GlobalHydra.instance().clear()  # of a sweep that is refused
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for one in [None, *swept]:
            chosen = without_null([*fixed, *searched, *([one] if one else [])])
            try:
                found = find_problems(build_config(compose("config", chosen)))
            except Refused as refused:
                found = refused.problems
            except COMPOSING_ERRORS as error:
                found = explain(error, chosen, config_dir)
            problems.update(dict.fromkeys(found))
    return list(problems)


def compose_settings(arguments: Sequence[str]) -> Config:
    """Compose one job from overrides as typed.

    Raises:
        Refused: they have problems.
    """
    register()
    overrides = without_null([rewrite(argument) for argument in arguments])
    problems = find_override_problems(overrides, multirun=False)
    if problems:
        raise Refused(problems)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return build_config(compose("config", overrides))
    except COMPOSING_ERRORS as error:
        raise Refused(explain(error, overrides)) from None


def compose_job(overrides: Sequence[str]) -> Config:
    """Compose one job from its overrides.

    Raises:
        Refused: they have problems.
    """
    config = compose_settings(overrides)
    problems = find_problems(config)
    if problems:
        raise Refused(problems)
    return config


def with_grid(
    params: Mapping[str, Any] | None, arguments: Sequence[str], config_dir: str | None
) -> list[str]:
    """Return the overrides of a grid in a config file before those typed, which win.

    Args:
        params: `hydra.sweeper.params`.
        arguments: overrides as typed.
        config_dir: the user's own folder of config groups, if any.

    Raises:
        Refused: the grid has problems.
    """
    typed = {key_of(argument) for argument in arguments}
    grid = [one for one in grid_arguments(params) if key_of(one) not in typed]
    if grid:
        problems = find_override_problems([*grid, *arguments], multirun=True, config_dir=config_dir)
        if problems:
            raise Refused(problems)
    return [*grid, *arguments]
