"""Score a model on lm-eval tasks and keep every question's outcome.

lm-eval decides tasks, prompts, metrics and aggregation. A score is stored under the identity of
all that determines it, so that it is computed once, whoever asks for it again.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval
import lm_eval.api.task
import lm_eval.utils
import numpy as np
import torch
from filelock import FileLock
from lm_eval import evaluator
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from finetune.config import EvaluationConfig, nearest
from finetune.rows import read_file
from finetune.run_folder import digest, write_atomic
from finetune.scoring import Scoring, SharedContextLM

SEED = 1234  # lm-eval's own default, for few-shot sampling among others
STOCK_TASKS = Path(lm_eval.__file__).parent / "tasks"


@dataclass(frozen=True)
class Item:
    """One question's outcome: metric -> value (acc: 0 or 1)."""

    hash: str  # of the question
    prompt_hash: str
    outcomes: dict[str, float]


@dataclass(frozen=True)
class TaskScore:
    """One model's score on one task, as lm-eval aggregates it."""

    task: str
    version: str
    num_fewshot: int | None
    metrics: dict[str, float]  # acc, acc_stderr, acc_norm, ...
    seconds: float
    scoring: Scoring
    items: list[Item]

    def describe(self) -> str:
        """Return one line for the log: what was scored, how long it took, and what to know."""
        how = self.scoring
        line = f"{self.task}: {len(self.items)} questions in {self.seconds:.1f} s"
        if how.path == "plain":
            line += f", by lm-eval's own path since {how.reason}"
        if how.sampled:
            line += f"; another dtype flipped {how.flipped} of {how.sampled} sampled answers"
        return line

    def summary(self) -> dict[str, Any]:
        """Return the score without its questions, but with their number."""
        fields = {name: value for name, value in asdict(self).items() if name != "items"}
        return {**fields, "num_questions": len(self.items)}


@dataclass(frozen=True)
class LoadedTask:
    """A task as lm-eval builds it: one task or a group of them, and its requests' digest."""

    name: str
    loaded: dict[str, Any]  # what TaskManager.load returns
    digest: str  # of its definition, all its requests and the questions behind them
    selects: bool = False  # whether it asks the questions that choose the best run

    @property
    def tasks(self) -> dict[str, Task]:
        tasks: dict[str, Task] = self.loaded["tasks"]
        return tasks

    @property
    def key(self) -> str:
        """The name of its files."""
        return f"{self.name}.select" if self.selects else self.name


def find_task_problems(evaluation: EvaluationConfig) -> list[str]:
    """Return the tasks that lm-eval does not have, each with the nearest one that it has."""
    problems = []
    for name in evaluation.tasks:
        if name != "demo_science" and find_task_file(name) is None:
            known = stock_index().all_tasks
            close = nearest(name, known).partition("Known:")[0]
            problems.append(
                f"evaluation.tasks: lm-eval has no task {name!r}; {close}"
                f"`lm-eval ls tasks` lists all {len(known)}"
            )
    return problems


def find_task_file(name: str) -> Path | None:
    """Return the YAML file that defines a stock task or group.

    Looks at the files whose name contains a part of the task's first: indexing all of lm-eval's
    14,683 entries takes seconds.
    """
    stem = name.split("_")[0]
    for path in sorted(STOCK_TASKS.glob(f"*{stem}*/**/*.yaml")):
        text = path.read_text(encoding="utf-8")
        if f"task: {name}\n" in text or f"group: {name}\n" in text:
            return path
    entry = stock_index().task_index.get(name)
    return Path(entry.yaml_path) if entry is not None and entry.yaml_path else None


@lru_cache(maxsize=1)
def stock_index() -> TaskManager:
    """Return lm-eval's index of all its tasks; takes some six seconds."""
    return TaskManager()


def load_task(name: str, evaluation: EvaluationConfig, *, selects: bool = False) -> LoadedTask:
    """Build a task with its data and its requests, as `lm_eval.simple_evaluate` would.

    Args:
        name: an lm-eval task or group, or demo_science.
        evaluation: shots, limit and files.
        selects: ask the questions of `evaluation.select_split` instead of the task's own.

    Raises:
        ValueError: the task does not have that split, or it would flatter.
    """
    files = evaluation.data_files.get(name)
    if name == "demo_science":
        from finetune.demo.task import task_config

        loaded = TaskManager(include_defaults=False).load([task_config()])
    elif files:
        loaded = TaskManager(include_defaults=False).load([_local_config(name, files)])
    else:
        path = find_task_file(name)
        assert path is not None, "find_task_problems comes first"
        manager = TaskManager(include_defaults=False, include_path=str(path.parent))
        loaded = manager.load([name])
    with _quick_and_quiet():
        for task in loaded["tasks"].values():
            _set_fewshot(task, evaluation)
            if selects:
                _ask_split(task, evaluation.select_split or "")
            task.build_all_requests(limit=evaluation.limit, rank=0, world_size=1)
    told = [
        [task.VERSION, _definition(task), [(one.args, one.doc) for one in task.instances]]
        for task in loaded["tasks"].values()
    ]
    return LoadedTask(name, loaded, digest(json.dumps(told, default=str)), selects)


def _definition(task: Task) -> dict[str, Any]:
    """Return what defines a task beside its questions; where they lie is no part of it."""
    source = ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset")
    return {name: value for name, value in task.dump_config().items() if name not in source}


