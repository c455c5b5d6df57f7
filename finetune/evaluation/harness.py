"""Score a model on lm-eval tasks and keep every question's outcome.

lm-eval decides tasks, prompts, metrics and aggregation. A score is stored under the identity of
all that determines it, so that it is computed once, whoever asks for it again.
"""

from __future__ import annotations

import json
import logging
import random
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator

from finetune.config.schema import EvaluationConfig
from finetune.evaluation import bootstrap
from finetune.evaluation.aggregation import find_definitions
from finetune.evaluation.loglikelihood import SharedContextLM
from finetune.evaluation.question_bar import named_alike
from finetune.evaluation.scoring import Scoring
from finetune.evaluation.task_templates import quick_and_quiet
from finetune.evaluation.tasks import SEED, LoadedTask, chat_settings
from finetune.files import Damaged, digest, read_json, set_aside, write_atomic
from finetune.models.precision import TORCH_DTYPES
from finetune.statistics.metrics import Metric
from finetune.tracking.claims import CLAIM_FILE, Claim, claimed

log = logging.getLogger("finetune")


@dataclass(frozen=True)
class Item:
    """One question's outcome: metric -> lm-eval's value (acc: 0 or 1; mcc: gold and predicted)."""

    hash: str  # of the question
    prompt_hash: str
    outcomes: dict[str, Any]
    member: str | None = None  # the question's task, in a group
    said: Any = None  # each choice's log-likelihood, or the generated text


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
    members: dict[str, dict[str, float]] = field(default_factory=dict)  # a group's tasks' metrics
    definitions: dict[str, Metric] = field(default_factory=dict)  # by metric
    setup: dict[str, Any] = field(default_factory=dict)  # what two comparable scores share
    lacks_texts: bool = False  # that were generated, and not kept

    def describe(self) -> str:
        """Return one line for the log: what was scored, how long it took, and what to know."""
        how = self.scoring
        line = f"{self.task}: {len(self.items)} questions in {self.seconds:.1f} s"
        if how.path == "plain":
            line += f", scored by lm-eval's HFLM since {how.reason}"
        if how.sampled:
            line += f"; evaluation.dtype flipped {how.flipped} of {how.sampled} sampled answers"
        return line

    def without_texts(self) -> TaskScore:
        """Return the score without generated texts, also as metrics keep them (bleu's pairs)."""
        items = [_without_texts(item) for item in self.items]
        return replace(self, items=items, lacks_texts=self.lacks_texts or items != self.items)

    def summary(self) -> dict[str, Any]:
        """Return the score without its questions, but with their number."""
        fields = {name: value for name, value in asdict(self).items() if name != "items"}
        return {**fields, "num_questions": len(self.items)}


def score(lm: SharedContextLM, task: LoadedTask, evaluation: EvaluationConfig) -> TaskScore:
    """Let lm-eval run one task, or one group of tasks, on the model."""
    started = time.monotonic()
    # What simple_evaluate seeds, so that the same call gives the same prompts and numbers.
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for one in task.tasks.values():
        one.set_fewshot_seed(seed=SEED)
    with quick_and_quiet(), named_alike(), bootstrap.in_process():
        results = evaluator.evaluate(
            lm, task.loaded, limit=evaluation.limit, log_samples=True,
            **chat_settings(task.name, evaluation),
        )  # fmt: skip
    assert results is not None
    shots = {results["n-shot"][name] for name in task.tasks}
    items = [
        item
        for name, samples in results["samples"].items()
        for item in _items(samples, None if name == task.name else name)
    ]
    found = TaskScore(
        task=task.name,
        version=str(results["versions"].get(task.name)),
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        metrics=_metrics(results["results"][task.name]),
        seconds=time.monotonic() - started,
        scoring=lm.scoring,
        items=items,
        members={
            name: _metrics(results["results"][name]) for name in task.tasks if name != task.name
        },
        definitions=find_definitions(task, results["results"][task.name]),
        setup=_setup(lm, task, evaluation),
    )
    return found if evaluation.keep_texts else found.without_texts()


def _setup(lm: SharedContextLM, task: LoadedTask, evaluation: EvaluationConfig) -> dict[str, Any]:
    """Return the settings that the scores of two runs must share to be comparable."""
    return {
        "limit": evaluation.limit,
        "num_fewshot": evaluation.num_fewshot,
        "chat_template": evaluation.chat_template,
        "dtype": str(TORCH_DTYPES.get(evaluation.dtype) or lm.model.dtype).removeprefix("torch."),
        "digest": task.digest,
    }


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """Turn lm-eval's `acc,none` into `acc`; a named filter stays in the name, stderr last."""
    metrics = {}
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if comma and isinstance(value, int | float):
            error = "_stderr" if metric.endswith("_stderr") else ""
            named = "" if kind == "none" else f"_{kind}"
            metrics[metric.removesuffix("_stderr") + named + error] = float(value)
    return metrics


