"""Validate settings: the range of each, and the rules between them, without model or data."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from finetune.config.durations import LONGEST, read_duration
from finetune.config.methods import INITIALISATIONS, METHODS, Method
from finetune.config.schema import (
    ALL_LINEAR,
    AUTO_FORMAT,
    TEMPLATE_FILE,
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    PeftConfig,
    SweepConfig,
    TrackingConfig,
    TrainingConfig,
    WorkersConfig,
)
from finetune.config.store_address import has_secret
from finetune.problems import nearest
from finetune.statistics.objective import VALIDATION, Objective

FORMATS = (
    AUTO_FORMAT, "alpaca", "dolly", "sharegpt", "openai", "lists", "prompt_completion",
    "question_answer", "text",
)  # fmt: skip
QUANTIZATIONS = ("none", "nf4", "fp4", "int8", "gptq")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
OWN_QUESTIONS = "questions"  # the task that asks evaluation.questions
HELD_OUT = "heldout"  # the task that asks rows that a run does not learn from
OWN_PROMPTS = (OWN_QUESTIONS, HELD_OUT)  # asked as rows are trained, in no template of lm-eval's
OWN_TASKS = ("demo_science", *OWN_PROMPTS)  # whose questions are never on the hub
DTYPES = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cuda", "cpu")
SCHEDULERS = (
    "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt",
)  # fmt: skip
TEMPLATES = ("alpaca", "chat", "text")
LONG_TEXT = ("split", "cut")
LAUNCHES = ("local", "slurm", "ray")
MOST_WORKERS = 1024
LARGEST_INT = 2**31 - 1  # of the 32-bit integers in libraries and file formats
LARGEST_SEED = 2**32 - 1  # numpy's; transformers seeds it beside torch and Python
LARGEST_FLOAT = 3.4e38  # that fp32 holds
MOST_EPOCHS = 1_000_000
MOST_ADAPTERS = 1024  # trained together; far more than is faster


def find_problems(config: Config) -> list[str]:
    """Return every value out of its range, one line each with the key and what is allowed."""
    return [
        *_one_of("model.quantization", config.model.quantization, QUANTIZATIONS),
        *_one_of("model.dtype", config.model.dtype, DTYPES),
        *_one_of("model.attn_implementation", config.model.attn_implementation, ATTENTIONS),
        *_method_problems(config),
        *_lora_problems(config.lora),
        *_optimizer_problems(config.optimizer),
        *_data_problems(config.data),
        *_training_problems(config.training),
        *_early_stopping_problems(config),
        *_evaluation_problems(config.evaluation),
        *_heldout_problems(config),
        *_objective_problems(config),
        *_sweep_problems(config.sweep),
        *_tracking_problems(config.tracking),
        *_workers_problems(config),
    ]


def _method_problems(config: Config) -> Iterator[str]:
    """Yield settings that a method does not support, or that have no effect with it."""
    yield from _one_of("peft.method", config.peft.method, tuple(METHODS))
    yield from _at_least("peft.num_virtual_tokens", config.peft.num_virtual_tokens, 1)
    if (method := METHODS.get(config.peft.method)) is not None:
        yield from _unused_problems(method, config)
        if method.trains_base and config.model.quantization != "none":
            yield (
                f"model.quantization is {config.model.quantization}; quantised weights cannot be "
                "trained: set model.quantization=none, or an adapter such as peft=lora"
            )
        if method.checkpointing_problem and config.training.gradient_checkpointing:
            yield f"training.gradient_checkpointing is true; {method.checkpointing_problem}"
    if config.model.adapter is not None and not config.training.is_skipped:
        yield (
            f"model.adapter is {config.model.adapter}; a saved adapter can be evaluated, not "
            "trained further: set training=none"
        )


def _unused_problems(method: Method, config: Config) -> Iterator[str]:
    unused = f"which has no effect with peft.method={method.name}; leave it out"
    for setting in fields(LoraConfig):
        value, default = (getattr(lora, setting.name) for lora in (config.lora, LoraConfig()))
        if value != default and setting.name not in method.lora:
            yield f"lora.{setting.name} is {value}, {unused}"
    tokens = config.peft.num_virtual_tokens
    if tokens != PeftConfig().num_virtual_tokens and not method.takes_virtual_tokens:
        yield f"peft.num_virtual_tokens is {tokens}, {unused}"


def _lora_problems(lora: LoraConfig) -> Iterator[str]:
    yield from _at_least("lora.r", lora.r, 1)
    yield from _at_least("lora.alpha", lora.alpha, 1)
    yield from _share("lora.dropout", lora.dropout)
    yield from _one_of("lora.init", lora.init, tuple(INITIALISATIONS))
    init = INITIALISATIONS.get(lora.init)
    if init is not None and init.needs_even_rank and lora.r % 2:
        yield f"lora.r is {lora.r}; lora.init={init.name} needs an even one"
    if not lora.target_modules:
        yield f"lora.target_modules is empty; name linear layers, or use [{ALL_LINEAR}]"
    twice = sorted({name for name in lora.target_modules if lora.target_modules.count(name) > 1})
    if twice:
        yield f"lora.target_modules names {', '.join(twice)} twice or more; name each once"
    elif ALL_LINEAR in lora.target_modules and len(lora.target_modules) > 1:
        yield f"lora.target_modules mixes {ALL_LINEAR} with names; use one or the other"


def _optimizer_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    yield from _above_0("optimizer.lr", optimizer.lr, LARGEST_FLOAT)
    yield from _from_to("optimizer.weight_decay", optimizer.weight_decay, 0, LARGEST_FLOAT)
    yield from _from_to("optimizer.max_grad_norm", optimizer.max_grad_norm, 0, LARGEST_FLOAT)
    yield from _share("optimizer.warmup_ratio", optimizer.warmup_ratio)
    yield from _one_of("optimizer.scheduler", optimizer.scheduler, SCHEDULERS)


def _data_problems(data: DataConfig) -> Iterator[str]:
    yield from _at_least("data.num_examples", data.num_examples, 1)
    yield from _share("data.validation_fraction", data.validation_fraction)
    yield from _share("data.heldout_fraction", data.heldout_fraction)
    shares = data.validation_fraction, data.heldout_fraction
    if max(shares) < 1 <= sum(shares):
        yield (
            f"data.validation_fraction is {data.validation_fraction} and data.heldout_fraction is "
            f"{data.heldout_fraction}, which leave no rows to train on; lower them"
        )
    if data.validation_path is not None and data.validation_fraction > 0:
        yield (
            f"data.validation_fraction is {data.validation_fraction} beside data.validation_path; "
            "set one of them"
        )
    if not data.prompt_template.endswith(TEMPLATE_FILE):
        known = (*TEMPLATES, f"a path ending in {TEMPLATE_FILE}")
        yield from _one_of("data.prompt_template", data.prompt_template, known)
    yield from _one_of("data.long_text", data.long_text, LONG_TEXT)
    if not data.mix and not data.path:
        yield "data.path has no value; set data.path=FILE, or several sources in data.mix"
    for key in ("path", "revision"):
        if data.mix and getattr(data, key):
            yield (
                f"data.{key} is {getattr(data, key)} beside data.mix, whose sources have their "
                f"own; set data.{key}=null, or start from data=mix"
            )
    yield from _one_of("data.format", data.format, FORMATS)
    yield from _encoding("data.encoding", data.encoding)
    for number, source in enumerate(data.mix):
        key = f"data.mix.{number}"
        yield from _above_0(f"{key}.weight", source.weight, LARGEST_FLOAT)
        yield from _one_of(f"{key}.format", source.format or AUTO_FORMAT, FORMATS)
        yield from _encoding(f"{key}.encoding", source.encoding or data.encoding)


def _encoding(key: str, name: str) -> Iterator[str]:
    try:
        is_text = codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        is_text = False
    if not is_text:
        yield f"{key} is {name}, which Python does not know; set utf-8, cp1252 or utf-16, say"


def _training_problems(training: TrainingConfig) -> Iterator[str]:
    yield from _above_0("training.epochs", training.epochs, MOST_EPOCHS)
    yield from _at_least("training.max_steps", training.max_steps, 0)
    yield from _at_least("training.max_length", training.max_length, 2)
    for name in (
        "batch_size", "gradient_accumulation_steps", "checkpoint_every", "keep_checkpoints",
    ):  # fmt: skip
        yield from _at_least(f"training.{name}", getattr(training, name), 1)
    if (minutes := training.checkpoint_minutes) is not None:
        yield from _above_0("training.checkpoint_minutes", minutes, LONGEST)
    for name in ("validate_every", "early_stopping"):
        yield from _at_least(f"training.{name}", getattr(training, name), 1)
    for name in ("seed", "data_seed"):
        yield from _from_to(f"training.{name}", getattr(training, name), 0, LARGEST_SEED)
    yield from _one_of("training.device", training.device, DEVICES)
    yield from _one_of("training.precision", training.precision, DTYPES)


def _early_stopping_problems(config: Config) -> Iterator[str]:
    if config.training.early_stopping is not None and not _validates(config.data):
        yield (
            f"training.early_stopping is {config.training.early_stopping}, but there are no rows "
            "to validate on; set data.validation_fraction, to 0.1 say"
        )


def _validates(data: DataConfig) -> bool:
    return data.validation_fraction > 0 or data.validation_path is not None


def _evaluation_problems(evaluation: EvaluationConfig) -> Iterator[str]:
    yield from _at_least("evaluation.num_fewshot", evaluation.num_fewshot, 0)
    limit = evaluation.limit
    is_count = limit is not None and 1 <= limit <= LARGEST_INT and isinstance(limit, int)
    if limit is not None and not (0 < limit < 1 or is_count):
        yield (
            f"evaluation.limit is {_render(limit)}; it must be a number of questions, or a share "
            "below 1"
        )
    if evaluation.batch_tokens is not None:
        yield from _at_least("evaluation.batch_tokens", evaluation.batch_tokens, 1)
    yield from _one_of("evaluation.dtype", evaluation.dtype, DTYPES)
    yield from _question_problems(evaluation)
    if evaluation.trust_task_code and evaluation.include_path is None:
        yield (
            "evaluation.trust_task_code is true, but evaluation.include_path names no folder of "
            "task files; set evaluation.include_path=FOLDER"
        )
    for task, splits in evaluation.data_files.items():
        if task not in evaluation.tasks:
            yield (
                f"evaluation.data_files.{task} names a task that is not evaluated; "
                f"evaluation.tasks is {evaluation.tasks}"
            )
        for split, file in splits.items():
            if not Path(file).is_file():
                yield f"evaluation.data_files.{task}.{split}: there is no file {file}"


def _question_problems(evaluation: EvaluationConfig) -> Iterator[str]:
    """Yield what is wrong with the settings of a user's own questions."""
    yield from _at_least("evaluation.max_new_tokens", evaluation.max_new_tokens, 1)
    if OWN_QUESTIONS in evaluation.tasks and evaluation.questions is None:
        yield "evaluation.questions has no value; set evaluation.questions=FILE"
    for name in ("questions", "select_questions", "fewshot_questions"):
        file = getattr(evaluation, name)
        if file is None:
            continue
        if OWN_QUESTIONS not in evaluation.tasks:
            yield (
                f"evaluation.{name} is {file}, which the task questions asks, but evaluation.tasks "
                f"is {evaluation.tasks}; set evaluation=questions, or name it among the tasks"
            )
        elif not Path(file).expanduser().is_file():
            yield f"evaluation.{name}: there is no file {file}"


