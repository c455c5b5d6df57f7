"""lm-eval's tasks, built with their questions, from the hub or from local files.

lm-eval decides tasks and prompts; a local file only takes the place of a task's data set.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from finetune.config.rules import OWN_PROMPTS, OWN_TASKS
from finetune.config.schema import EvaluationConfig
from finetune.evaluation.gold_answers import check_golds
from finetune.evaluation.local_data import local_entries
from finetune.evaluation.prefix_tree import count_tokens
from finetune.evaluation.task_checks import find_unaggregated
from finetune.evaluation.task_folder import KEY, Definition, find_contents, is_local
from finetune.evaluation.task_index import find_folder, find_manager, find_notes
from finetune.evaluation.task_rows import ROW_ERRORS, Misfit, describe_error, find_misfit, watched
from finetune.evaluation.task_templates import quick_and_quiet, sandboxed
from finetune.files import digest
from finetune.models import hub
from finetune.models.chat_templates import fix_date
from finetune.substitution import updated

log = logging.getLogger("finetune")

SEED = 1234  # lm-eval's own default, for few-shot sampling among others
BuildOwn = Callable[[], tuple[dict[str, Any], list[str]]]  # loaded by lm-eval, and notes


@dataclass(frozen=True)
class LoadedTask:
    """A task as lm-eval builds it: one task or a group of them, and its requests' digest."""

    name: str
    loaded: dict[str, Any]  # what TaskManager.load returns
    digest: str  # of its definition, its requests and their documents
    selects: bool = False  # whether it asks the questions that choose the best run
    notes: str = ""  # what is worth knowing, such as gold answers that nothing can match

    @property
    def tasks(self) -> dict[str, Task]:
        tasks: dict[str, Task] = self.loaded["tasks"]
        return tasks

    @property
    def key(self) -> str:
        """The name of its files."""
        return f"{self.name}.select" if self.selects else self.name

    @property
    def requests(self) -> list[Instance]:
        return [request for task in self.tasks.values() for request in task.instances]

    @cached_property
    def num_characters(self) -> int:
        """The length of all its requests, what they begin with in common counted once."""
        return count_tokens(["".join(map(str, request.args)) for request in self.requests])


def load_task(
    name: str,
    evaluation: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    selects: bool = False,
    build: BuildOwn | None = None,
) -> LoadedTask:
    """Build a task with its data and its requests, as `lm_eval.simple_evaluate` would.

    Args:
        name: an lm-eval task or group, or one of OWN_TASKS.
        evaluation: shots, limit, files, chat template or not.
        tokenizer: has the chat template, where one is asked for.
        selects: ask the questions of `evaluation.select_split` instead of the task's own.
        build: builds one of OWN_PROMPTS.

    Raises:
        ValueError: the task lacks the split or file, cannot be scored, or would choose the best run
            on the questions that it is reported on.
    """
    loaded, notes = (_load(name, evaluation), []) if build is None else build()
    chat: dict[str, Any] = chat_settings(name, evaluation)
    if chat["apply_chat_template"]:
        assert tokenizer is not None, "a chat template is some tokenizer's"
        chat["chat_template"] = _chat_template(tokenizer)
    with quick_and_quiet():
        for task in loaded["tasks"].values():
            _set_fewshot(task, evaluation)
            if selects and build is None:
                _ask_split(task, evaluation.select_split or "")
            limit = get_sample_size(task, evaluation.limit)  # a share is of each task's questions
            _build_requests(task, name, evaluation, {"limit": limit, **chat})
        notes += [*check_golds(loaded["tasks"], name, evaluation), *find_notes(name, evaluation)]
    contents: list[Any] = [
        [task.VERSION, _definition(task), [(one.args, one.doc) for one in task.instances]]
        for task in loaded["tasks"].values()
    ]
    contents += find_contents(evaluation, name)
    return LoadedTask(
        name, loaded, digest(json.dumps(contents, default=_render_value)), selects, "; ".join(notes)
    )


def _build_requests(
    task: Task, name: str, evaluation: EvaluationConfig, asked: dict[str, Any]
) -> None:
    """Build a task's requests.

    Raises:
        ValueError: there are too few solved examples, or a row that the task cannot ask.
    """
    try:
        task.build_all_requests(rank=0, world_size=1, **asked)
    except ROW_ERRORS as error:
        if "larger than population" in str(error):  # random.sample's words
            shots = task.config.num_fewshot
            raise ValueError(
                f"evaluation.num_fewshot is {shots}, but {task.task_name} has fewer solved "
                "examples; lower it"
            ) from None
        misfit = find_misfit(task)
        if misfit is not None:
            raise ValueError(f"{_source(name, evaluation, misfit.split)}: {misfit}") from None
        if evaluation.chat_template or name in OWN_TASKS:
            raise  # the chat template's
        source = _source(name, evaluation, None)
        raise ValueError(f"{source}: lm-eval cannot ask it: {describe_error(error)}") from None


def _source(name: str, evaluation: EvaluationConfig, split: str | None) -> str:
    """Return the setting that names the rows of a task's split."""
    if files := evaluation.data_files.get(name):
        return f"evaluation.data_files.{name}" + (
            f".{split}={files[split]}" if split in files else ""
        )
    definition = find_folder(evaluation).find(name)
    return f"{KEY}: {definition.path}: {name}" if definition else f"evaluation.tasks={name}"


