"""Check a job before anything is loaded, and name its run: all problems at once, with remedies."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import PreTrainedConfig

from finetune import distributed
from finetune.config import optimizers
from finetune.config.inputs import Inputs
from finetune.config.methods import INITIALISATIONS, METHODS
from finetune.config.rules import HELD_OUT, OWN_PROMPTS, find_problems
from finetune.config.schema import Config
from finetune.evaluation.aggregation import list_metrics
from finetune.evaluation.task_index import find_task_problems
from finetune.evaluation.tasks import LoadedTask
from finetune.files import digest
from finetune.models import adapters, base_model, devices, kernels, quantization, saved_adapter
from finetune.models.chat_templates import read_chat_template
from finetune.models.precision import (
    compute_dtype,
    describe_unused_gpu,
    find_precision,
    find_precision_problems,
    pick_device,
)
from finetune.models.shape import Shape
from finetune.pipeline import memory_estimate
from finetune.pipeline.identity import find_inputs
from finetune.pipeline.jobs import CheckedJob
from finetune.pipeline.scores import build_scorers, forecasts, is_done
from finetune.pipeline.session import Session, base_key
from finetune.pipeline.tested_versions import describe_untested
from finetune.pipeline.training_speed import find_row_seconds, rows_per_step
from finetune.problems import first_line, nearest
from finetune.statistics.objective import Objective
from finetune.tracking.run_folder import RunFolder
from finetune.training.grouping import NOT_TRAINED, Limit, find_limit, find_obstacle

log = logging.getLogger("finetune")

Check = Callable[[Config, Session], list[str]]


def prepare(config: Config, session: Session | None = None) -> CheckedJob:
    """Check everything that can be known without loading weights, and name the run.

    For a run on other machines nothing of this one's device counts, and its folder is named there.

    Args:
        config: the run's.
        session: what is loaded already; None begins with nothing.
    """
    session, is_elsewhere = session or Session(), config.workers.is_elsewhere
    session.warn_once(describe_untested)
    problems = find_problems(config)
    wrong = {problem.partition(".")[0] for problem in problems}
    for check, sections in CHECKS.items():
        if is_elsewhere and check in OF_DEVICE:
            continue
        if wrong.isdisjoint(sections):
            problems += _run_check(check, config, session)
        elif check is _find_model_problems and "model" not in wrong:
            problems += _run_check(_find_source_problems, config, session)
    if problems:
        return CheckedJob(None, list(dict.fromkeys(problems)))
    if is_elsewhere:
        return CheckedJob(find_inputs(_on_cpu(config), session), [])
    inputs = find_inputs(config, session)
    folder = RunFolder(inputs.folder)
    limit = NOT_TRAINED
    if not (finished := is_done(config, inputs, folder, session)):
        shape, device, tokens = _memory(config, inputs, session)
        loaded = replace(config, model=inputs.model)
        problem = memory_estimate.find_problem(loaded, shape, device, tokens)
        if problem is not None:
            return CheckedJob(None, [problem])
        limit = _find_limit(loaded, shape, device, tokens)
    if finished:
        return CheckedJob(inputs, [], finished=True, limit=limit)
    tasks = session.tasks(config, inputs.source)
    leaks = session.leaks(config, inputs.data)
    if leaks and config.evaluation.refuse_leakage:
        return CheckedJob(None, [_describe_leaks(config, leaks)])
    _, *base = build_scorers(config, inputs, folder)
    return CheckedJob(
        inputs, [],
        limit=limit,
        forecasts=[
            *forecasts(config, inputs, tasks),
            *([_describe_leaks(config, leaks)] if leaks else []),
        ],
        base_scores=tuple(str(file) for scorer in base for file in scorer.missing(tasks)),
        base=digest(base_key(config, inputs)),
        rows=_count_rows(config, inputs, session),
        row_seconds=find_row_seconds(config, inputs),
    )  # fmt: skip


def _on_cpu(config: Config) -> Config:
    """Return settings whose inputs can be found where there is no GPU."""
    return replace(config, training=replace(config.training, device="cpu"))


def _describe_leaks(config: Config, leaks: Sequence[int]) -> str:
    """Return a line on the user's questions that stand in the rows to train on."""
    first = ", ".join(map(str, leaks[:3])) + (" ..." if len(leaks) > 3 else "")
    verb = "stands" if len(leaks) == 1 else "stand"
    return (
        f"evaluation.questions={config.evaluation.questions}: {len(leaks)} of its questions {verb} "
        f"in the rows to train on (row {first}); take them out of one of the two"
    )


