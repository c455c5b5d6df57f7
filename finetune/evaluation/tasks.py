"""lm-eval's tasks, found by name and built with their questions, from the hub or from local files.

lm-eval decides tasks and prompts; a local file only takes the place of a task's data set.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import lm_eval.api.task
import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedTokenizerBase

from finetune.config.schema import EvaluationConfig
from finetune.data.questions import QuestionPrompt
from finetune.data.sources import Row, read_file
from finetune.evaluation import question_tasks
from finetune.evaluation.gold_answers import check_golds
from finetune.evaluation.prefix_tree import count_tokens
from finetune.files import digest
from finetune.models import hub
from finetune.models.chat_templates import fix_date
from finetune.problems import nearest
from finetune.substitution import substituted, updated

SEED = 1234  # lm-eval's own default, for few-shot sampling among others
OWN_TASKS = ("demo_science", question_tasks.NAME)
TASK_FILES = (".yaml", ".yml")
STOCK_TASKS = Path(lm_eval.__file__).parent / "tasks"


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


def load_task(
    name: str,
    evaluation: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    selects: bool = False,
    prompt: QuestionPrompt | None = None,
) -> LoadedTask:
    """Build a task with its data and its requests, as `lm_eval.simple_evaluate` would.

    Args:
        name: an lm-eval task or group, demo_science, or questions.
        evaluation: shots, limit, files, chat template or not.
        tokenizer: has the chat template, where one is asked for.
        selects: ask the questions of `evaluation.select_split` instead of the task's own.
        prompt: that a user's own questions are asked in.

    Raises:
        ValueError: the task lacks the split or file, cannot be scored, or would choose the best run
            on the questions that it is reported on.
    """
    if name == question_tasks.NAME:
        assert prompt is not None, "a user's questions are asked in a prompt"
        loaded, notes = question_tasks.load_questions(evaluation, prompt, selects=selects)
    else:
        loaded, notes = _load(name, evaluation), []
    chat: dict[str, Any] = {}
    if evaluation.chat_template and name != question_tasks.NAME:
        assert tokenizer is not None, "a chat template is some tokenizer's"
        chat = {"chat_template": _chat_template(tokenizer), **chat_settings(evaluation)}
    with quick_and_quiet():
        for task in loaded["tasks"].values():
            _set_fewshot(task, evaluation)
            if selects and name != question_tasks.NAME:
                _ask_split(task, evaluation.select_split or "")
            limit = get_sample_size(task, evaluation.limit)  # a share is of each task's questions
            try:
                task.build_all_requests(limit=limit, rank=0, world_size=1, **chat)
            except ValueError as error:
                if "larger than population" not in str(error):  # random.sample's words
                    raise
                shots = task.config.num_fewshot
                raise ValueError(
                    f"evaluation.num_fewshot is {shots}, but {task.task_name} has fewer solved "
                    "examples; lower it"
                ) from None
        notes += check_golds(loaded["tasks"], name, evaluation)
    contents = [
        [task.VERSION, _definition(task), [(one.args, one.doc) for one in task.instances]]
        for task in loaded["tasks"].values()
    ]
    return LoadedTask(
        name, loaded, digest(json.dumps(contents, default=str)), selects, "; ".join(notes)
    )


def _load(name: str, evaluation: EvaluationConfig) -> dict[str, Any]:
    """Let lm-eval build a task or group; refuse one that would fail later, or has no score."""
    if name == "demo_science":
        from finetune.demo.task import task_config

        return dict(TaskManager(include_defaults=False).load([task_config()]))
    manager = _find_manager(name)
    local = _local_entries(name, manager.task_index, evaluation)
    if not local:
        hub.is_reached()  # else datasets would retry several times
    with updated(manager.task_index, local):
        try:
            loaded = dict(manager.load([name]))
        except IndexError:  # of lm-eval's look at the first row
            raise ValueError(
                f"evaluation.data_files.{name}: the gold answer of the first row is none of its "
                "choices; write one of them, or its index from 0"
            ) from None
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ValueError(
                f"evaluation.tasks: {task.task_name} runs code that the model writes, or has "
                "images or audio, which is not supported; remove it"
            )
    if name in loaded["groups"] and not loaded["groups"][name].has_aggregation:
        raise ValueError(
            f"evaluation.tasks: {name} is a group that has no score of its own; name its tasks: "
            f"evaluation.tasks=[{','.join(loaded['group_map'][name])}]"
        )
    return loaded


def _find_manager(name: str) -> TaskManager:
    """Return an index that holds a task: its folder's, or all, for a group from several folders."""
    path = find_task_file(name)
    assert path is not None, "find_task_problems comes first"
    manager = TaskManager(include_defaults=False, include_path=str(path.parent))
    try:
        _members(name, manager.task_index)
    except KeyError:
        return stock_index()
    return manager


