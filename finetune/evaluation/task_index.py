"""The index of lm-eval's tasks: which are there, and the files that define them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from finetune.config.rules import OWN_TASKS
from finetune.config.schema import EvaluationConfig
from finetune.problems import nearest

TASK_FILES = (".yaml", ".yml")
STOCK_TASKS = Path(lm_eval.__file__).parent / "tasks"


def find_task_problems(evaluation: EvaluationConfig) -> list[str]:
    """Return the tasks that lm-eval does not have, each with the nearest one that it has."""
    problems = []
    for name in evaluation.tasks:
        if name.endswith(TASK_FILES) or "/" in name:
            problems.append(_describe_own_file(name))
            continue
        if name in OWN_TASKS or find_task_file(name) is not None:
            continue
        known = stock_index().all_tasks
        if name in known:  # only a tag has no file
            several = ",".join(sorted(stock_index().task_index[name].tags))
            problems.append(
                f"evaluation.tasks: {name} is a tag, which has no score of its own; "
                f"name its tasks: evaluation.tasks=[{several}]"
            )
        else:
            close = nearest(name, known).partition("Known:")[0]
            problems.append(
                f"evaluation.tasks: lm-eval has no task {name!r}; {close}"
                f"`lm-eval ls tasks` lists all {len(known)}"
            )
    return problems


def _describe_own_file(name: str) -> str:
    """Say what is possible today for somebody who names a task file."""
    if not Path(name).exists():
        return f"evaluation.tasks: there is no file {name}; name tasks of lm-eval, such as sciq"
    return (
        f"evaluation.tasks: {name} is a task file, which is not supported yet; today a task of "
        "lm-eval can ask your questions, in the columns of its own data set: "
        "evaluation.tasks=[sciq] +evaluation.data_files.sciq.test=FILE.jsonl"
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


def find_manager(name: str) -> TaskManager:
    """Return an index that holds a task: its folder's, or all, for a group from several folders."""
    path = find_task_file(name)
    assert path is not None, "find_task_problems comes first"
    manager = TaskManager(include_defaults=False, include_path=str(path.parent))
    try:
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
