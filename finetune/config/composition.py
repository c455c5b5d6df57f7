"""Explain why settings cannot be composed: the file, the line, the key and the remedy.

Hydra and OmegaConf stop at the first error and print it over several lines. Here every chosen
config file is checked as well, so that all errors in a user's YAML are listed at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from finetune.config.grammar import find_override
from finetune.config.paths import conf_dir
from finetune.config.yaml_files import (
    describe_yaml_error,
    find_clock_times,
    find_file,
    find_file_problems,
    read_defaults,
    read_values,
)
from finetune.problems import first_line, nearest

GRID = "hydra.sweeper.params"
AS_A_SWEEP = "add --multirun"
MISSING_VALUE = "???"
COMPOSED = re.compile(r"In '(?P<file>[^']+)': (?P<kind>\w+) raised while composing config:")
KEY = re.compile(r"^\s+full_key: (\S+)", re.MULTILINE)
MISSING = re.compile(r"In '(?P<file>[^']+)': Could not (?:find|load) '(?P<option>[^']+)'")
NO_MATCH = re.compile(r"(?:In '(?P<file>[^']+)': )?Could not override '(?P<key>[^'@]+)")
TWICE = re.compile(r"Multiple values for (?P<group>\S+)\. To override")
# RecursionError: a defaults list that leads back to its own file
COMPOSING_ERRORS = (
    HydraException, OmegaConfBaseException, YAMLError, ValueError, RecursionError,
)  # fmt: skip
NO_LIST = re.compile(r"Invalid defaults list in '(?P<file>[^']+)'")


def explain(
    error: Exception, arguments: Sequence[str] = (), config_dir: str | None = None
) -> list[str]:
    """Return why the settings cannot be composed, one line for each error.

    Args:
        error: what Hydra, OmegaConf or the YAML reader raised.
        arguments: the overrides as typed.
        config_dir: the user's own folder of config groups, if any.
    """
    folders = [*([Path(config_dir)] if config_dir else []), *_searched(arguments), conf_dir()]
    files = chosen_files(arguments, folders)
    found = [problem for path, group in files for problem in find_file_problems(path, group)]
    said = _describe(error, folders, [path for path, _ in files])
    is_new = not any(said.split(": ")[0] in problem for problem in found)  # its file, or its key
    return list(dict.fromkeys([*found, *([said] if is_new else [])]))


def find_value_problems(arguments: Sequence[str], config_dir: str | None = None) -> list[str]:
    """Return values of chosen files that would silently become others.

    For each `???` that neither the command line nor a file replaces, OmegaConf would use the
    default of the schema; 4:00:00 would become 14400.
    """
    folders = [*([Path(config_dir)] if config_dir else []), *_searched(arguments), conf_dir()]
    files = chosen_files(arguments, folders)
    values = {path: read_values(path, group) for path, group in files}
    given = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    for path, group in files:
        if group == "experiment" or conf_dir() not in path.parents:
            grid = f"{GRID}."
            given |= {k.removeprefix(grid) for k, v in values[path].items() if v != MISSING_VALUE}
    templates = conf_dir() / "data"  # data=local waits for data.path, and says so
    times = [problem for path in values for problem in find_clock_times(path)]
    return times + [
        f"{path}: {key} has no value; set it there, or type {key}=VALUE"
        for path, own in values.items()
        for key, value in own.items()
        if value == MISSING_VALUE and key not in given and path.parent != templates
    ]


def config_dir_of(hydra: DictConfig | HydraConf) -> str | None:
    """Return the folder of `--config-dir` from Hydra's own settings."""
    sources = hydra.runtime.config_sources
    return next((str(one.path) for one in sources if one.provider == "command-line"), None)


def find_grid_problems(hydra: DictConfig | HydraConf) -> list[str]:
    """Refuse a grid in a config file without --multirun, as a typed one is refused."""
    grid = hydra.sweeper.get("params")
    if not grid:
        return []
    settings = ", ".join(map(str, grid))
    return [f"{GRID} is a sweep of {settings}; {AS_A_SWEEP}, or leave out its file"]