def _heldout_problems(config: Config) -> Iterator[str]:
    """Yield why there are no rows for the task `heldout` that nothing has seen."""
    if HELD_OUT not in config.evaluation.tasks:
        return
    if config.training.is_skipped:
        yield (
            f"evaluation.tasks has {HELD_OUT}, which asks rows that a training holds out, but "
            "nothing is trained (training=none); ask such rows by evaluation=questions"
        )
    if config.training.is_skipped or config.data.heldout_fraction > 0:
        return
    remedy = "set data.heldout_fraction, to 0.1 say"
    if not _validates(config.data):
        yield f"evaluation.tasks has {HELD_OUT}, but no rows are held out; {remedy}"
    elif config.training.early_stopping is not None:
        yield (
            f"evaluation.tasks has {HELD_OUT}, but its rows would be those that end the training "
            f"(training.early_stopping), so their scores would be too good; {remedy}"
        )


def _objective_problems(config: Config) -> Iterator[str]:
    """Yield metrics that no task of the run has."""
    asked = config.evaluation
    try:
        objective = Objective.parse(asked.objective)
    except ValueError as error:
        yield str(error)
        return
    if asked.objective and objective.is_loss:
        if not _validates(config.data):
            yield (
                f"evaluation.objective is {VALIDATION}, but there are no rows to validate on; set "
                "data.validation_fraction, to 0.1 say"
            )
        return
    for name in objective.weights:
        if name.task not in asked.tasks:
            yield (
                f"evaluation.objective names {name}, but evaluation.tasks is {asked.tasks}; "
                f"{nearest(name.task, asked.tasks)}"
            )