@contextmanager
def _quick_and_quiet() -> Iterator[None]:
    """Let lm-eval compile each template once instead of once a question, and show no bar for it."""
    templates, bar = lm_eval.utils.env.from_string, lm_eval.api.task.tqdm
    with (
        patch.object(lm_eval.utils.env, "from_string", lru_cache(maxsize=256)(templates)),
        patch.object(lm_eval.api.task, "tqdm", partial(bar, disable=True)),
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
    """Let a task ask the questions of other splits, joined by `+`, under its own definition."""
    import datasets

    names, have = split.split("+"), list(task.dataset)
    key = f"evaluation.select_split={split}"
    for name in names:
        if name not in have:
            raise ValueError(f"{key}: {task.task_name} has no {name!r}, only {', '.join(have)}")
    if (task.config.test_split or task.config.validation_split) in names:
        raise ValueError(f"{key}: {task.task_name} is reported on it; choose on another split")
    solved = task.fewshot_cfg.split or task.config.training_split or task.config.validation_split
    if task.config.num_fewshot and solved in names:
        raise ValueError(
            f"{key}: {task.task_name} takes its solved examples from {solved}; leave it out"
        )
    joined = datasets.concatenate_datasets([task.dataset[name] for name in names])
    task.dataset = datasets.DatasetDict({**task.dataset, split: joined})
    task.set_config(key="test_split", value=split)


def _local_config(name: str, files: dict[str, str]) -> dict[str, Any]:
    """Return the stock task with only the source of its documents replaced."""
    path = find_task_file(name)
    assert path is not None, "find_task_problems comes first"
    config: dict[str, Any] = load_yaml(path)
    for key in ("dataset_path", "dataset_name"):
        config.pop(key, None)
    config["custom_dataset"] = read_local
    config["dataset_kwargs"] = {"files": dict(files)}
    for key in ("training_split", "validation_split", "test_split"):
        if config.get(key) not in files:
            config[key] = None
    if config["training_split"] is None and config["validation_split"] is None:
        # Solved examples then come from the test split, less the question being asked.
        config["fewshot_split"] = config["test_split"]
    return config


def read_local(files: dict[str, str], **_: Any) -> Any:
    """Read split -> file into what lm-eval expects of `datasets.load_dataset`."""
    import datasets

    splits = {
        split: datasets.Dataset.from_list([dict(row) for row in read_file(Path(file), name=file)])
        for split, file in files.items()
    }
    return datasets.DatasetDict(splits)


def score(lm: SharedContextLM, task: LoadedTask, evaluation: EvaluationConfig) -> TaskScore:
    """Let lm-eval run one task, or one group of tasks, on the model."""
    started = time.monotonic()
    # What simple_evaluate seeds, so that the same call gives the same prompts and numbers.
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for one in task.tasks.values():
        one.set_fewshot_seed(seed=SEED)
    with _quick_and_quiet():
        results = evaluator.evaluate(lm, task.loaded, limit=evaluation.limit, log_samples=True)
    assert results is not None
    items = [item for samples in results["samples"].values() for item in _items(samples)]
    return TaskScore(
        task=task.name,
        version=str(results["versions"].get(task.name)),
        num_fewshot=next(iter(results["n-shot"].values()), None),
        metrics=_metrics(results["results"][task.name]),
        seconds=time.monotonic() - started,
        scoring=lm.scoring,
        items=items,
    )


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """Turn lm-eval's `acc,none` into `acc`; a filter of its own stays in the name."""
    return {
        key.replace(",none", "").replace(",", "_"): float(value)
        for key, value in result.items()
        if isinstance(value, int | float) and key != "sample_len" and "," in key
    }


def _items(samples: list[dict[str, Any]]) -> list[Item]:
    """Return one item a question; a task that filters answers in several ways has all in it."""
    items: dict[int, Item] = {}
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f"_{sample['filter']}"
        outcomes = {
            f"{metric}{suffix}": float(sample[metric])
            for metric in sample["metrics"]
            if isinstance(sample[metric], int | float)
        }
        empty = Item(sample["doc_hash"], sample["prompt_hash"], {})
        items.setdefault(sample["doc_id"], empty).outcomes.update(outcomes)
    return list(items.values())


@dataclass(frozen=True)
class ScoreStore:
    """Scores in a folder, one file each, named by task and identity and checked when read."""

    folder: Path

    def read(self, task: str, identity: str) -> TaskScore | None:
        """Return the score, or None where there is none or its file was altered."""
        try:
            stored = json.loads(self._path(task, identity).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError:
            stored = {}
        if stored.get("sha256") != digest(stored.get("score")):
            logging.getLogger(__name__).warning(
                "the stored score %s was altered; it is computed again", self._path(task, identity)
            )
            return None
        fields = stored["score"]
        items = [Item(**item) for item in fields["items"]]
        return TaskScore(**{**fields, "items": items, "scoring": Scoring(**fields["scoring"])})

    def write(self, identity: str, score: TaskScore) -> None:
        fields = asdict(score)
        text = json.dumps({"sha256": digest(fields), "score": fields})
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(score.task, identity), text)

    def locked(self, task: str, identity: str) -> FileLock:
        """Return a lock under which one process computes what the others then read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self._path(task, identity)}.lock")

    def _path(self, task: str, identity: str) -> Path:
        return self.folder / f"{task}-{identity[:16]}.json"
