"""Refuse config folders that could run code or read secrets, before Hydra composes them.

A folder of `--config-dir` or `hydra.searchpath` may come from somebody else. Each of its files,
chosen or not, may hold keys of the schema, options of our groups and a grid; `foreign_values`
checks the values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.plugins.config_source import ConfigSource
from omegaconf._utils import get_yaml_loader

from finetune.config.foreign_values import (
    SECTIONS,
    find_grid_problems,
    find_setting_problems,
    groups,
    is_option,
    shortened,
)
from finetune.config.hydra_launchers import find_launcher_problem
from finetune.config.paths import conf_dir
from finetune.config.yaml_files import find_text_fault
from finetune.problems import nearest

LARGEST_CONFIG = 100_000  # bytes
MOST_FILES = 1_000  # and folders
MOST_PROBLEMS = 20  # printed; more are counted
DEEPEST = 20  # mappings and lists inside each other
HEADER = 512  # characters of a file in which Hydra looks for directives
GRID = "hydra.sweeper.params"


def find_foreign_problems(folder: Path, chosen: Collection[str] | None = None) -> list[str]:
    """Return what a folder of configs holds besides settings, one line each.

    Args:
        folder: with a folder of YAML files for each group.
        chosen: the options, as GROUP/OPTION, whose misspelt keys are problems too; None for all.
            Files that are not composed may have them.
    """
    if folder.resolve() == conf_dir():
        return []
    try:
        files = list(_yaml_files(folder))
    except (OSError, ValueError) as error:
        return [f"{folder}: {error}"]
    found = [problem for path in files for problem in _problems_of(path, folder, chosen)]
    if len(found) > MOST_PROBLEMS:
        more = f"{folder}: {len(found) - MOST_PROBLEMS} more problems"
        return [*found[:MOST_PROBLEMS], more]
    return found


def _yaml_files(folder: Path) -> Iterator[Path]:
    """Yield every file that Hydra could load, through links; hidden groups cannot be named.

    Raises:
        OSError: a folder cannot be listed, though its files may be readable.
        ValueError: there are too many files and folders.
    """
    waiting = [(folder, frozenset({folder.resolve()}))]
    number = 0
    while waiting:
        parent, above = waiting.pop()
        for path in sorted(parent.iterdir()):
            if parent == folder and path.name.startswith("."):
                continue
            if (number := number + 1) > MOST_FILES:
                raise ValueError(f"holds more than {MOST_FILES} files and folders")
            real = path.resolve()
            if path.name.casefold().endswith(".yaml"):
                yield path
            elif path.is_dir() and real not in above:  # else a link to a folder above it
                waiting.append((path, above | {real}))


def _problems_of(path: Path, folder: Path, chosen: Collection[str] | None) -> Iterator[str]:
    names, known = path.relative_to(folder).parts, groups()
    if any("hydra" in name.casefold().split(".") for name in names):
        yield f"{path}: would replace a part of Hydra's config, which can run code; leave it out"
    elif len(names) == 1:
        yield (
            f"{path}: is in no group and could replace finetune's own config; move it into the "
            f"folder of a group ({', '.join(known)}), or leave it out"
        )
    elif names[0] not in known:
        yield f"{path}: {names[0]} is not a group; {nearest(names[0], known)}"
    else:
        option = "/".join(names).rpartition(".")[0]
        is_chosen = chosen is None or option in chosen
        found = _problems_of_file(path, names[0], is_chosen=is_chosen)
        yield from (f"{path}: {problem}" for problem in found)


def _problems_of_file(path: Path, group: str, *, is_chosen: bool) -> Iterator[str]:
    try:
        if not path.is_file():
            yield "is not a regular file; leave it out"
            return
        text = read_small(path)
        fault = find_syntax_problem(text)
        if fault is not None:
            yield fault
            return
        header = ConfigSource._get_header_dict(text[:HEADER])
        # Hydra's reader, so that both see the same; tags and aliases are refused by now.
        content = yaml.load(text, Loader=get_yaml_loader())  # noqa: S506
        package = _find_package(header, group)
        if package is None:
            shown = ", ".join(f"@{key} {value}" for key, value in header.items() if value)
            yield f"has the directive {shown}; a config file may have @package _global_ only"
        elif content is not None and not isinstance(content, dict):
            yield f"{shortened(content)} is not a mapping of settings"
        elif content is not None:
            yield from _problems_of_special_keys(content, package)
            settings = _settings(content, package)
            yield from find_setting_problems(settings, is_chosen=is_chosen)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        yield find_text_fault(error)
    except (OSError, ValueError) as error:
        yield f"cannot be read: {' '.join(str(error).split())}"


def read_small(path: Path) -> str:
    """Return the text of a config.

    Raises:
        ValueError: it is larger than any config of settings, or no text.
    """
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"it is larger than a config of settings ({LARGEST_CONFIG} bytes)")
    if not path.is_file():
        raise ValueError("it is not a file")
    return path.read_text(encoding="utf-8")


def find_syntax_problem(text: str) -> str | None:
    """Return YAML aliases, tags or deep nesting in a text, without building any of it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            return f"has YAML aliases (*{event.anchor}); write the values out"
        tag = getattr(event, "tag", None)
        if tag is not None:
            return f"has the YAML tag {shortened(tag)}; leave it out"
        if depth > DEEPEST:
            return f"has more than {DEEPEST} levels of lists and mappings"
    return None