def _count_rows(config: Config, inputs: Inputs, session: Session) -> float:
    """Return about how many rows a run trains on, over all epochs."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps * rows_per_step(config)
    share = 1 - config.data.validation_fraction
    return training.epochs * share * (config.data.num_examples or session.count_rows(inputs.data))


def find_row_problems(config: Config, session: Session) -> list[str]:
    """Return the problems of rows and tokenizer alone, without those of the rest of a run."""
    checks = _find_source_problems, _find_tokenizer_problems, _find_data_problems
    return list(dict.fromkeys(p for check in checks for p in _run_check(check, config, session)))


def _run_check(check: Check, config: Config, session: Session) -> list[str]:
    """Return the problems of a check; an exception is one too, whichever library raised it."""
    try:
        return check(config, session)
    except (OSError, ValueError) as error:
        return [str(error)]
    except Exception as error:
        log.debug("a check failed", exc_info=error)
        return [f"{type(error).__name__}: {first_line(error)}"]


def _find_limit(
    config: Config, shape: Shape, device: memory_estimate.DeviceMemory, tokens: int
) -> Limit:
    """Return how many runs may be trained together with this one; `model` is as loaded."""
    if (obstacle := find_obstacle(config)) is not None:
        return Limit(1, obstacle)
    limit = find_limit(config)
    fit = memory_estimate.most_adapters(config, shape, device, tokens, limit.most)
    return limit if fit == limit.most else Limit(fit, f"the memory has room for {fit} at a time")


def _memory(
    config: Config, inputs: Inputs, session: Session
) -> tuple[Shape, memory_estimate.DeviceMemory, int]:
    """Return the base's sizes, the device's memory, and the largest micro-batch in tokens."""
    tokens = config.training.most_tokens()  # packed sequences are nearly full
    if not config.training.sequence_packing:
        tokens = session.longest_batch(config, inputs.source, inputs.data)
    return (
        session.shape(config.model, inputs.source),
        memory_estimate.DeviceMemory.find(config),
        tokens,
    )


def _find_optimizer_problems(config: Config, _: Session) -> list[str]:
    return optimizers.find_optimizer_problems(config.optimizer)


def _find_device_problems(config: Config, session: Session) -> list[str]:
    if config.training.device == "auto":
        session.warn_once(describe_unused_gpu)
    if config.training.device == "cuda" and not torch.cuda.is_available():
        why = devices.describe_missing(os.environ, devices.list_gpus(), torch.version.cuda)
        return [f"training.device is cuda, and {why}, or set training.device=auto for the CPU"]
    problems = find_precision_problems(find_precision(config))
    device = pick_device(config.training.device)
    if device.type == "cuda" and torch.cuda.is_available():
        problems += devices.find_kernel_problems(
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
            torch.cuda.get_arch_list(),
        )
    have, want = torch.cuda.device_count(), distributed.num_local_processes()
    if device.type == "cuda" and want > max(have, 1):
        problems.append(
            f"the launcher started {want} processes for {have} GPUs; set --num_processes {have}"
        )
    return problems


def _find_source_problems(config: Config, _: Session) -> list[str]:
    """Return the problems of model.path and training.max_length, a part of the model's."""
    model_config = base_model.load_config(config.model, base_model.find_model(config.model))
    problems = _find_chat_template_problems(config)
    return problems + _find_length_problems(config, model_config)


def _find_chat_template_problems(config: Config) -> list[str]:
    try:
        if config.model.chat_template is not None:
            read_chat_template(config.model.chat_template)
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def _find_length_problems(config: Config, model_config: PreTrainedConfig) -> list[str]:
    longest, length = base_model.max_positions(model_config), config.training.max_length
    if not longest or length <= longest:
        return []
    made_for = f"{config.model.path} was made for at most {longest} tokens"
    return [f"training.max_length is {length}, but {made_for}; set training.max_length={longest}"]


def _find_model_problems(config: Config, session: Session) -> list[str]:
    source = base_model.find_model(config.model)
    model_config = base_model.load_config(config.model, source)
    meta = session.meta_model(config.model, source)
    problems = adapters.find_problems(meta, config.peft, config.lora)
    problems += _find_chat_template_problems(config)
    if config.model.adapter is not None:
        folder = Path(config.model.adapter)
        adapters.saved_digest(folder)
        adapted = base_model.load_meta_model(config.model, model_config)
        problems += saved_adapter.find_problems(adapted, folder)
    found = quantization.find_quantization(config.model, model_config)
    if METHODS[config.peft.method].trains_base and found != config.model.quantization:
        problems.append(
            f"peft.method={config.peft.method} trains the weights of the base, but "
            f"{config.model.path} is quantised as {found}; use an unquantised checkpoint, or an "
            "adapter such as peft=lora"
        )
    init = INITIALISATIONS[config.lora.init]
    if found != "none" and not (init.fits_gptq if found == "gptq" else init.fits_quantised):
        problems.append(
            f"lora.init is {config.lora.init}, which needs weights in floats, but "
            f"{config.model.path} is quantised as {found}; set lora.init=default"
        )
    if found == "gptq" and config.evaluation.dtype != "auto":
        problems.append(
            f"evaluation.dtype is {config.evaluation.dtype}, but a GPTQ base computes in its own "
            "dtype; set evaluation.dtype=auto"
        )
    return problems + _find_length_problems(config, model_config)


