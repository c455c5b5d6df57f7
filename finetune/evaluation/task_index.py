"""The index of tasks, lm-eval's and the user's own: which are there, and their files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from finetune.config.rules import OWN_TASKS
from finetune.config.schema import EvaluationConfig
from finetune.evaluation.task_checks import find_definition_problems
from finetune.evaluation.task_folder import KEY, Definition, TaskFolder, Walk, read_folder
from finetune.problems import nearest

TASK_FILES = (".yaml", ".yml")
NAME = re.compile(r"[\w:+-]+(?:[. ][\w:+-]+)*")  # that files and columns can bear
MOST_NAMED = 8
STOCK_TASKS = Path(lm_eval.__file__).parent / "tasks"


def find_task_problems(evaluation: EvaluationConfig) -> list[str]:
    """Return what is wrong with the names of tasks, and with the user's own task files.

    A task is looked for in the folder of `evaluation.include_path` first, then in lm-eval's.
    """
    try:
        folder = find_folder(evaluation)
    except ValueError as error:
        return [str(error)]
    problems = [f"{KEY}: {broken}" for broken in folder.broken]
    for name in evaluation.tasks:
        try:
            problems += _find_problems(name, folder, evaluation)
        except ValueError as error:
            problems.append(str(error))
    return problems


def find_folder(evaluation: EvaluationConfig) -> TaskFolder:
    """Return the user's own tasks, none where no folder is named.

    Raises:
        ValueError: the folder is missing, or has no task file.
    """
    if evaluation.include_path is None:
        return TaskFolder(Path())
    return read_folder(evaluation.include_path)


def _find_problems(name: str, folder: TaskFolder, evaluation: EvaluationConfig) -> Iterator[str]:
    if name.endswith(TASK_FILES) or "/" in name:
        yield _describe_own_file(name)
    elif folder.find(name) is not None:
        yield from _find_own_problems(name, folder, evaluation)
    elif tagged := folder.tagged(name):
        yield _describe_tag(name, tagged)
    elif name not in OWN_TASKS and find_task_file(name) is None:
        index = stock_index()
        if name in index.all_tasks:  # only a tag has no file
            yield _describe_tag(name, sorted(index.task_index[name].tags))
        else:
            yield _describe_unknown(name, folder, index.all_tasks)


def _find_own_problems(
    name: str, folder: TaskFolder, evaluation: EvaluationConfig
) -> Iterator[str]:
    """Yield what is wrong with a task or group of the user's folder, and with what it contains."""
    definition, walk = folder.find(name), Walk()
    assert definition is not None
    if name in OWN_TASKS:
        yield f"{KEY}: {definition.path}: {name} is a task of finetune itself; rename yours"
        return
    if not NAME.fullmatch(name):
        yield (
            f"{KEY}: {definition.path}: the name {name!r} cannot name files; use letters, digits "
            "and the signs _ + - : ."
        )
        return
    leaves, checked = list(folder.leaves(name, {}, walk)), []
    for leaf in leaves:
        if leaf.is_defined or "dataset_path" in leaf.config:
            checked.append(leaf)
        if not leaf.is_defined and find_task_file(leaf.name) is None:
            if "dataset_path" not in leaf.config:
                unknown = _describe_unknown(leaf.name, folder, stock_index().all_tasks)
                yield f"{KEY}: {leaf.path}: {name}: {unknown.partition(': ')[2]}"
        elif not leaf.is_defined:
            checked = [one for one in checked if one is not leaf]
    for problem in find_definition_problems(name, list(walk.met.values()), checked, evaluation):
        yield problem if problem.startswith("evaluation.") else f"{KEY}: {problem}"


def _describe_tag(name: str, tagged: Sequence[str]) -> str:
    return (
        f"evaluation.tasks: {name} is a tag, which has no score of its own; "
        f"name its tasks: evaluation.tasks=[{','.join(tagged)}]"
    )


def _describe_unknown(name: str, folder: TaskFolder, stock: Sequence[str]) -> str:
    """Return a line on a name that neither the folder nor lm-eval has, with the nearest one."""
    own = list(folder.definitions)
    close = nearest(name, [*own, *stock]).partition("Known:")[0]
    if not own:
        listed = f"`lm-eval ls tasks` lists all {len(stock)}"
        return f"evaluation.tasks: lm-eval has no task {name!r}; {close}{listed}"
    return (
        f"evaluation.tasks: neither {folder.path} nor lm-eval has a task {name!r}; {close}"
        f"the folder has {', '.join(own[:MOST_NAMED])}{', ...' * (len(own) > MOST_NAMED)}"
    )