def chosen_files(arguments: Sequence[str], folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return the config files that overrides choose, with their groups, and those these name."""
    waiting = [("", "config"), *_typed_options(arguments, folders)]
    found: dict[Path, str] = {}
    while waiting:
        group, option = waiting.pop(0)
        path = find_file(folders, f"{group}/{option}" if group else option)
        if path is None or path in found or group.partition("/")[0] == "hydra":
            continue
        found[path] = group
        for entry in read_defaults(path):
            waiting += _named_options(entry, group)
    return list(found.items())


def _typed_options(arguments: Sequence[str], folders: Sequence[Path]) -> Iterator[tuple[str, str]]:
    for argument in arguments:
        override = find_override(argument)
        if override is None:
            continue
        group = override.key_or_group
        if "." in group or override.is_delete() or not any((f / group).is_dir() for f in folders):
            continue
        value: Any = override.value()
        if isinstance(value, Glob):
            names = {path.stem for f in folders for path in (f / group).glob("*.yaml")}
            values: list[Any] = value.filter(sorted(names))
        elif override.is_discrete_sweep():
            values = list(override.sweep_iterator())
        else:
            values = value if isinstance(value, list) else [value]
        yield from ((group, str(one)) for one in values)


def _named_options(entry: Any, group: str) -> Iterator[tuple[str, str]]:
    """Yield the group and option of each config that an entry of a defaults list names."""
    if isinstance(entry, str) and entry != "_self_":
        yield (group, entry) if not entry.startswith("/") else ("", entry.removeprefix("/"))
    elif isinstance(entry, dict):
        for key, options in entry.items():
            word = str(key).split(" ")[-1].partition("@")[0]
            is_absolute = word.startswith("/") or not group
            below = word.removeprefix("/") if is_absolute else f"{group}/{word}"
            for option in options if isinstance(options, list) else [options]:
                yield below, str(option)


def _searched(arguments: Sequence[str]) -> list[Path]:
    """Return the folders of `hydra.searchpath`."""
    found = []
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key == "hydra.searchpath":
            found += [
                Path(one.strip(" '\"").removeprefix("file://"))
                for one in value.strip("[]").split(",")
            ]
    return [folder for folder in found if folder.is_dir()]


def _describe(error: Exception, folders: Sequence[Path], files: Sequence[Path]) -> str:
    """Return what an error says in one line that names file and key, with the remedy."""
    text = str(error).strip()
    if isinstance(error, YAMLError):
        return describe_yaml_error(None, error)
    if isinstance(error, RecursionError):
        return _describe_cycle(folders, files)
    if isinstance(error, UnicodeDecodeError):
        return "a config file is not UTF-8; save it as UTF-8"
    if error.__cause__ is not None and not text:
        return _describe_key(error.__cause__, files)
    if (composed := COMPOSED.search(text)) is not None:
        key = KEY.search(text)
        of = f"{key[1]}: " if key else ""
        return f"{_file_of(composed['file'], folders)}: {of}{first_line(text[composed.end() :])}"
    return _describe_defaults(text, folders, files) or _describe_key(error, files)


def _describe_defaults(text: str, folders: Sequence[Path], files: Sequence[Path]) -> str | None:
    """Return an error of a defaults list; None where it is none."""
    if (missing := MISSING.search(text)) is not None:
        return _describe_missing(missing, folders)
    if (unmatched := NO_MATCH.search(text)) is not None:
        key = unmatched["key"]
        group, place = key.rpartition("/")[2], _file_of(unmatched["file"] or "", folders)
        groups = [path.name for path in sorted(conf_dir().iterdir()) if path.is_dir()]
        remedy = f"write override /{group}" if group in groups else nearest(group, groups)
        return f"{place}: defaults: override {key} has no match; {remedy}"
    if (twice := TWICE.search(text)) is not None:
        group = twice["group"]
        named = [p for p in files if {"/" + group, group} & set(_groups_named(p)) and p != files[0]]
        place = f"{named[0]}: " if named else ""
        return f"{place}defaults: {group} is chosen already; write - override /{group}: OPTION"
    if (no_list := NO_LIST.search(text)) is not None:
        place = _file_of(no_list["file"], folders)
        return f"{place}: defaults is not a list; write - override /GROUP: OPTION lines"
    return None


def _describe_cycle(folders: Sequence[Path], files: Sequence[Path]) -> str:
    """Describe a cycle of defaults lists: the files that lead from one back to itself."""
    for path in files:
        cycle = _find_cycle(path, folders)
        if cycle:
            names = " -> ".join(
                one.relative_to(one.parents[1]).with_suffix("").as_posix() for one in cycle
            )
            return f"{path}: defaults: {names} is a cycle; remove one of the lines"
    return "the configs are nested too deeply; nest fewer files in defaults"


def _find_cycle(start: Path, folders: Sequence[Path]) -> list[Path]:
    """Return the files from one back to itself by their defaults lists; none without a cycle."""
    waiting, seen = [[start]], set()
    while waiting:
        way = waiting.pop(0)
        group = way[-1].parent.name if way[-1].parent not in folders else ""
        named = [one for e in read_defaults(way[-1]) for one in _named_options(e, group)]
        for below, option in named:
            path = find_file(folders, f"{below}/{option}" if below else option)
            if path == start:
                return [*way, path]
            if path is not None and path not in seen:
                seen.add(path)
                waiting.append([*way, path])
    return []


def _groups_named(path: Path) -> list[str]:
    """Return the groups of a defaults list, as written, without those of an override."""
    return [str(key) for entry in read_defaults(path) if isinstance(entry, dict) for key in entry]


def _describe_key(error: BaseException, files: Sequence[Path]) -> str:
    """Return an error of one key, such as an interpolation, with the file that sets it."""
    key = KEY.search(str(error))
    said = first_line(error)
    if key is None:
        cause = f": {first_line(error.__cause__)}" if error.__cause__ is not None else ""
        return f"{said}{cause}"
    name = key[1].rpartition(".")[2]
    sets = re.compile(rf"^\s*{re.escape(name)}\s*:.*\$\{{", re.MULTILINE)
    places = [path for path in files if sets.search(path.read_text("utf-8", "replace"))]
    place = f"{places[0]}: " if places else ""
    return f"{place}{key[1]}: {said}; {_interpolation_remedy(said)}"


def _interpolation_remedy(said: str) -> str:
    if "Environment variable" in said:
        return "set the variable, or a value"
    if "Recursive" in said:
        return "give one of the settings a value"
    if "Unsupported interpolation type" in said:
        return "known: ${section.key}, ${oc.env:NAME}, and add, sub, mul, div: ${mul:2,${lora.r}}"
    if "Interpolation key" in said:
        return "write it as ${section.key}, or set a value"
    return "set a value of its kind"


def _describe_missing(missing: re.Match[str], folders: Sequence[Path]) -> str:
    group, _, option = missing["option"].rpartition("/")
    names = sorted({path.stem for f in folders for path in (f / group).glob("*.yaml")})
    above = group.rpartition("/")[2]
    if not names and above != group and any((f / above).is_dir() for f in folders):
        place = _naming_file(missing, folders)
        said = f"{above} is looked up relative to the file's group"
        return f"{place}: defaults: {said}; write /{above}: {option}"
    place = _naming_file(missing, folders)
    return f"{place}: {group}={option}: there is no such option; {nearest(option, names)}"


def _naming_file(missing: re.Match[str], folders: Sequence[Path]) -> str:
    """Return the file whose defaults list names a missing option; Hydra names only the root."""
    group, _, option = missing["option"].rpartition("/")
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            own = path.relative_to(folder).parent.as_posix()
            named = [one for e in read_defaults(path) for one in _named_options(e, own)]
            if (group, option) in named:
                return str(path)
    return _file_of(missing["file"], folders)


def _file_of(name: str, folders: Sequence[Path]) -> str:
    return str(find_file(folders, name) or name)
