"""Check a YAML file of settings against the schema: every wrong key and value, with its line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from finetune.config.schema import Config
from finetune.problems import nearest

Found = Iterator[tuple[int, str]]  # the line, and what is wrong there

PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)\s*$", re.MULTILINE)
CLOCK_TIME = re.compile(r"\d:[0-5]?\d")
GLOBAL, GROUP = "_global_", "_group_"
HYDRA = "hydra"
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
NODES = {MappingNode: "a mapping", SequenceNode: "a list", ScalarNode: "a single value"}


def find_file_problems(path: Path, group: str) -> list[str]:
    """Return what is wrong in a config file of a group, one line each with its remedy."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):  # which hides the directive behind it from Hydra
            return [f"{path}: begins with a byte order mark; save it as UTF-8 without one"]
        return [_placed(path, line, fault) for line, fault in _problems_of_text(text, group)]
    except UnicodeDecodeError as error:
        return [f"{path}: {find_text_fault(error)}"]
    except yaml.YAMLError as error:
        return [describe_yaml_error(path, error)]
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}; fix that, or choose another option"]


def _placed(path: Path, line: int, fault: str) -> str:
    return f"{path}, line {line}: {fault}"


def describe_yaml_error(path: Path | None, error: yaml.YAMLError) -> str:
    """Describe a YAML error in a line: file, line and remedy."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = str(path or (mark and mark.name) or "a config file")
    fault = find_text_fault(error)
    return f"{place}, {fault}" if fault.startswith("line ") else f"{place}: {fault}"


def find_text_fault(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Describe where a text is not YAML or not UTF-8, with the remedy."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    fault = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    place = "" if mark is None else f"line {mark.line + 1}: "
    return f"{place}{' '.join(fault.split())}; {_yaml_remedy(fault)}"


def _yaml_remedy(fault: str) -> str:
    if "'\\t'" in fault:
        return "indent by spaces, not by tabs"
    if "duplicate key" in fault:
        return "keep one of the two"
    if "mapping values are not allowed" in fault:
        return "put a value with a colon in quotes"
    if "another document" in fault:
        return "leave out the --- between two documents"
    if "special characters" in fault or "unacceptable" in fault:
        return "leave the control character out"
    return "fix the brackets, quotes or indentation there"


def _problems_of_text(text: str, group: str) -> Found:
    loader = get_yaml_loader()(text)
    root = loader.get_single_node()
    named = PACKAGE.search(text)
    package = named[1] if named else GROUP
    is_section = is_dataclass(get_type_hints(Config).get(group))
    if root is None or (isinstance(root, ScalarNode) and root.tag.endswith(":null")):
        if package == GROUP and not is_section:
            yield 1, f"the file is empty; begin with '# @package {GLOBAL}', then settings"
        return
    if not isinstance(root, MappingNode):
        yield root.start_mark.line + 1, f"the file holds {_kind(root)}; write KEY: VALUE lines"
        return
    if package == GROUP and group and not is_section:
        yield (
            1, f"its keys would be placed below {group}; begin the file with '# @package {GLOBAL}'"
        )  # fmt: skip
        package = GLOBAL
    schema, prefix = _find_schema(package if package != GROUP else group)
    if schema is None:
        sections = [GLOBAL, GROUP, *get_type_hints(Config)]
        yield 1, f"@package {package} is not known; {nearest(package, sections)}"
        return
    yield from _duplicates(root)
    ours = [(key, value) for key, value in root.value if _is_ours(key, prefix)]
    yield from _walk(MappingNode(root.tag, ours, root.start_mark), schema, prefix, loader)


def _is_ours(key: Node, prefix: str) -> bool:
    return _text(key) != "defaults" and (bool(prefix) or _text(key) != HYDRA)


def _find_schema(package: str) -> tuple[Any, str]:
    """Return the dataclass that a package's keys belong to, and their prefix."""
    if package in (GLOBAL, ""):
        return Config, ""
    section = get_type_hints(Config).get(package)
    return (section, package) if is_dataclass(section) else (None, package)


def _walk(node: Node, kind: Any, name: str, loader: Any) -> Found:
    """Yield unknown keys and values of a wrong type below a node."""
    line = node.start_mark.line + 1
    item = get_args(kind)[0] if get_origin(kind) is list else None
    if is_dataclass(kind):
        if isinstance(node, MappingNode):
            yield from _walk_mapping(node, get_type_hints(kind), name, loader)
        elif not _is_interpolation(node):
            yield line, f"{name} is {_shown(node)}; write its settings as KEY: VALUE lines below it"
    elif is_dataclass(item) and isinstance(node, SequenceNode):
        for number, one in enumerate(node.value):
            yield from _walk(one, item, f"{name}.{number}", loader)
    elif not _is_interpolation(node):
        fault = find_kind_problem(name, loader.construct_object(node, deep=True), kind)
        if fault is not None:
            yield line, fault


