"""One run on one screen: check, load, score the base, train, score the result.

Runs in the worker process; the sweep reads what it leaves in the run's folder.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune import adapters, data, evaluation, models, prompts, training
from finetune.config import Config, EvaluationConfig, ModelConfig, find_problems
from finetune.data import Examples
from finetune.evaluation import LoadedTask, ScoreStore, TaskScore
from finetune.identity import (
    EVALUATION_VERSIONS,
    Inputs,
    describe_environment,
    find_inputs,
    find_precision,
    find_versions,
    model_identity,
    run_folder,
)
from finetune.models import Source
from finetune.run_folder import (
    EventLog,
    Job,
    Plan,
    RunFolder,
    State,
    Status,
    cache_dir,
    digest,
    slug,
    write_atomic,
)
from finetune.samples import NUM_SAMPLES, answer_samples
from finetune.scoring import SharedContextLM

log = logging.getLogger("finetune")

LESS_MEMORY = (
    "a smaller training.batch_size with more training.gradient_accumulation_steps, "
    "training.gradient_checkpointing=true or model.quantization=nf4 need less"
)
SCORING = 1  # raised when the way to score could change a number; stored scores are then renewed


def prepare(config: Config) -> Plan:
    """Check everything that can be known without loading weights, and name the run."""
    problems = find_problems(config)
    problems += training.find_optimizer_problems(config.optimizer)
    problems += evaluation.find_task_problems(config.evaluation)
    if config.training.device == "cuda" and not torch.cuda.is_available():
        problems.append(
            "training.device is cuda, and this machine has no CUDA device; "
            "use one that has, or set training.device=auto for the CPU"
        )
    else:
        problems += training.find_precision_problems(find_precision(config))
    for check in (_find_model_problems, _find_data_problems):
        try:
            problems += check(config)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    if problems:
        return Plan(None, problems)
    inputs = find_inputs(config)
    folder = run_folder(config, inputs)
    return Plan(folder.path, [], finished=_is_done(config, inputs, folder))


def _find_model_problems(config: Config) -> list[str]:
    source = models.find_model(config.model)
    model_config = models.load_config(config.model, source)
    problems = adapters.find_target_problems(
        models.load_meta_model(config.model, model_config), config.lora
    )
    longest = models.max_positions(model_config)
    if longest and config.training.max_length > longest:
        problems.append(
            f"training.max_length is {config.training.max_length}; "
            f"{config.model.path} was made for at most {longest} tokens"
        )
    return problems


def _find_data_problems(config: Config) -> list[str]:
    if any(problem.startswith("data.") for problem in find_problems(config)):
        return []
    tokenizer = None
    if config.data.prompt_template == "chat":
        with suppress(FileNotFoundError, ValueError):  # a missing model is told by its own check
            source = models.find_model(config.model)
            tokenizer = _tokenizer(json.dumps(asdict(config.model)), source)
    return data.find_problems(config.data, tokenizer)


@lru_cache(maxsize=8)
def _tokenizer(settings: str, source: Source) -> PreTrainedTokenizerBase:
    """Load a tokenizer once for all runs of this process; `settings` is its section as JSON."""
    return models.load_tokenizer(ModelConfig(**json.loads(settings)), source)


def run(job: Job) -> State:
    """Run one job and return how it ended; all it computed is in its folder."""
    inputs = find_inputs(job.config)
    folder = run_folder(job.config, inputs)
    with folder.locked(), _recording(folder) as events:
        if _is_done(job.config, inputs, folder):
            tuned, *base = _scorers(job.config, inputs, folder)
            tasks = _load_tasks(job.config)
            _write_scores(folder, tuned.read(tasks), base[0].read(tasks) if base else {})
            return "finished"
        started = time.time()
        _describe(job, inputs, folder, events)
        folder.write_status(Status("running", started=started))
        events.status("running")
        state, reason = _guarded(job.config, inputs, folder, events)
        if state != "finished":
            _release_memory()
        lines = folder.last_lines() if reason else []
        folder.write_status(Status(state, reason, started, time.time(), lines))
        events.status(state, reason)
    return state


def _is_done(config: Config, inputs: Inputs, folder: RunFolder) -> bool:
    """Return whether the run finished, also for the tasks and limits asked for now."""
    status = folder.status()
    if status is None or status.state != "finished":
        return False
    tasks = _load_tasks(config)
    stores = _scorers(config, inputs, folder)
    return all(scorer.has(tasks) for scorer in stores)


def _guarded(
    config: Config, inputs: Inputs, folder: RunFolder, events: EventLog
) -> tuple[State, str | None]:
    """Run the stages; this is the failure boundary of a job."""
    try:
        _run_stages(config, inputs, folder, events)
        return "finished", None
    except training.Diverged as error:
        log.error("%s diverged: %s", folder.name, error)
        return "diverged", str(error)
    except KeyboardInterrupt:
        return "interrupted", "interrupted by the user"
    except (torch.OutOfMemoryError, MemoryError) as error:
        log.error("%s ran out of memory: %s", folder.name, error)
        return "failed", f"out of memory; {LESS_MEMORY}: {error}"
    except Exception as error:
        log.error("%s failed: %s", folder.name, error)
        log.debug("where it failed", exc_info=True)  # for the run's log, not for the screen
        return "failed", f"{type(error).__name__}: {error}"


def _run_stages(config: Config, inputs: Inputs, folder: RunFolder, events: EventLog) -> None:
    """Score the base, train, score the result; each only where that is not done yet."""
    tasks = _load_tasks(config)
    tokenizer = models.load_tokenizer(config.model, inputs.source)
    model = _base(json.dumps(asdict(config.model)), inputs.source, str(inputs.device))
    tuned, *base = _scorers(config, inputs, folder)
    for scorer in base:
        scorer.score(tasks, model, tokenizer)
    adapted = _trained(config, inputs, folder, events, model, tokenizer)
    tuned.score(tasks, cast(PreTrainedModel, adapted.get_base_model()), tokenizer)
    if tasks and base:
        rows = data.read_sources(inputs.data)
        asked = data.last_prompts(rows, config.data, config.training, tokenizer, NUM_SAMPLES)
        said = answer_samples(adapted, tokenizer, asked)
        folder.write_json("samples.json", [asdict(sample) for sample in said])
    adapted.unload()  # the base is what it was, for the next run
    scores = tuned.read(tasks), base[0].read(tasks) if base else {}
    _write_scores(folder, *scores)
    _tell_scores(folder, events, *scores)


@lru_cache(maxsize=1)
def _base(settings: str, source: Source, device: str) -> PreTrainedModel:
    """Load a base once for the runs that follow each other; `settings` is its section as JSON."""
    return models.load_base(ModelConfig(**json.loads(settings)), source, torch.device(device))


def _release_memory() -> None:
    """Let go of a base that a failed run may have left altered, and of all it held."""
    _base.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _trained(
    config: Config,
    inputs: Inputs,
    folder: RunFolder,
    events: EventLog,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> PeftModel:
    """Return the model with its adapter: loaded where the training is done, else trained."""
    if folder.read_json("training.json") is not None:
        return adapters.load(model, folder.adapter)
    examples = _examples(config, inputs, tokenizer)
    log.info("data: %s", examples.counts.summary())
    folder.write_json("data.json", asdict(examples.counts))
    arguments = training.build_arguments(
        folder, config.optimizer, config.training, find_precision(config),
        validate=bool(examples.validation),
    )  # fmt: skip
    adapted = adapters.attach(model, config.lora, config.training.seed)
    result = training.train(adapted, tokenizer, examples, arguments, events)
    adapters.save(adapted, folder.adapter)
    folder.write_json("training.json", asdict(result))
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return adapted


def _examples(config: Config, inputs: Inputs, tokenizer: PreTrainedTokenizerBase) -> Examples:
    rows = data.read_sources(inputs.data)
    return data.build_examples(rows, config.data, config.training, tokenizer)


def _load_tasks(config: Config) -> list[LoadedTask]:
    settings = json.dumps(asdict(config.evaluation), sort_keys=True)
    return [_load_task(name, settings) for name in config.evaluation.tasks]


@lru_cache(maxsize=8)
def _load_task(name: str, settings: str) -> LoadedTask:
    """Build a task once for all runs of this process; `settings` is the section as JSON."""
    return evaluation.load_task(name, EvaluationConfig(**json.loads(settings)))


def _scorers(config: Config, inputs: Inputs, folder: RunFolder) -> list[Scorer]:
    """Return the scorer of the tuned model, and the base's where it is asked for.

    The base's scores are shared by all runs of this user.
    """
    tuned = Scorer(config, inputs, ScoreStore(folder.evaluation / "scores"), inputs.identity)
    base = Scorer(config, inputs, ScoreStore(cache_dir() / "evaluations"), None)
    return [tuned, base] if config.evaluation.base else [tuned]


@dataclass(frozen=True)
class Scorer:
    """Scores one model, base (`adapter` None) or tuned, on tasks, each once per identity."""

    config: Config
    inputs: Inputs
    store: ScoreStore
    adapter: str | None

    def identity(self, task: LoadedTask) -> str:
        return digest(
            {
                "model": model_identity(self.config, self.inputs.source, self.inputs.device),
                "adapter": self.adapter,
                "task": task.name,
                "digest": task.digest,
                "dtype": self.config.evaluation.dtype,
                "seed": evaluation.SEED,
                "scoring": SCORING,
                "versions": find_versions(self.config, EVALUATION_VERSIONS),
            }
        )

    def has(self, tasks: list[LoadedTask]) -> bool:
        return len(self.read(tasks)) == len(tasks)

    def read(self, tasks: list[LoadedTask]) -> dict[str, TaskScore]:
        found = {task.name: self.store.read(task.name, self.identity(task)) for task in tasks}
        return {name: score for name, score in found.items() if score is not None}

    def score(
        self,
        tasks: list[LoadedTask],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Compute the scores that are not stored yet."""
        settings = self.config.evaluation
        for task in tasks:
            identity = self.identity(task)
            with self.store.locked(task.name, identity):
                if self.store.read(task.name, identity) is None:
                    lm = SharedContextLM(
                        model,
                        tokenizer,
                        batch_tokens=settings.batch_tokens,
                        dtype=models.TORCH_DTYPES.get(settings.dtype),
                    )
                    score = evaluation.score(lm, task, settings)
                    self.store.write(identity, score)
                    log.info("%s: %s", "tuned" if self.adapter else "base", score.describe())