def _items(samples: list[dict[str, Any]], member: str | None) -> list[Item]:
    """Return one item per question, with the outcomes of all filters of the task."""
    items: dict[int, Item] = {}
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f"_{sample['filter']}"
        outcomes = {f"{metric}{suffix}": _plain(sample[metric]) for metric in sample["metrics"]}
        known = {metric: value for metric, value in outcomes.items() if value is not None}
        said = _said(sample["resps"])
        empty = Item(sample["doc_hash"], sample["prompt_hash"], {}, member, said)
        items.setdefault(sample["doc_id"], empty).outcomes.update(known)
    return list(items.values())


def _said(responses: list[list[Any]]) -> list[float] | str | None:
    """Return the log-likelihood of each request, or the text of the only one."""
    first = [one[0] for one in responses if one]
    if first and isinstance(first[0], str):
        return str(first[0])
    values = [one[0] if isinstance(one, tuple | list) else one for one in first]
    is_plain = all(isinstance(value, int | float) for value in values)
    return [round(float(value), 4) for value in values] if is_plain else None


def _without_texts(item: Item) -> Item:
    outcomes = {name: value for name, value in item.outcomes.items() if not _has_text(value)}
    return replace(item, outcomes=outcomes, said=None if _has_text(item.said) else item.said)


def _has_text(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_text, (*value, *value.values())))
    return isinstance(value, str) or (isinstance(value, list) and any(map(_has_text, value)))


def _plain(value: Any) -> Any:
    """Return a metric's value of one question as JSON holds it; None where it cannot."""
    if isinstance(value, bool | int | float):
        return float(value)
    try:
        plain: Any = json.loads(json.dumps(value, default=_from_numpy))
    except (TypeError, ValueError):
        return None
    return float(plain) if isinstance(plain, bool | int | float) else plain


def _from_numpy(value: Any) -> Any:
    """Return numpy's numbers and arrays as Python's, for `json.dumps`."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


@dataclass(frozen=True)
class ScoreStore:
    """Scores in a folder, one file each, named by task and identity and checked when read."""

    folder: Path

    def read(self, task: str, identity: str) -> TaskScore | None:
        """Return the score, or None where there is none or its file is damaged."""
        return self._read(self.path(task, identity))

    def _read(self, path: Path) -> TaskScore | None:
        try:
            fields = _read_fields(path)
        except Damaged as damage:
            log.warning("the stored score %s is damaged (%s); it is computed again", path, damage)
            return None
        if fields is None:
            return None
        items = [Item(**item) for item in fields["items"]]
        definitions = {name: Metric(**kind) for name, kind in fields["definitions"].items()}
        return TaskScore(
            **{
                **fields,
                "items": items,
                "scoring": Scoring(**fields["scoring"]),
                "definitions": definitions,
            }
        )

    def write(self, identity: str, score: TaskScore) -> None:
        """Write a score; another process that was halted may have written the same one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(score.task, identity)
        try:
            _read_fields(path)
        except Damaged as damage:
            set_aside(path, str(damage))
        _write_score(path, score)

    def drop_texts(self) -> None:
        """Remove generated texts from all scores of the folder, whenever they were stored."""
        for path in sorted(self.folder.glob("*.json")):
            score = self._read(path)
            if score is not None and score != (kept := score.without_texts()):
                _write_score(path, kept)

    def claimed(self, task: str, identity: str) -> AbstractContextManager[Claim]:
        """Return a claim under which one process computes what the others then read."""
        return claimed(Path(f"{self.path(task, identity)}{CLAIM_FILE}"))

    def path(self, task: str, identity: str) -> Path:
        """Return the file of a score."""
        return self.folder / f"{task}-{identity[:16]}.json"


def _write_score(path: Path, score: TaskScore) -> None:
    fields = asdict(score)
    write_atomic(path, json.dumps({"sha256": digest(fields), "score": fields}))


def _read_fields(path: Path) -> dict[str, Any] | None:
    """Return the fields of a stored score; None where there is none.

    Raises:
        Damaged: they are not what was written.
    """
    stored = read_json(path, dict)
    if stored is None:
        return None
    fields = stored.get("score")
    if not isinstance(fields, dict) or stored.get("sha256") != digest(fields):
        raise Damaged("it was altered")
    return fields
