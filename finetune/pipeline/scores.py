"""A run's scores: each model's computed once per identity, and written into the run's folder.

The base's are shared by all runs of this user, the tuned model's stay with the run.
"""

from __future__ import annotations

import json
import logging
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.inputs import Inputs
from finetune.config.schema import Config
from finetune.evaluation import harness
from finetune.evaluation.aggregation import draw_resamples
from finetune.evaluation.forecast import Speeds
from finetune.evaluation.harness import ScoreStore, TaskScore
from finetune.evaluation.loglikelihood import SharedContextLM
from finetune.evaluation.question_texts import describe_questions
from finetune.evaluation.tasks import SEED, LoadedTask
from finetune.files import digest
from finetune.home import cache_dir
from finetune.models.precision import TORCH_DTYPES
from finetune.pipeline.identity import EVALUATION_VERSIONS, find_versions, model_identity
from finetune.pipeline.session import Session
from finetune.statistics.metric_names import MetricName
from finetune.tracking.events import EventLog
from finetune.tracking.run_folder import RunFolder

log = logging.getLogger("finetune")

SCORING = 6  # raised when the way to score could change a number; stored scores are then renewed

SCORES = "scores"  # folder of the tuned model's stored scores


def forecasts(config: Config, inputs: Inputs, asked: Sequence[LoadedTask]) -> list[str]:
    """Return a line per task to be scored: its questions, and how long they will take."""
    speeds = find_speeds(config, inputs)
    return [speeds.forecast(task) for task in asked]


def find_speeds(config: Config, inputs: Inputs) -> Speeds:
    """Return how fast the model was scored before, on this machine."""
    model = model_identity(config, inputs.source, inputs.device)
    where = [platform.node(), inputs.device, config.evaluation.dtype]
    name = digest([model, *where])[:16]
    return Speeds(cache_dir() / "speeds" / f"{name}.json")


def build_scorers(config: Config, inputs: Inputs, folder: RunFolder) -> list[Scorer]:
    """Return the scorer of the tuned model, and the base's where it is asked for.

    The base's scores are shared by all runs of this user.
    """
    tuned = Scorer(config, inputs, ScoreStore(folder.evaluation / SCORES), inputs.identity)
    base = Scorer(config, inputs, ScoreStore(cache_dir() / "evaluations"), None)
    if config.training.is_skipped and config.model.adapter is None:
        return [base]  # nothing is tuned
    return [tuned, base] if config.evaluation.base else [tuned]


@dataclass(frozen=True)
class Scorer:
    """Scores one model, base (`adapter` None) or tuned, on tasks, each once per identity."""

    config: Config
    inputs: Inputs
    store: ScoreStore
    adapter: str | None

    def identity(self, task: LoadedTask) -> str:
        loaded = replace(self.config, model=self.inputs.model)
        return digest(
            {
                "model": model_identity(self.config, self.inputs.source, self.inputs.device),
                "adapter": self.adapter,
                "task": task.name,
                "digest": task.digest,
                "dtype": self.config.evaluation.dtype,
                "seed": SEED,
                "scoring": SCORING,
                "versions": find_versions(loaded, EVALUATION_VERSIONS),
            }
        )

    def asked(self, tasks: list[LoadedTask]) -> list[LoadedTask]:
        """Return the tasks to score the model on: the base is no candidate for the best run."""
        return [task for task in tasks if self.adapter or not task.selects]

    def has(self, tasks: list[LoadedTask]) -> bool:
        return not self.missing(tasks)

    def missing(self, tasks: list[LoadedTask]) -> list[Path]:
        """Return the files of the scores that are not stored yet."""
        stored = self.read(tasks)
        files = zip(self.asked(tasks), self.files(tasks), strict=True)
        return [file for task, file in files if task.key not in stored]

    def read(self, tasks: list[LoadedTask]) -> dict[str, TaskScore]:
        """Return the stored scores by the task's key, with texts if these are to be kept."""
        found = {task.key: self._read(task) for task in self.asked(tasks)}
        return {key: score for key, score in found.items() if score is not None}

    def _read(self, task: LoadedTask) -> TaskScore | None:
        """Return a stored score; without texts it is as good as none where texts are kept."""
        identity = self.identity(task)
        score = self.store.read(task.name, identity)
        if score is None or self.config.evaluation.keep_texts:
            return None if score is None or score.lacks_texts else score
        private = score.without_texts()
        if private != score:  # it was stored when texts were kept
            self.store.write(identity, private)
        return private

    def files(self, tasks: list[LoadedTask]) -> list[Path]:
        """Return the files of the stored scores."""
        return [self.store.path(task.name, self.identity(task)) for task in self.asked(tasks)]

    def score(
        self,
        tasks: list[LoadedTask],
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        base: Mapping[str, TaskScore] | None = None,
    ) -> None:
        """Compute the scores that are not stored yet.

        Args:
            tasks: of the run; see `asked`.
            model: base or tuned.
            tokenizer: the model's.
            base: the base's scores, by task; a tuned model is checked less where its base passed.
        """
        settings, side = self.config.evaluation, "tuned" if self.adapter else "base"
        passed = {key for key, one in (base or {}).items() if one.scoring.path == "shared"}
        speeds = find_speeds(self.config, self.inputs)
        for task in self.asked(tasks):
            identity = self.identity(task)
            with self.store.claimed(task.name, identity):
                if self._read(task) is None:
                    lm = SharedContextLM(
                        model,
                        tokenizer,
                        batch_tokens=settings.batch_tokens,
                        dtype=TORCH_DTYPES.get(settings.dtype),
                        base_passed=task.key in passed,
                    )
                    log.info("scoring %s: %s", side, speeds.forecast(task))
                    score = harness.score(lm, task, settings)
                    self.store.write(identity, score)
                    speeds.record(task, score.seconds)
                    log.info("%s: %s", side, score.describe())


