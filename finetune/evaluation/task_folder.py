"""Tasks and groups of a user's YAML files (`evaluation.include_path`), read without running code.

lm-eval's rules: all .yaml files of a folder and of its subfolders, `include:` relative to the file,
data files relative to where the command runs. What lm-eval passes over is an error here.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from finetune.config.schema import EvaluationConfig
from finetune.files import known_digest, read_bytes
from finetune.problems import first_line

KEY = "evaluation.include_path"
TRUST = "evaluation.trust_task_code"
SUFFIX = ".yaml"
# Keys of a group itself; the others of its file are its tasks'.
OF_GROUP = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag")
LOOKS_LIKE_TASK = re.compile(rb"^(task|group|class|include|dataset_path)\b", re.MULTILINE)
NAMES = ("class", "group", "task")  # keys that make a file a task or a group, as lm-eval looks
UNREAD = ("__pycache__", ".ipynb_checkpoints")  # by lm-eval; hidden folders neither


class Function(str):
    """The name of a function that `!function` asks for, with its file and line."""

    where: str
    is_shipped: bool  # with lm-eval


@dataclass(frozen=True)
class Definition:
    """A task or a group of a YAML file, the files that it includes merged."""

    name: str
    path: Path
    config: dict[str, Any]
    read: tuple[Path, ...]  # the file and those that it includes
    functions: tuple[Function, ...] = ()  # that loading it would import

    @property
    def is_group(self) -> bool:
        return "group" in self.config and "class" not in self.config

    @property
    def tags(self) -> list[str]:
        found = self.config.get("tag") or []
        return [found] if isinstance(found, str) else list(found)


@dataclass(frozen=True)
class Leaf:
    """A task of a group, with the settings of the group."""

    name: str
    path: Path | None  # the file that defines it, or the group that only this one names
    config: dict[str, Any]
    is_defined: bool = True  # in a file of the folder


@dataclass(frozen=True)
class Walk:
    """The way from a name down to its tasks."""

    met: dict[str, Definition] = field(default_factory=dict)
    above: tuple[str, ...] = ()  # the groups around
    path: Path | None = None  # the file of the last one

    def into(self, group: str, path: Path | None) -> Walk:
        return Walk(self.met, (*self.above, group), path)


@dataclass(frozen=True)
class TaskFolder:
    """The definitions of a folder by their names, and the files that cannot be read."""

    path: Path
    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)  # each file with its fault

    def find(self, name: str) -> Definition | None:
        """Return a task or group by its name; None where there is none.

        Raises:
            ValueError: two files define it.
        """
        found = self.definitions.get(name, [])
        if len(found) > 1:
            files = " and ".join(str(one.path) for one in found)
            raise ValueError(f"{KEY}: {files} define {name}; rename one of the two")
        return found[0] if found else None

    def tagged(self, tag: str) -> list[str]:
        """Return the tasks that bear a tag."""
        return sorted(
            name for name, found in self.definitions.items() if any(tag in d.tags for d in found)
        )

    def used(self, name: str) -> list[Definition]:
        """Return a task or group with all that it contains, as far as it is of this folder."""
        walk = Walk()
        list(self.leaves(name, {}, walk))
        return list(walk.met.values())

    def leaves(self, name: str, overrides: Mapping[str, Any], walk: Walk) -> Iterator[Leaf]:
        """Yield the tasks of a task, a tag or a group, with the settings that groups add.

        Args:
            name: of any of them; one that this folder lacks is a leaf that is not defined.
            overrides: the settings of the groups around it.
            walk: the way to it, which takes the definitions that are met.

        Raises:
            ValueError: two files define a name, or a group contains itself.
        """
        if name in walk.above:
            around = " > ".join(walk.above)
            raise ValueError(f"{KEY}: the group {name} contains itself ({around})")
        definition, tagged = self.find(name), self.tagged(name)
        if definition is None:
            for member in tagged:
                yield from self.leaves(member, overrides, walk.into(name, walk.path))
            if not tagged:
                yield Leaf(name, walk.path, dict(overrides), is_defined=False)
            return
        walk.met[name] = definition
        if definition.is_group:
            below = walk.into(name, definition.path)
            yield from self._members(name, definition.config, overrides, below)
        else:
            yield Leaf(name, definition.path, {**definition.config, **overrides})

    def _members(
        self, group: str, config: Mapping[str, Any], overrides: Mapping[str, Any], walk: Walk
    ) -> Iterator[Leaf]:
        """Yield the tasks of a group, as lm-eval's TaskFactory builds them."""
        own = {key: value for key, value in config.items() if key not in OF_GROUP}
        own |= overrides
        listed = config.get("task")
        for one in listed if isinstance(listed, list) else []:
            more = one if isinstance(one, Mapping) else {}
            name = str(one if isinstance(one, str) else more.get("group") or more.get("task"))
            if "group" in more and self.find(name) is None and isinstance(more.get("task"), list):
                yield from self._members(f"{group}::{name}", more, own, walk)
            else:
                typed = {k: value for k, value in more.items() if k not in ("group", "task")}
                yield from self.leaves(name, {**own, **typed}, walk)