def _sweep_problems(sweep: SweepConfig) -> Iterator[str]:
    most = MOST_ADAPTERS
    yield from _from_to("sweep.max_concurrent_adapters", sweep.max_concurrent_adapters, 1, most)
    if sweep.job_timeout is not None:
        yield from _above_0("sweep.job_timeout", sweep.job_timeout, LONGEST)


def _tracking_problems(tracking: TrackingConfig) -> Iterator[str]:
    if tracking.uri is not None and has_secret(tracking.uri):
        yield (
            "tracking.uri has a password or token in it, which would be written into files; leave "
            "it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or "
            "MLFLOW_TRACKING_TOKEN for a server, what a database reads, such as PGPASSWORD, or "
            "MLFLOW_TRACKING_URI to the address as it is"
        )
    for key in ("uri", "experiment"):
        if getattr(tracking, key) is not None and not getattr(tracking, key).strip():
            yield f"tracking.{key} is empty; leave it out, or set tracking.{key}=null"


def _workers_problems(config: Config) -> Iterator[str]:
    workers = config.workers
    yield from _one_of("workers.launch", workers.launch, LAUNCHES)
    for name in ("num", "threads", "gpus_per_worker"):
        yield from _from_to(f"workers.{name}", getattr(workers, name), 1, MOST_WORKERS)
    if workers.stop_after is not None and read_duration(workers.stop_after) is None:
        yield (
            f"workers.stop_after is {workers.stop_after!r}; it is a time above 0, such as 90m, 3h "
            "or 2:30:00"
        )
    if workers.join and workers.is_elsewhere:
        yield (
            f"workers.join is true, but workers.launch is {workers.launch}; a command that joins a "
            "sweep starts its workers on its own machine: set workers=local"
        )
    yield from _unused_by_launch(workers)