def _write_scores(
    folder: RunFolder, tuned: Mapping[str, TaskScore], base: Mapping[str, TaskScore]
) -> None:
    """Write each task's scores and its questions' outcomes, base beside tuned."""
    for name, score in tuned.items():
        pair = {"tuned": score, **({"base": base[name]} if name in base else {})}
        folder.write_json(
            f"evaluation/{name}.json", {side: one.summary() for side, one in pair.items()}
        )
        items: dict[tuple[str, int], dict[str, Any]] = {}
        for side, one in pair.items():
            seen: Counter[str] = Counter()  # a task may ask the same question twice
            for item in one.items:
                seen[item.hash] += 1
                line = items.setdefault(
                    (item.hash, seen[item.hash]), {"hash": item.hash, "prompt": item.prompt_hash}
                )
                line[side] = item.outcomes
        lines = "".join(json.dumps(line) + "\n" for line in items.values())
        write_atomic(folder.evaluation / f"{name}.items.jsonl", lines)


def _tell_scores(
    folder: RunFolder,
    events: EventLog,
    tuned: Mapping[str, TaskScore],
    base: Mapping[str, TaskScore],
) -> None:
    """Put the scores, and what the run leaves, into its event log."""
    for name, score in tuned.items():
        told = dict(score.metrics)
        if name in base:
            told |= {f"base_{key}": value for key, value in base[name].metrics.items()}
        events.metrics({f"{name}/{key}": value for key, value in told.items()}, 0)
    for path, into in (("adapter", "adapter"), ("evaluation", "evaluation")):
        if (folder.path / path).exists():
            events.artifact(path, into)