def read_folder(folder: str) -> TaskFolder:
    """Read the tasks of a folder.

    Raises:
        ValueError: it is missing, has no YAML file, or one that defines a task is broken.
    """
    path = Path(folder).expanduser()
    key = f"{KEY}={folder}"
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "is not there"
        raise ValueError(f"{key} {what}; name the folder of your task files")
    files = sorted(_find_files(path, SUFFIX), key=Path.as_posix)
    if not files:
        other = next(_find_files(path, ".yml"), None)
        remedy = f"; rename {other.name} to {other.stem}{SUFFIX}" if other else ""
        raise ValueError(f"{key} has no {SUFFIX} file, which lm-eval's tasks are{remedy}")
    found = TaskFolder(path)
    for file in files:
        try:
            definition = _define(file)
        except (ValueError, OSError) as error:
            if LOOKS_LIKE_TASK.search(read_bytes(file)):  # else it is of something else
                found.broken.append(str(error))
            continue
        if definition is not None:
            found.definitions.setdefault(definition.name, []).append(definition)
    return found


def _find_files(folder: Path, suffix: str) -> Iterator[Path]:
    for path in folder.rglob(f"*{suffix}"):
        around = path.relative_to(folder).parts[:-1]
        if not any(one in UNREAD or one.startswith(".") for one in around) and path.is_file():
            yield path


def _define(file: Path) -> Definition | None:
    """Return what a file defines; None for one that is only included, or is no task's at all."""
    read: list[Path] = []
    functions: list[Function] = []
    config = _merge(file, read, functions)
    if not any(key in config for key in NAMES):
        return None
    name = config.get("group") if "class" not in config else None
    name = name or config.get("task")
    if name is None:  # a class or group without a name is for other files to include
        return None
    if not isinstance(name, str):
        raise ValueError(f"{file}: task is {name!r}; it must be the task's name")
    tags = config.get("tag") or []
    if not isinstance(tags, str) and not (
        isinstance(tags, list) and all(isinstance(one, str) for one in tags)
    ):
        raise ValueError(f"{file}: tag is {tags!r}; it must be a name, or a list of names")
    return Definition(name, file, config, tuple(read), tuple(functions))


def _merge(file: Path, read: list[Path], functions: list[Function]) -> dict[str, Any]:
    """Return a file's mapping over those that it includes, as lm-eval merges them.

    Args:
        file: to be read.
        read: the files that were read; those of this call are added.
        functions: those that the files name, added too.

    Raises:
        ValueError: a file is missing or broken, or includes itself.
    """
    path = file.resolve()
    if path in read:
        raise ValueError(f"{file}: it is included twice")
    read.append(path)
    config = _parse(file, functions)
    included = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    for one in included if isinstance(included, list) else [included]:
        below = file.parent / str(one)
        if not below.is_file():
            raise ValueError(f"{file}: include: there is no file {below}")
        other = _merge(below, read, functions)
        other.pop("task_list", None)
        merged.update(other)
    return {**merged, **config}


def _parse(file: Path, functions: list[Function]) -> dict[str, Any]:
    """Return a file's mapping, and add the functions that it names."""
    state = file.stat()
    content, named = _parse_known(file, state.st_size, state.st_mtime_ns)
    functions += named
    return dict(content)