def _walk_mapping(node: MappingNode, hints: dict[str, Any], name: str, loader: Any) -> Found:
    if name:
        yield from _duplicates(node)
    for node_of_key, value in node.value:
        key = _text(node_of_key)
        below = f"{name}.{key}" if name else key
        if key in hints:
            yield from _walk(value, hints[key], below, loader)
        else:
            fault = f"{below} is not a setting; {_key_remedy(key, hints, name)}"
            yield node_of_key.start_mark.line + 1, fault


def _key_remedy(key: str, hints: dict[str, Any], name: str) -> str:
    section, dot, rest = key.partition(".")
    if dot and not name and section in hints:
        return f"write {rest} below {section}:"
    if key == name:
        return f"what this file holds is placed below {name} already; leave the line {key}: out"
    return nearest(key, list(hints))


def _text(key: Node) -> str:
    return str(key.value) if isinstance(key, ScalarNode) else f"({_kind(key)})"


def _duplicates(node: MappingNode) -> Found:
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        name = _text(key)
        if name in first:
            yield line, f"{name} is set twice, first in line {first[name]}; keep one of the two"
        first.setdefault(name, line)


def find_clock_times(path: Path) -> list[str]:
    """Return values such as 4:00:00 that are not in quotes: YAML 1.1 reads them as 14400."""
    try:
        text = path.read_text(encoding="utf-8")
        node = get_yaml_loader()(text).get_single_node() if CLOCK_TIME.search(text) else None
    except (OSError, ValueError, yaml.YAMLError):  # which composing reports
        return []
    return [_placed(path, line, fault) for line, fault in _clock_times(node)]


def _clock_times(node: Node | None) -> Found:
    """Yield the numbers of the base 60 below a node."""
    for part in node.value if isinstance(node, MappingNode | SequenceNode) else ():
        value = part[1] if isinstance(part, tuple) else part
        yield from _clock_times(value)
        if isinstance(value, ScalarNode) and value.style is None and ":" in value.value:
            if value.tag.rpartition(":")[2] not in ("int", "float"):
                continue
            name = f"{_text(part[0])} is " if isinstance(part, tuple) else ""
            quoted = f'"{value.value}"'
            fault = f"{name}{value.value}, which YAML reads as a number; put it in quotes: {quoted}"
            yield value.start_mark.line + 1, fault


def find_kind_problem(name: str, value: Any, kind: Any) -> str | None:
    """Return why a value is not of a setting's kind; None where OmegaConf takes it."""
    section, _, key = name.rpartition(".")
    schema = _find_schema(section.partition(".")[0])[0] if section else Config
    if section.startswith("data.mix."):
        schema = get_args(get_type_hints(schema)["mix"])[0]
    try:
        OmegaConf.update(OmegaConf.structured(schema), key, value)
    except OmegaConfBaseException:
        shown = "null" if value is None else value
        return f"{name} is {shown}; it takes {describe_kind(kind)}"
    return None


def describe_kind(kind: Any) -> str:
    """Return what a setting takes, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        shown = [describe_kind(one) for one in arguments if one is not type(None)]
        return " or ".join([*shown, *(["null"] if type(None) in arguments else [])])
    if origin is list:
        return "a list, such as [a, b]"
    if origin is dict:
        return "a mapping of KEY: VALUE lines"
    return KINDS.get(kind, "a value of another kind")


def _is_interpolation(node: Node) -> bool:
    return isinstance(node, ScalarNode) and "${" in str(node.value)


def _kind(node: Node) -> str:
    return NODES[type(node)]


def _shown(node: Node) -> str:
    if isinstance(node, ScalarNode):
        return str(node.value) if node.value else "null"
    return _kind(node)


def read_defaults(path: Path) -> list[Any]:
    """Return the entries of a file's defaults list; none where it has none or cannot be read."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), get_yaml_loader())  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError):
        return []
    entries = content.get("defaults") if isinstance(content, dict) else None
    return entries if isinstance(entries, list) else []


def find_file(folders: Sequence[Path], name: str) -> Path | None:
    """Return the file of a config name, such as experiment/mine; the first folder wins."""
    for folder in folders:
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    return None


def read_values(path: Path, group: str) -> dict[str, Any]:
    """Return the single values of a file by their dotted names; none where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, get_yaml_loader())  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    named = PACKAGE.search(text)
    is_global = named is not None and named[1] == GLOBAL
    return dict(_flat(content, "" if is_global or not group else group))


def _flat(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, node
