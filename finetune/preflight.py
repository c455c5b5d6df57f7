"""Check a job before anything is loaded, and name its run: all problems at once, with remedies."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from finetune import (
    adapters,
    data,
    distributed,
    evaluation,
    memory,
    models,
    optimizers,
    training,
)
from finetune.config import Config, DataConfig, ModelConfig, TrainingConfig
from finetune.grouping import most_that_pay
from finetune.identity import Inputs, find_inputs, find_precision, run_folder
from finetune.models import Source
from finetune.ranges import find_problems
from finetune.run_folder import Plan
from finetune.scores import is_done, load_tasks


def prepare(config: Config) -> Plan:
    """Check everything that can be known without loading weights, and name the run."""
    problems = find_problems(config)
    problems += optimizers.find_optimizer_problems(config.optimizer)
    if config.training.device == "cuda" and not torch.cuda.is_available():
        problems.append(
            "training.device is cuda, and this machine has no CUDA device; "
            "use one that has, or set training.device=auto for the CPU"
        )
    else:
        problems += training.find_precision_problems(find_precision(config))
    problems += _find_gpu_problems(config)
    for check in (_find_model_problems, _find_data_problems, _find_task_problems):
        try:
            problems += check(config)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        return Plan(None, problems)
    inputs = find_inputs(config)
    folder = run_folder(config, inputs)
    most = 1
    if not (finished := is_done(config, inputs, folder)):
        shape, place, tokens = _memory(config, inputs)
        problem = memory.find_problem(config, shape, place, tokens)
        if problem is not None:
            return Plan(None, [problem])
        most = config.sweep.max_concurrent_adapters or most_that_pay(config)
        most = memory.most_adapters(config, shape, place, tokens, most)
    return Plan(folder.path, [], finished=finished, most_together=most)


def _memory(config: Config, inputs: Inputs) -> tuple[memory.Shape, memory.Place, int]:
    """Return the base's sizes, where the run is to fit, and its largest micro-batch in tokens."""
    settings = json.dumps(asdict(config.model))
    rows = json.dumps([asdict(config.data), config.training.batch_size, config.training.max_length])
    source = inputs.source
    tokens = _longest_batch(rows, settings, source, tuple(one.digest for one in inputs.data))
    return _shape(settings, source), memory.Place.find(config), tokens


@lru_cache(maxsize=8)
def _shape(settings: str, source: Source) -> memory.Shape:
    model = ModelConfig(**json.loads(settings))
    meta = models.load_meta_model(model, models.load_config(model, source))
    return memory.describe_shape(meta)


@lru_cache(maxsize=64)
def _longest_batch(rows: str, settings: str, source: Source, digests: tuple[str, ...]) -> int:
    """Tokenise the longest rows once for all jobs on the same; `rows` is JSON, as `settings`."""
    section, size, length = json.loads(rows)
    given = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), section))
    assert isinstance(given, DataConfig)
    training = TrainingConfig(batch_size=size, max_length=length)
    read = data.read_sources(data.find_sources(given))
    return data.longest_batch(read, given, training, _loaded_tokenizer(settings, source))


def _find_gpu_problems(config: Config) -> list[str]:
    have, want = torch.cuda.device_count(), distributed.num_local_processes()
    if models.pick_device(config.training.device).type == "cpu" or want <= max(have, 1):
        return []
    return [f"the launcher started {want} processes for {have} GPUs; set --num_processes {have}"]


def _find_model_problems(config: Config) -> list[str]:
    source = models.find_model(config.model)
    model_config = models.load_config(config.model, source)
    meta = models.load_meta_model(config.model, model_config)
    problems = adapters.find_problems(meta, config.peft, config.lora)
    if config.model.adapter is not None:
        adapters.saved_digest(Path(config.model.adapter))
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
            tokenizer = load_tokenizer(config, models.find_model(config.model))
    return data.find_problems(config.data, tokenizer)


def _find_task_problems(config: Config) -> list[str]:
    """Return what keeps a task from being asked: its name, its questions, its splits."""
    problems = evaluation.find_task_problems(config.evaluation)
    if problems:
        return problems
    try:
        load_tasks(config)
    except OSError as error:
        return [
            f"evaluation.tasks={','.join(config.evaluation.tasks)}: {error}; where the hub is out "
            "of reach, name local files: +evaluation.data_files.TASK.SPLIT=FILE"
        ]
    return []


def load_tokenizer(config: Config, source: Source) -> PreTrainedTokenizerBase:
    return _loaded_tokenizer(json.dumps(asdict(config.model)), source)


@lru_cache(maxsize=8)
def _loaded_tokenizer(settings: str, source: Source) -> PreTrainedTokenizerBase:
    """Load a tokenizer once for all runs of this process; `settings` is its section as JSON."""
    return models.load_tokenizer(ModelConfig(**json.loads(settings)), source)