def _members(name: str, index: Mapping[str, Entry]) -> list[str]:
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
    return [member for one in below for member in _members(one, index)]


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return lm-eval's function that renders turns as text, without a model; dates are fixed."""
    text = tokenizer.get_chat_template()
    dated = {} if (fixed := fix_date(text)) == text else {"chat_template": fixed}
    return partial(
        HFLM.apply_chat_template, SimpleNamespace(tokenizer=tokenizer, chat_template_args=dated)
    )


def chat_settings(evaluation: EvaluationConfig) -> dict[str, bool]:
    return {
        "apply_chat_template": evaluation.chat_template,
        "fewshot_as_multiturn": evaluation.chat_template and evaluation.fewshot_as_multiturn,
    }


def _definition(task: Task) -> dict[str, Any]:
    """Return the definition of a task without its questions and their location."""
    source = ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "metadata")
    return {name: value for name, value in task.dump_config().items() if name not in source}


@contextmanager
def quick_and_quiet() -> Iterator[None]:
    """Let lm-eval compile each template once instead of once a question, and show no bar for it."""
    templates, bar = lm_eval.utils.env.from_string, lm_eval.api.task.tqdm
    with (
        substituted(lm_eval.utils.env, "from_string", lru_cache(maxsize=256)(templates)),
        substituted(lm_eval.api.task, "tqdm", partial(bar, disable=True)),
    ):
        yield


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


def _local_entries(
    name: str, index: Mapping[str, Entry], evaluation: EvaluationConfig
) -> dict[str, Entry]:
    """Return the stock definitions of a task, or of a group's, that read local files instead.

    Raises:
        ValueError: a split that is needed has no file, or the tasks are not defined by files.
    """
    files, key = evaluation.data_files.get(name), f"evaluation.data_files.{name}"
    if not files:
        return {}
    try:
        members = _members(name, index)
    except KeyError as missing:
        raise ValueError(f"{key}: it contains {missing}, which is not a task; name tasks") from None
    local, source = {}, LocalSource()
    for member in members:
        stock = load_yaml(index[member].yaml_path or "")
        config = _local_config(stock, files, evaluation.num_fewshot, key)
        subject = None if member == name else stock.get("dataset_name") or member
        config["dataset_kwargs"] = {"files": dict(files), "key": key, "subject": subject}
        config["custom_dataset"] = source
        local[member] = replace(index[member], yaml_path=None, cfg=config)
    return local


def _local_config(
    stock: Mapping[str, Any], files: Mapping[str, str], num_fewshot: int | None, key: str
) -> dict[str, Any]:
    """Return a stock definition with only the source of its documents replaced.

    Raises:
        ValueError: it needs a split that has no file.
    """
    config = dict(stock)
    asked = config.get("test_split") or config.get("validation_split")
    if asked is None:
        raise ValueError(f"{key}: {config['task']} is defined by code, which reads no local files")
    fewshot = {"split": config.get("fewshot_split"), **(config.get("fewshot_config") or {})}
    own = config.get("num_fewshot")
    shots = own if own == 0 or num_fewshot is None else num_fewshot
    if asked not in files:
        raise ValueError(f"{key}: {config['task']} asks its {asked} split; add +{key}.{asked}=FILE")
    training = config.get("training_split") or config.get("validation_split") or asked
    solved = fewshot["split"] or (asked if fewshot.get("samples") else training)
    if shots and solved not in files:
        raise ValueError(
            f"{key}: {config['task']} takes its {shots} solved examples from its {solved} split; "
            f"add +{key}.{solved}=FILE, or set evaluation.num_fewshot=0"
        )
    for name in ("dataset_path", "dataset_name"):
        config.pop(name, None)
    for name in ("training_split", "validation_split", "test_split"):
        if config.get(name) not in files:
            config[name] = None
    if fewshot["split"] and fewshot["split"] not in files:
        config["fewshot_config"] = {**fewshot, "split": asked}  # from which none is drawn
    return config


class LocalSource:
    """Read local files in place of the hub's, each once for all tasks of a group."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, list[Row]]] = {}  # by file and subject

    def __call__(self, files: Mapping[str, str], key: str, subject: str | None, **_: Any) -> Any:
        """Read split -> file into what lm-eval expects of `datasets.load_dataset`.

        Args:
            files: a split's rows, in the columns of the hub's data set.
            key: the setting that names them, for errors.
            subject: take only its rows; None takes all.
        """
        import datasets

        splits = {}
        for split, file in files.items():
            rows = self._of_subject(file, subject) if subject else read_file(Path(file), name=file)
            if rows is None:
                raise ValueError(
                    f"{key}.{split}={file} has no row whose column `subject` is {subject!r}; "
                    "a group's file has rows for each of its tasks"
                )
            splits[split] = datasets.Dataset.from_list([dict(row) for row in rows])
        return datasets.DatasetDict(splits)

    def _of_subject(self, file: str, subject: str) -> list[Row] | None:
        if file not in self._rows:
            rows: dict[str, list[Row]] = defaultdict(list)
            for row in read_file(Path(file), name=file):
                rows[row.get("subject", "")].append(row)
            self._rows[file] = dict(rows)
        return self._rows[file].get(subject)