def _find_kernel_problems(config: Config, session: Session) -> list[str]:
    """Return the problems of quantisation, attention and kernels on this machine's device."""
    try:
        source = base_model.find_model(config.model)
        meta = session.meta_model(config.model, source)
    except (OSError, ValueError):
        return []  # a missing model is reported by its own check
    device = pick_device(config.training.device)
    model_config = base_model.load_config(config.model, source)
    problems = quantization.find_problems(config.model, model_config, device)
    dtype = compute_dtype(config.model, device)
    problems += kernels.find_flash_problems(config.model, meta, device, dtype)
    if config.training.use_liger_kernel:
        problems += kernels.find_liger_problems(meta, device)
    return problems


def _find_tokenizer_problems(config: Config, session: Session) -> list[str]:
    return session.tokenizer_problems(config.model, base_model.find_model(config.model))


def _find_data_problems(config: Config, session: Session) -> list[str]:
    source = None
    with suppress(OSError, ValueError):  # a missing model is reported by its own check
        found = base_model.find_model(config.model)
        session.tokenizer(config.model, found)
        source = found
    return session.row_problems(config, source)


def _find_task_problems(config: Config, session: Session) -> list[str]:
    """Return the problems of the tasks: their names, data, splits and chat template."""
    problems = find_task_problems(config.evaluation)
    if problems:
        return problems
    asked, source = config.evaluation, None
    if asked.chat_template or not set(OWN_PROMPTS).isdisjoint(asked.tasks):
        try:
            source = base_model.find_model(config.model)
            tokenizer = session.tokenizer(config.model, source)
        except (OSError, ValueError):
            return []  # a missing model is reported by its own check
        if asked.chat_template and tokenizer.chat_template is None:
            return [
                f"evaluation.chat_template is true, but the tokenizer of {config.model.path} has "
                "no chat template: set evaluation.chat_template=false or model.chat_template=FILE"
            ]
    if HELD_OUT in asked.tasks and session.row_problems(config, source):
        return []  # which are reported by their own check
    try:
        return _find_objective_problems(config, session.tasks(config, source))
    except OSError as error:
        return [
            f"evaluation.tasks={','.join(config.evaluation.tasks)}: {error}; where the hub is out "
            "of reach, name local files: +evaluation.data_files.TASK.SPLIT=FILE"
        ]
    except ImportError as error:  # of a package that some tasks want; its text says which
        return [f"evaluation.tasks={','.join(config.evaluation.tasks)}: {first_line(error)}"]
    except TemplateError as error:
        return [f"evaluation.chat_template: the template of {config.model.path} fails: {error}"]


def _find_objective_problems(config: Config, loaded: Sequence[LoadedTask]) -> list[str]:
    """Return the metrics of `evaluation.objective` that its tasks do not have, or cannot rank."""
    objective = Objective.parse(config.evaluation.objective)
    if not objective.weights or objective.is_loss:
        return []
    tasks = {task.name: list_metrics(task) for task in loaded if not task.selects}
    directions = {}
    for name in objective.weights:
        known = tasks[name.task]
        if name.name not in known:
            return [f"evaluation.objective names {name}; {nearest(name.name, list(known))}"]
        directions[name] = known[name.name]
    ways = {None: "no direction", True: "higher is better", False: "lower is better"}
    if len(set(directions.values())) == 1 and None not in directions.values():
        return []
    shown = ", ".join(f"{name} ({ways[way]})" for name, way in directions.items())
    return [f"evaluation.objective names {shown}; name metrics that have one direction"]


# Each check with the sections whose values it takes to be in their ranges.
CHECKS: dict[Check, tuple[str, ...]] = {
    _find_optimizer_problems: ("optimizer",),
    _find_device_problems: ("training", "model"),
    _find_model_problems: ("model", "peft", "lora", "training", "evaluation"),
    _find_kernel_problems: ("model", "training"),
    _find_tokenizer_problems: ("model",),
    _find_data_problems: ("data", "training"),
    _find_task_problems: ("evaluation",),
}
# Those of the machine's device, which say nothing about other machines.
OF_DEVICE = (_find_device_problems, _find_kernel_problems)
