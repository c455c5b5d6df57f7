"""Rows that do not fit a task: the columns that its templates and functions need, and the lack.

lm-eval's own errors name neither the file nor the columns.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lm_eval.utils
from jinja2 import TemplateError, meta
from lm_eval.api.task import ConfigurableTask, Task

from finetune.problems import first_line
from finetune.substitution import substituted

# What builds requests of a row, in the order in which lm-eval asks for it.
FIELDS = ("process_docs", "doc_to_text", "doc_to_choice", "doc_to_target")
AROUND = ("description", "gen_prefix")  # templates, too, of what stands around a question
TESTS = re.compile(r"\b(if|or|default|is)\b")
# What lm-eval's templates and functions raise on rows that they were not written for.
ROW_ERRORS = (
    TemplateError, LookupError, AttributeError, TypeError, ValueError, AssertionError, SyntaxError,
)  # fmt: skip


def find_needed(config: Mapping[str, Any]) -> list[str]:
    """Return the columns that a task's definition reads, as far as it says so."""
    first = config.get("process_docs")
    fields = FIELDS[:1] if callable(first) else FIELDS[1:]  # the others read what it makes
    found = [name for field in fields for name in _read_by(config.get(field))]
    return list(dict.fromkeys(found))


def _read_by(field: Any) -> Iterator[str]:
    """Yield the columns that a template, the name of a column, or a function reads."""
    if callable(field):
        yield from _read_by_function(field)
    elif isinstance(field, str) and field.isidentifier():
        yield field
    elif isinstance(field, str):
        try:
            tree = lm_eval.utils.env.parse(field)
        except TemplateError:
            return
        yield from sorted(meta.find_undeclared_variables(tree), key=field.find)


def _read_by_function(function: Callable[..., Any]) -> Iterator[str]:
    """Yield the constant keys by which a function, or one inside it, reads its first argument."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    kinds = (ast.FunctionDef, ast.Lambda)
    functions = [one for one in ast.walk(tree) if isinstance(one, kinds) and one.args.args]
    documents = {one.args.args[0].arg for one in functions}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Load):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in documents:
            key = node.slice.value if isinstance(node.slice, ast.Constant) else None
            if isinstance(key, str):
                yield key


class Misfit(Exception):
    """The rows of one split cannot be asked by a task, for the reason of the message."""

    def __init__(self, split: str, reason: str) -> None:
        super().__init__(reason)
        self.split = split


@contextmanager
def watched(*, checks_names: bool) -> Iterator[list[Task]]:
    """Note each task whose data are read, and check its splits and the names of its columns.

    Args:
        checks_names: whether names of columns that the rows lack are refused; lm-eval takes such a
            name for a text that is the same for all questions, or fails on it.

    Raises:
        Misfit: the data lack a split or such a column.
    """
    read: list[Task] = []
    download = ConfigurableTask.download

    def note(task: Any, *args: Any, **kwargs: Any) -> None:
        download(task, *args, **kwargs)
        read.append(task)
        split = asked_split(task)
        if split is not None and split not in task.dataset:
            have = ", ".join(task.dataset)
            raise Misfit(split, f"{task.task_name} asks its {split} split; the data have {have}")
        if checks_names and split is not None and find_unknown_names(task, split):
            raise Misfit(split, describe_misfit(task, split, ""))
        if checks_names and split is not None and (fault := _find_null(task, split)) is not None:
            raise Misfit(split, describe_misfit(task, split, fault))

    with substituted(ConfigurableTask, "download", note):
        yield read


def asked_split(task: Task) -> str | None:
    """Return the split whose questions are asked; None where a task's code decides."""
    split: str | None = task.config.test_split or task.config.validation_split
    return split


def find_unknown_names(task: Task, split: str) -> list[str]:
    """Return the names of columns, as a definition has them, that the rows lack."""
    config, columns = vars(task.config), task.dataset[split].column_names
    if callable(config["process_docs"]):
        return []
    listed = config["doc_to_choice"]
    constants = [str(one) for one in listed] if isinstance(listed, list) else []
    named = [config[name] for name in FIELDS[1:]]
    names = [one for one in named if isinstance(one, str) and one.isidentifier()]
    return [one for one in names if one not in (*columns, *constants)]


def _find_null(task: Task, split: str) -> str | None:
    """Return the first row without a value that lm-eval would write as the text None."""
    config, rows = vars(task.config), task.dataset[split]
    if callable(config["process_docs"]):
        return None
    plain = [one for name in FIELDS[1:] if not _has_test(one := config[name])]
    for column in dict.fromkeys(name for one in plain for name in _read_by(one)):
        if column in rows.column_names and rows.data.column(column).null_count:
            number = rows[column][:].index(None) + 1
            return f"row {number} has no {column}"
    return None


def _has_test(field: Any) -> bool:
    """Return whether a template or function may treat a missing value by itself."""
    return callable(field) or (isinstance(field, str) and TESTS.search(field) is not None)


def describe_misfit(task: Task, split: str, fault: str) -> str:
    """Return a clause on rows that a task cannot ask: the columns it needs, and those they have."""
    columns = task.dataset[split].column_names
    needed = find_needed(vars(task.config))
    lacking = [one for one in needed if one not in columns]
    wants = f"; {task.task_name} reads the columns {', '.join(needed)}" if needed else ""
    what = f"the column {', '.join(lacking)} is missing" if lacking else fault
    return f"{what}{wants}, and the rows have {', '.join(columns)}"


def find_misfit(task: Task) -> Misfit | None:
    """Return the first row that a task cannot ask or show; None if it takes them all."""
    splits = [asked_split(task)]
    if task.config.num_fewshot:
        splits.append(task.fewshot_cfg.split)
    for split in filter(None, dict.fromkeys(splits)):
        if split in task.dataset and (fault := _find_row_fault(task, split)) is not None:
            return Misfit(split, describe_misfit(task, split, fault))
    return None


def _find_row_fault(task: Task, split: str) -> str | None:
    try:
        process = task.config.process_docs
        rows = task.dataset[split]
        docs = process(rows) if callable(process) else rows
    except ROW_ERRORS as error:
        return f"process_docs: {describe_error(error)}"
    if len(docs) == 0:
        return f"the {split} split has no rows"
    if "multiple_input" not in vars(task):  # lm-eval has not come to the rows yet
        return None
    task.features = list(docs.features)
    for number, doc in enumerate(docs, start=1):
        for name in (*FIELDS[1:], *AROUND):
            try:
                _render(task, name, doc)
            except ROW_ERRORS as error:
                return f"row {number}: {name}: {describe_error(error)}"
    return None


def _render(task: Task, name: str, doc: Mapping[str, Any]) -> None:
    """Take one field of a row as lm-eval does, for the error that it may raise."""
    template = getattr(task.config, name)
    if name in AROUND:
        task.resolve_field(doc, template)
    elif name != "doc_to_choice" or template is not None:
        value = getattr(task, name)(doc)
        if name == "doc_to_text" and not isinstance(value, str) and not task.multiple_input:
            raise ValueError(f"it gives {value!r}, which is no text")


def describe_error(error: BaseException) -> str:
    """Return what a template, a function or a library says of a row."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, KeyError):
        return f"there is no {cause.args[0]!r}" if cause.args else "a key is missing"
    return first_line(cause) if str(cause).strip() else type(cause).__name__