def _unused_by_launch(workers: WorkersConfig) -> Iterator[str]:
    """Yield the settings that this way to start workers does not have."""
    if workers.launch not in LAUNCHES:
        return
    for launch, names in {
        "slurm": ("partition", "account", "time", "gres", "extra"),
        "ray": ("address",),
    }.items():
        for name in names:
            if getattr(workers, name) and workers.launch != launch:
                yield (
                    f"workers.{name} has no effect with workers.launch={workers.launch}; leave it "
                    f"out, or set workers={launch}"
                )


def _at_least(key: str, value: int | None, lowest: int) -> Iterator[str]:
    """Check an integer that all libraries can hold."""
    if value is not None and not value >= lowest:
        yield f"{key} is {_render(value)}; it must be at least {lowest}"
    elif value is not None:
        yield from _from_to(key, value, lowest, LARGEST_INT)


def _from_to(key: str, value: float | None, lowest: float, highest: float) -> Iterator[str]:
    if value is not None and not lowest <= value <= highest:  # NaN is neither
        yield f"{key} is {_render(value)}; it must be from {lowest} to {highest}"


def _above_0(key: str, value: float, highest: float) -> Iterator[str]:
    if not 0 < value <= highest:
        yield f"{key} is {_render(value)}; it must be above 0, and at most {highest}"


def _render(value: float) -> str:
    """Return a number as text; a very long one is shortened."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} digits)"


def _share(key: str, value: float) -> Iterator[str]:
    if not 0 <= value < 1:
        yield f"{key} is {_render(value)}; it must be from 0 up to below 1"


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> Iterator[str]:
    if value not in allowed:
        yield f"{key} is {value!r}; {nearest(value, allowed)}"