def _describe_own_file(name: str) -> str:
    """Say how a task file is named: by its folder, and by the task that it defines."""
    path = Path(name)
    if not path.exists():
        return f"evaluation.tasks: there is no file {name}; name tasks of lm-eval, such as sciq"
    folder, tasks = (path, "TASK") if path.is_dir() else (path.parent, "TASK")
    with suppress(ValueError, OSError):
        found = [
            one.name
            for several in read_folder(str(folder)).definitions.values()
            for one in several
            if path.is_dir() or path.resolve() in one.read[:1]
        ]
        tasks = ",".join(found[:MOST_NAMED]) or tasks
    what = "folder" if path.is_dir() else "file"
    return (
        f"evaluation.tasks: {name} is a {what}; name the folder and the task: "
        f"evaluation.include_path={folder} evaluation.tasks=[{tasks}]"
    )


@lru_cache(maxsize=64)
def find_task_file(name: str) -> Path | None:
    """Return the YAML file that defines a stock task or group.

    Looks for its name in the files' text, first where the folder is named like it: lm-eval's own
    index of its 14,683 entries takes seconds.
    """
    stem = name.split("_")[0]
    defines = re.compile(rf"""^["']?(task|group)["']?: *["']?{re.escape(name)}["']? *$""", re.M)
    for files in (f"*{stem}*/**/*.yaml", "**/*.yaml"):
        for path in sorted(STOCK_TASKS.glob(files)):
            if defines.search(path.read_text(encoding="utf-8")):
                return path
    return None


@lru_cache(maxsize=1)
def stock_index() -> TaskManager:
    """Return lm-eval's index of all its tasks; takes some six seconds."""
    return TaskManager()


def find_manager(name: str, evaluation: EvaluationConfig) -> TaskManager:
    """Return an index that holds a task or group with all that it contains.

    Raises:
        ValueError: a group of lm-eval contains a task that the user's folder defines too.
    """
    folder = find_folder(evaluation)
    walk = Walk()
    missing = [leaf.name for leaf in folder.leaves(name, {}, walk) if not leaf.is_defined]
    stock = [one for one in missing if find_task_file(one) is not None]
    manager = _find_stock_manager(stock) if stock else TaskManager(include_defaults=False)
    for one in stock:
        both = set(members_of(one, manager.task_index)) & set(folder.definitions)
        if both and one not in both:
            raise ValueError(
                f"{KEY}: lm-eval's {one} contains {', '.join(sorted(both))}, which "
                f"{folder.path} defines too; rename it there"
            )
    if not walk.met:
        return manager
    own = TaskManager(include_defaults=False)  # the stock index is kept as it is
    own.task_index.update(manager.task_index)
    own.task_index.update(_build_entries(walk.met, folder))
    return own


def find_notes(name: str, evaluation: EvaluationConfig) -> Iterator[str]:
    """Yield that a task of the user's folder takes the place of one of lm-eval's, as it does there.

    lm-eval only warns of it.
    """
    own = find_folder(evaluation).find(name)
    if own is not None and find_task_file(name) is not None:
        yield f"{name} is the task of {own.path}, not lm-eval's"


def _build_entries(met: Mapping[str, Definition], folder: TaskFolder) -> dict[str, Entry]:
    """Return lm-eval's entries of own tasks; without functions it reads no file again."""
    entries = {}
    for name, one in met.items():
        kind = Kind.GROUP if one.is_group else Kind.TASK
        kind = Kind.PY_TASK if "class" in one.config else kind
        path = one.path if one.functions else None
        entries[name] = Entry(name, kind, path, cfg=one.config, tags=set(one.tags))
    for tag in {tag for one in met.values() for tag in one.tags} - set(entries):
        entries[tag] = Entry(tag, Kind.TAG, None, tags=set(folder.tagged(tag)))
    return entries


def _find_stock_manager(names: Sequence[str]) -> TaskManager:
    """Return an index of stock tasks: their folders', or all, for a group from several folders."""
    files = [find_task_file(name) for name in names]
    folders = dict.fromkeys(str(file.parent) for file in files if file is not None)
    manager = TaskManager(include_defaults=False, include_path=list(folders))
    try:
        for name in names:
            members_of(name, manager.task_index)
    except KeyError:
        return stock_index()
    return manager


def members_of(name: str, index: Mapping[str, Entry]) -> list[str]:
    """Return the tasks of a group, of all groups and tags in it; a task's only one is itself.

    Raises:
        KeyError: one of them is not in the index.
    """
    entry = index[name]
    if entry.kind is Kind.TAG:
        return sorted(entry.tags)
    if entry.kind is not Kind.GROUP or entry.cfg is None:
        return [name]
    named = [{"task": one} if isinstance(one, str) else one for one in entry.cfg["task"]]
    below = [one.get("task") or one["group"] for one in named]
    return [member for one in below for member in members_of(one, index)]
