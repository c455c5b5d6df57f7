"""Forecast of a run's training time, by the speed of earlier runs of its model on this device.

The seconds of a row are kept: other ranks, rates and numbers of steps leave them about as they are.
Of rows that were never trained on, the speed of the newest others is taken.
"""

from __future__ import annotations

import platform

import torch

from finetune import distributed
from finetune.config.inputs import Inputs
from finetune.config.schema import Config
from finetune.evaluation.forecast import Speeds
from finetune.files import digest
from finetune.home import cache_dir
from finetune.models.precision import find_precision
from finetune.pipeline.identity import model_identity
from finetune.training.steps import TrainResult


def find_row_seconds(config: Config, inputs: Inputs) -> float | None:
    """Return about how many seconds a row takes to train on; None where none was trained on."""
    known = _speeds(config, inputs).read()
    return next((known[name] for name in _measures(config, inputs) if name in known), None)


def record_speed(config: Config, inputs: Inputs, result: TrainResult) -> None:
    """Keep the speed of a training that has just ended."""
    rows = result.steps * rows_per_step(config)
    if rows and result.train_seconds > 0:
        seconds = result.train_seconds / rows
        _speeds(config, inputs).keep(dict.fromkeys(_measures(config, inputs), seconds))


def rows_per_step(config: Config) -> int:
    training = config.training
    rows = training.batch_size * training.gradient_accumulation_steps
    return rows * distributed.num_processes()


def _speeds(config: Config, inputs: Inputs) -> Speeds:
    """Return the speeds of one model on one device of this machine."""
    model = model_identity(config, inputs.source, inputs.device)
    name = digest([model, platform.node(), inputs.device, torch.get_num_threads()])[:16]
    return Speeds(cache_dir() / "speeds" / f"training-{name}.json")


def _measures(config: Config, inputs: Inputs) -> list[str]:
    """Return what the speed is kept under: on these rows, and on any."""
    training = config.training
    how = [
        config.peft.method, training.max_length, training.sequence_packing,
        training.gradient_checkpointing, training.use_liger_kernel,
        str(find_precision(config).autocast), distributed.num_processes(),
    ]  # fmt: skip
    rows = [config.data.prompt_template, *(one.digest for one in inputs.data)]
    return [digest([*how, rows])[:16], digest(how)[:16]]