@lru_cache(maxsize=4096)
def _parse_known(file: Path, size: int, modified_ns: int) -> tuple[dict[str, Any], list[Function]]:
    functions: list[Function] = []
    try:
        content = yaml.load(read_bytes(file), _make_loader(file, functions))  # noqa: S506  # safe
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        fault = getattr(error, "problem", None) or first_line(error)
        raise ValueError(f"{file}{line}: it is broken YAML: {fault}") from None
    except (ValueError, TypeError, RecursionError) as error:  # of a value, such as a date
        raise ValueError(f"{file}: it is broken YAML: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: it holds no mapping of KEY: VALUE lines")
    return content, functions


def _make_loader(file: Path, functions: list[Function]) -> type[Any]:
    """Return a safe loader that collects the names of functions instead of importing them.

    Those of keys that are set again below would be imported too.
    """
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]  # of either kind
        pass

    def keep(loader: Any, node: yaml.Node) -> Function:
        name = Function(loader.construct_scalar(node))
        name.where = f"{file}, line {node.start_mark.line + 1}"
        name.is_shipped = is_stock(file)
        functions.append(name)
        return name

    Loader.add_constructor("!function", keep)
    return Loader


def is_stock(file: Path) -> bool:
    """Return whether a file belongs to the installed lm-eval, whose code is trusted as shipped."""
    package = find_spec("lm_eval")
    places = package.submodule_search_locations if package else None
    return any(file.resolve().is_relative_to(Path(one).resolve()) for one in places or [])


def find_code_problems(used: Sequence[Definition]) -> Iterator[str]:
    """Yield the code that task files would run: functions, tasks in Python, pickles."""
    for definition in used:
        foreign = [one for one in definition.functions if not one.is_shipped]
        if foreign:
            where, what = foreign[0].where, f"!function {foreign[0]}"
        elif "class" in definition.config:
            where, what = str(definition.path), f"class: {definition.config['class']}"
        else:
            continue
        yield (f"{KEY}: {where} runs Python code ({what}); if you trust it, type {TRUST}=true")


def find_local_files(config: Mapping[str, Any]) -> list[str]:
    """Return the data files of a task that are local, as `dataset_kwargs` names them."""
    kwargs = config.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, Mapping) else None
    folder = kwargs.get("data_dir") if isinstance(kwargs, Mapping) else None
    found = list(_flat(files))
    if isinstance(folder, str):
        found = [str(Path(folder, one)) for one in found] or [folder]
    return [one for one in found if "://" not in one]


def _flat(files: Any) -> Iterator[str]:
    if isinstance(files, str):
        yield files
    elif isinstance(files, Mapping):
        for one in files.values():
            yield from _flat(one)
    elif isinstance(files, list):
        for one in files:
            yield from _flat(one)


def find_contents(evaluation: EvaluationConfig, name: str) -> list[str]:
    """Return the digests of all files that a task or group of the folder is read from."""
    files = find_read(evaluation, name)
    return sorted(known_digest(path) for path in files if path.is_file())


def find_read(evaluation: EvaluationConfig, name: str) -> list[Path]:
    """Return the files that a task or group of the folder is read from, also as data or code.

    None where the folder has no such task, or cannot be read, which is reported where it is
    loaded.
    """
    leaves, walk = _find_leaves(evaluation, name)
    used = walk.met.values()
    files = {path for one in used for path in one.read}
    for leaf in leaves:
        for file in find_local_files(leaf.config):
            files |= {Path(one) for one in glob.glob(file, recursive=True)}
    if any(one.functions for one in used):
        files |= {path for one in used for path in one.path.parent.rglob("*.py")}
    return sorted(files)


def is_local(name: str, evaluation: EvaluationConfig) -> bool:
    """Return whether a task or group of the folder reads local files alone."""
    leaves, _ = _find_leaves(evaluation, name)
    found = [leaf.is_defined and bool(find_local_files(leaf.config)) for leaf in leaves]
    return bool(found) and all(found)


def _find_leaves(evaluation: EvaluationConfig, name: str) -> tuple[list[Leaf], Walk]:
    walk = Walk()
    if evaluation.include_path is None:
        return [], walk
    try:
        folder = read_folder(evaluation.include_path)
        return list(folder.leaves(name, {}, walk)), walk
    except (ValueError, OSError):
        return [], Walk()