def _find_package(header: Mapping[str, str | None], group: str) -> str | None:
    """Return the section that a file's keys belong to, _global_ for all; None for any other."""
    package = header.get("package") or group
    if set(header) - {"package"} or package not in ("_global_", "_group_", group):
        return None
    return "_global_" if package == "_global_" or group not in SECTIONS else group


def _problems_of_special_keys(content: Mapping[Any, Any], package: str) -> Iterator[str]:
    """Yield the problems of the defaults list and of Hydra's section."""
    yield from _problems_of_defaults(content.get("defaults"))
    if package == "_global_" and "hydra" in content:
        yield from _problems_of_hydra(content["hydra"], "hydra")


def _settings(content: Mapping[Any, Any], package: str) -> Mapping[Any, Any]:
    special = ("defaults", "hydra") if package == "_global_" else ("defaults",)
    settings = {key: value for key, value in content.items() if key not in special}
    return settings if package == "_global_" else {package: settings}


def _problems_of_defaults(entries: Any) -> Iterator[str]:
    """Yield entries of a defaults list that are not options of our groups."""
    if entries is not None and not isinstance(entries, list):
        yield "defaults is not a list; write - GROUP: OPTION lines"
        return
    for entry in entries or []:
        if isinstance(entry, dict) and len(entry) == 1:
            ((key, options),) = entry.items()
            yield from _problems_of_default(str(key), options)
        elif not (isinstance(entry, str) and is_option(entry)):  # _self_, another option
            yield f"defaults: {shortened(entry)} is not an option; write - GROUP: OPTION"


def _problems_of_default(key: str, options: Any) -> Iterator[str]:
    words, known = key.split(" "), groups()
    group = words[-1].removeprefix("/")
    problem = find_launcher_problem(group, options)
    if problem is not None:
        yield f"defaults: {shortened(key)}: {shortened(options)}: {problem}"
        return
    if set(words[:-1]) - {"optional", "override"} or group not in known:
        yield f"defaults: {shortened(key)} is not a group; {nearest(group, known)}"
        return
    for option in options if isinstance(options, list) else [options]:
        if option is not None and not is_option(option):
            yield f"defaults: {shortened(option)} is not an option of {group}"


def _problems_of_hydra(node: Any, name: str) -> Iterator[str]:
    """Yield keys of Hydra's config that are set, other than the grid."""
    if name == GRID and (node is None or isinstance(node, dict)):
        for key, values in (node or {}).items():
            yield from (f"{GRID}: {problem}" for problem in find_grid_problems(key, values))
    elif isinstance(node, dict) and GRID.startswith(f"{name}."):
        for key, value in node.items():
            # A key with a dot in it only looks like the path of another.
            below = f"{name}.{key}" if isinstance(key, str) and "." not in key else f"{name}[{key}]"
            yield from _problems_of_hydra(value, below)
    elif (problem := find_launcher_problem(name, node)) is not None:
        yield f"{shortened(name)}: {problem}"
    elif name == GRID:
        yield f"{GRID} is {shortened(node)}; it takes a mapping of settings to values: lora.r: 4,8"
    else:
        yield (
            f"{shortened(name)} can change what Hydra runs; a config folder may set {GRID} of "
            "Hydra only: leave it out"
        )