def write_scores(
    folder: RunFolder,
    tuned: Mapping[str, TaskScore],
    base: Mapping[str, TaskScore],
    tasks: Sequence[LoadedTask] = (),
    *,
    keep_texts: bool = True,
) -> None:
    """Write each task's scores and its questions' outcomes, base beside tuned.

    Args:
        folder: the run's.
        tuned: by the task's key.
        base: the same tasks of the base; none where it was not asked.
        tasks: as loaded, for the texts of questions, and to resample the metrics that only
            lm-eval computes.
        keep_texts: whether the questions' texts are written; if not, those that were kept with
            earlier scores of the run are removed.
    """
    loaded = {task.key: task for task in tasks}
    if not keep_texts:
        ScoreStore(folder.evaluation / SCORES).drop_texts()
        tuned, base = (
            {k: one.without_texts() for k, one in side.items()} for side in (tuned, base)
        )
    for name, score in tuned.items():
        pair = {"tuned": score, **({"base": base[name]} if name in base else {})}
        folder.write_json(
            f"evaluation/{name}.json", {side: one.summary() for side, one in pair.items()}
        )
        items = _paired_items(pair, loaded.get(name) if keep_texts else None)
        lines = "".join(json.dumps(line) + "\n" for line in items)
        folder.write_text(f"evaluation/{name}.items.jsonl", lines)
        if name in base and name in loaded:
            _write_resamples(folder, loaded[name], score, items)


def _paired_items(pair: Mapping[str, TaskScore], task: LoadedTask | None) -> list[dict[str, Any]]:
    """Return one entry a question, with the outcomes and answers of both sides, and its texts."""
    texts = {} if task is None else describe_questions(task)
    asked: Counter[tuple[str | None, str]] = Counter()
    items: dict[tuple[str | None, str, int], dict[str, Any]] = {}
    for side, one in pair.items():
        seen: Counter[tuple[str | None, str]] = Counter()  # the same question may be asked twice
        for item in one.items:
            seen[item.member, item.hash] += 1
            key = item.member, item.hash, seen[item.member, item.hash]
            entry = {"hash": item.hash, "prompt": item.prompt_hash}
            if item.member is not None:
                entry["task"] = item.member
            if key not in items:
                asked[item.member, item.prompt_hash] += 1
                number = asked[item.member, item.prompt_hash]
                items[key] = entry | texts.get((item.member, item.prompt_hash, number), {})
            items[key][side] = item.outcomes
            if item.said is not None:
                items[key].setdefault("said", {})[side] = item.said
    return list(items.values())


def _write_resamples(
    folder: RunFolder, task: LoadedTask, score: TaskScore, items: Sequence[Mapping[str, Any]]
) -> None:
    """Store resamples of the metrics that a report cannot compute itself, once per outcomes."""
    drawn = {}
    path = f"resamples/{task.key}.json"
    known = folder.read_json(path) or {}
    for metric, definition in score.definitions.items():
        if definition.is_known:
            continue
        answers: dict[str | None, list[tuple[Any, Any]]] = {}
        for item in sorted(items, key=lambda item: (item["hash"], item["prompt"])):
            sides = [item.get(side, {}).get(metric) for side in ("base", "tuned")]
            if None not in sides:
                answers.setdefault(item.get("task"), []).append((sides[0], sides[1]))
        of = digest([definition.aggregation, sorted(answers.items(), key=str)])
        if known.get(metric, {}).get("of") == of:
            drawn[metric] = known[metric]
        elif answers:
            log.info("%s: resampling %s, which only lm-eval computes", task.key, metric)
            drawn[metric] = {"of": of, **draw_resamples(task, metric, definition, answers)}
    if drawn:
        folder.write_json(path, drawn)


def record_scores(
    events: EventLog, tuned: Mapping[str, TaskScore], base: Mapping[str, TaskScore]
) -> None:
    """Record the scores in the run's event log."""
    for name, score in tuned.items():
        is_selection = name != score.task
        named = {key: MetricName(score.task, key) for key in score.metrics}
        values = {
            n.selection if is_selection else str(n): score.metrics[k] for k, n in named.items()
        }
        for key, value in base[name].metrics.items() if name in base else ():
            values[MetricName(name, key).base] = value
        events.scores(values)


def record_artifacts(folder: RunFolder, events: EventLog) -> None:
    """Record the run's adapter, model and scores in its event log."""
    for path in ("adapter", "model", "evaluation"):
        if (folder.path / path).exists():
            events.artifact(path, path)


def is_done(config: Config, inputs: Inputs, folder: RunFolder, session: Session) -> bool:
    """Return whether the run finished, also for the tasks and limits asked for now."""
    status = folder.status()
    if status is None or status.state != "finished" or folder.find_damage():
        return False
    tasks = session.tasks(config, inputs.source)
    return all(scorer.has(tasks) for scorer in build_scorers(config, inputs, folder))