def _describe(job: Job, inputs: Inputs, folder: RunFolder, events: EventLog) -> None:
    """Write down, before anything runs, what is about to run and where."""
    (folder.path / "config.yaml").write_text(job.yaml, encoding="utf-8")
    overrides = OmegaConf.to_yaml(OmegaConf.create(job.overrides))
    (folder.path / "overrides.yaml").write_text(overrides, encoding="utf-8")
    folder.write_json("environment.json", describe_environment(inputs.device))
    settings = OmegaConf.to_container(OmegaConf.create(job.yaml), resolve=False)
    assert isinstance(settings, dict)
    sections = ("model", "peft", "lora", "optimizer", "data", "training", "evaluation")
    events.params(dict(_flat({name: settings[name] for name in sections})))
    for source, rows in data.read_sources(inputs.data):
        events.dataset(
            slug(Path(source.location).stem),
            digest=source.digest,
            source=source.location,
            context="training",
            rows=len(rows),
        )
    events.artifact("config.yaml", "config")
    template = prompts.load_template(job.config.data.prompt_template)
    if template.file_text is not None:
        folder.prompt_template.write_text(template.file_text, encoding="utf-8")
        events.artifact(folder.prompt_template.name, "config")


def _flat(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names with their values as text, floats in their shortest exact form."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value) if isinstance(value, float) else str(value)


@contextmanager
def _recording(folder: RunFolder) -> Iterator[EventLog]:
    """Keep the run's events, and a copy of its log lines."""
    events = EventLog(folder.events)
    handler = logging.FileHandler(folder.log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield events
    finally:
        log.removeHandler(handler)
        handler.close()
        events.close()