def _load(name: str, evaluation: EvaluationConfig) -> dict[str, Any]:
    """Let lm-eval build a task or group; refuse one that would fail later, or has no score."""
    if name == "demo_science":
        from finetune.demo.task import task_config

        return dict(TaskManager(include_defaults=False).load([task_config()]))
    manager = find_manager(name, evaluation)
    local = local_entries(name, manager.task_index, evaluation)
    if not local and not is_local(name, evaluation):
        hub.is_reached()  # else datasets would retry several times
    with updated(manager.task_index, local), sandboxed():
        loaded = _build(name, manager, evaluation)
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ValueError(
                f"evaluation.tasks: {task.task_name} runs code that the model writes, or has "
                "images or audio, which is not supported; remove it"
            )
    if name in loaded["groups"]:
        _check_group(name, loaded, find_folder(evaluation).find(name))
    return loaded


def _check_group(name: str, loaded: dict[str, Any], own: Definition | None) -> None:
    """Check that a group has a score.

    Raises:
        ValueError: it has none, or one of a metric that its tasks lack.
    """
    group = loaded["groups"][name]
    if group.has_aggregation and own is None:
        return
    if own is None:
        raise ValueError(
            f"evaluation.tasks: {name} is a group that has no score of its own; name its tasks: "
            f"evaluation.tasks=[{','.join(loaded['group_map'][name])}]"
        )
    faults = list(find_unaggregated(group, group.get_all_tasks()))
    if not group.has_aggregation:
        faults = [
            "aggregate_metric_list is missing, without which a group has no score of its own; add "
            "it, or name its tasks"
        ]
    if faults:
        raise ValueError(f"{KEY}: {own.path}: {name}: {'; '.join(faults)}")


def _build(name: str, manager: TaskManager, evaluation: EvaluationConfig) -> dict[str, Any]:
    """Let lm-eval build a task or group.

    Raises:
        ValueError: rows or definition are of another kind than it takes.
        OSError: the hub does not have its data, or is out of reach.
    """
    is_own = bool(evaluation.data_files.get(name)) or bool(find_folder(evaluation).used(name))
    read: list[Task] = []
    try:
        with watched(checks_names=is_own) as read:
            return dict(manager.load([name]))
    except Misfit as misfit:
        raise ValueError(f"{_source(name, evaluation, misfit.split)}: {misfit}") from None
    except (OSError, ImportError):
        raise
    except Exception as error:  # of lm-eval, the hub's libraries, or trusted code
        log.debug("a task cannot be built", exc_info=error)
        found = find_misfit(read[-1]) if read else None
        if found is not None:
            raise ValueError(f"{_source(name, evaluation, found.split)}: {found}") from None
        source = _source(name, evaluation, None)
        if isinstance(error, IndexError) and read:  # of lm-eval's look at the first row
            raise ValueError(
                f"{source}: the gold answer of the first row is none of its choices; write one of "
                "them, or its index from 0"
            ) from None
        if not is_own or (isinstance(error, ValueError) and name in evaluation.data_files):
            raise
        raise ValueError(f"{source}: lm-eval cannot build it: {describe_error(error)}") from None


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return lm-eval's function that renders turns as text, without a model; dates are fixed."""
    text = tokenizer.get_chat_template()
    dated = {} if (fixed := fix_date(text)) == text else {"chat_template": fixed}
    return partial(
        HFLM.apply_chat_template, SimpleNamespace(tokenizer=tokenizer, chat_template_args=dated)
    )


def chat_settings(name: str, evaluation: EvaluationConfig) -> dict[str, bool]:
    """Return whether a task is put into the chat template, and how."""
    is_applied = evaluation.chat_template and name not in OWN_PROMPTS
    return {
        "apply_chat_template": is_applied,
        "fewshot_as_multiturn": is_applied and evaluation.fewshot_as_multiturn,
    }


def _render_value(value: Any) -> str:
    """Return what JSON cannot hold as text that is the same in every process: code as its source.

    lm-eval puts functions into `fewshot_config` as they are, whose text is an address.
    """
    if not callable(value):
        return str(value)
    if isinstance(value, partial):
        return json.dumps([value.func, value.args, value.keywords], default=_render_value)
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}.{kind.__qualname__}"


def _definition(task: Task) -> dict[str, Any]:
    """Return the definition of a task without its questions and their location."""
    source = ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "metadata")
    return {name: value for name, value in task.dump_config().items() if name not in source}


def _set_fewshot(task: Task, evaluation: EvaluationConfig) -> None:
    """Set shots and their seed like `simple_evaluate`: a task that says 0 stays at 0."""
    own = task.get_config("num_fewshot")
    if evaluation.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=evaluation.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


def _ask_split(task: Task, split: str) -> None:
    """Make a task ask the questions of other splits, joined by `+`."""
    import datasets

    names, have = split.split("+"), list(task.dataset)
    key = f"evaluation.select_split={split}"
    for name in names:
        if name not in have:
            raise ValueError(f"{key}: {task.task_name} has no {name!r}, only {', '.join(have)}")
    if (task.config.test_split or task.config.validation_split) in names:
        raise ValueError(f"{key}: {task.task_name} is reported on it; set another split")
    solved = task.fewshot_cfg.split or task.config.training_split or task.config.validation_split
    if task.config.num_fewshot and solved in names:
        raise ValueError(
            f"{key}: {task.task_name} takes its solved examples from {solved}; leave it out"
        )
    joined = datasets.concatenate_datasets([task.dataset[name] for name in names])
    task.dataset = datasets.DatasetDict({**task.dataset, split: joined})
    task.set_config(key="test_split", value=split)
