"""Memory estimate of a run, by purpose, before anything is loaded.

It takes the model's config and the `meta` device: no weight is read. Sizes are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import psutil
import torch

from finetune import distributed
from finetune.config.methods import INITIALISATIONS, METHODS
from finetune.config.optimizers import OPTIMIZERS
from finetune.config.schema import (
    Config,
    ModelConfig,
)
from finetune.evaluation.loglikelihood import MOST_TOKENS
from finetune.models.precision import compute_dtype, pick_device
from finetune.models.shape import Shape
from finetune.training.label_loss import CHUNK

GIB = 2**30
NAMES = {"cpu": "CPU", "cuda": "GPU"}
ASSUMED_CARD_GIB = 16.0  # where training.device is cuda and there is no GPU
# What a process holds before it has a model: imported libraries, or a CUDA context.
PROCESS = {"cpu": 0.52 * GIB, "cuda": 0.6 * GIB}
# glibc keeps a part of what is freed; measured on activations of many sizes.
ALLOCATOR = {"cpu": 1.3, "cuda": 1.0}
# Bytes a weight: two in a byte, and the constants of each block of 64 (QLoRA, arXiv:2305.14314).
FOUR_BIT = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
EIGHT_BIT = 1.0


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose; those of training and of evaluation are never in memory together."""

    process: float
    weights: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    evaluation: float

    @property
    def total(self) -> float:
        training = self.gradients + self.optimizer + self.activations + self.logits
        return self.process + self.weights + self.adapter + max(training, self.evaluation)


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of the device on which a run is to fit."""

    kind: str  # cpu or cuda
    size: int  # bytes of a number in the base's dtype
    free: float  # bytes
    workers: int = 1  # that share it
    is_assumed: bool = False  # a GPU that this machine does not have

    @classmethod
    def find(cls, config: Config, gib: float | None = None) -> DeviceMemory:
        """Return the configured device, or an assumed GPU where this machine has none."""
        if config.training.device == "cuda" and not torch.cuda.is_available():
            size = 4 if config.model.dtype == "fp32" else 2
            free = ASSUMED_CARD_GIB if gib is None else gib
            return cls("cuda", size, free * GIB, is_assumed=gib is None)
        device = pick_device(config.training.device)
        size = compute_dtype(config.model, device).itemsize
        if gib is not None:
            return cls(device.type, size, gib * GIB)
        workers = config.workers.num or 1 if device.type == "cpu" else 1  # a GPU is one worker's
        return cls(device.type, size, free_bytes(device) / workers, workers)

    def describe(self) -> str:
        """Return what its memory is."""
        return f"{'assumed' if self.is_assumed else 'free'} on the {NAMES[self.kind]}"


def free_bytes(device: torch.device) -> float:
    """Return the free bytes of the device, including what this process already holds."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + PROCESS["cuda"]
    return psutil.virtual_memory().available + PROCESS["cpu"]


def estimate(
    config: Config,
    shape: Shape,
    device: DeviceMemory,
    *,
    tokens: int | None = None,
    adapters: int = 1,
) -> Estimate:
    """Estimate a run's parts.

    Args:
        config: the run's.
        shape: of its base.
        device: where it runs.
        tokens: in a micro-batch; None takes the most that it can have.
        adapters: trained together.
    """
    training = config.training
    tokens = (training.most_tokens() if tokens is None else tokens) * adapters
    trains_base = METHODS[config.peft.method].trains_base
    optimizer = OPTIMIZERS[config.optimizer.name]
    shards = (
        distributed.num_processes() if distributed.is_sharded() and device.kind == "cuda" else 1
    )
    trained = 0 if training.is_skipped else adapters * num_trained(config, shape) / shards
    # A trained base is loaded in its own dtype once, and then sharded in fp32.
    size = max(4 / shards, device.size) if trains_base else device.size
    # Bytes per token: logits in the compute dtype, in fp32, and their gradient.
    logit = shape.vocabulary * (8 + device.size)
    head = (tokens if trains_base else CHUNK) * logit  # a trained head has no chunks
    scored = MOST_TOKENS[device.kind] * _forward_bytes(shape, device.size) + CHUNK * logit
    return Estimate(
        process=PROCESS[device.kind],
        weights=_weight_bytes(config.model, shape, size),
        adapter=0.0 if trains_base else 4.0 * trained,
        gradients=4.0 * trained,
        optimizer=trained * optimizer.resident_bytes(device.kind),
        activations=0.0
        if training.is_skipped
        else _activation_bytes(config, shape, tokens, device),
        logits=float(head + 2 * tokens * shape.hidden * device.size),
        evaluation=float(scored) if config.evaluation.tasks else 0.0,
    )


def num_trained(config: Config, shape: Shape) -> int:
    """Return how many parameters a method trains."""
    return METHODS[config.peft.method].count(config.peft, config.lora, shape)


def _weight_bytes(model: ModelConfig, shape: Shape, size: float) -> float:
    each = {"none": float(size), "int8": EIGHT_BIT, "gptq": shape.gptq}.get(
        model.quantization, FOUR_BIT[model.double_quant]
    )
    unpacked = 0 if model.quantization == "none" else shape.largest * size  # one layer at a time
    return shape.num_linear * each + shape.num_other * size + unpacked


def _layer_bytes(shape: Shape, size: int) -> int:
    """Return the activations that a layer keeps per token for the backward pass, bytes.

    Two residual inputs of the norms and two normed inputs of the projections; queries, keys,
    values, the attention's result and its input to the output projection; of the MLP gate, its
    activation, up and their product. In a lower dtype the norms also keep their fp32 copies.
    """
    widths = 4 * shape.hidden + 3 * shape.attention + 2 * shape.keys + 4 * shape.inner
    return size * widths + (8 * shape.hidden if size < 4 else 0)


def _forward_bytes(shape: Shape, size: int) -> int:
    """Return the peak activations per token without a backward pass, bytes."""
    return size * (4 * shape.hidden + 2 * shape.attention + 2 * shape.keys + 3 * shape.inner)


def _activation_bytes(config: Config, shape: Shape, tokens: int, device: DeviceMemory) -> float:
    layer = _layer_bytes(shape, device.size)
    if config.training.gradient_checkpointing:  # one input a layer, and one layer at a time
        return float(tokens * (device.size * shape.layers * shape.hidden + layer))
    return tokens * shape.layers * layer * ALLOCATOR[device.kind]


def find_problem(config: Config, shape: Shape, device: DeviceMemory, tokens: int) -> str | None:
    """Return why a run does not fit, with the cheapest changes that make it fit.

    Args:
        config: the run's.
        shape: of its base.
        device: where it is to fit.
        tokens: in its largest micro-batch.
    """
    need = estimate(config, shape, device, tokens=tokens)
    if need.total <= device.free:
        return None
    remedy = find_remedy(config, shape, device, tokens)
    if device.workers > 1 and (remedy is None or need.total <= device.free * device.workers):
        remedy = f"workers.num={max(1, int(device.free * device.workers // need.total))}"
    shared = f" for each of {device.workers} workers" if device.workers > 1 else ""
    return (
        f"model.path={config.model.path}: about {need.total / GIB:.1f} GiB are needed, "
        f"{device.free / GIB:.1f} GiB are {device.describe()}{shared} "
        f"({need.weights / GIB:.1f} GiB weights, {need.activations / GIB:.1f} GiB activations of "
        f"{tokens} tokens); "
        + (f"set {remedy}" if remedy else "no setting makes it fit: use a smaller model")
    )


def find_remedy(config: Config, shape: Shape, device: DeviceMemory, tokens: int) -> str | None:
    """Return the cheapest change, or the fewest of the cheapest ones, with which a run fits."""

    def fits(changed: Config, share: float) -> bool:
        need = estimate(changed, shape, device, tokens=math.ceil(tokens * share))
        return need.total <= device.free

    for name, change, share in _changes(config):
        if fits(change(config), share):
            return name
    names, total_share = [], 1.0
    for name, change, share in _changes(config):
        names.append(name)
        config, total_share = change(config), total_share * share
        if fits(config, total_share):
            return " ".join(names)
    return None


def _changes(config: Config) -> Iterator[tuple[str, Callable[[Config], Config], float]]:
    """Yield what can be changed: override, change, share of the tokens.

    Smaller passes and checkpointing, which leave the results as they are, come first.
    """
    size, steps = config.training.batch_size, config.training.gradient_accumulation_steps
    method = METHODS[config.peft.method]  # which has no use for some of them
    if size > 1:
        many = steps * size
        yield (
            f"training.batch_size=1 training.gradient_accumulation_steps={many}",
            lambda one: replace(
                one,
                training=replace(one.training, batch_size=1, gradient_accumulation_steps=many),
            ),
            1 / size,
        )
    if not config.training.gradient_checkpointing and method.checkpointing_problem is None:
        yield (
            "training.gradient_checkpointing=true",
            lambda one: replace(one, training=replace(one.training, gradient_checkpointing=True)),
            1.0,
        )
    small = OPTIMIZERS["adamw_8bit"]
    holds_more = OPTIMIZERS[config.optimizer.name].state_bytes > small.state_bytes
    if holds_more and not distributed.is_sharded():
        yield (
            f"optimizer.name={small.name}",
            lambda one: replace(one, optimizer=replace(one.optimizer, name=small.name)),
            1.0,
        )
    needs_floats = method.trains_base or not INITIALISATIONS[config.lora.init].fits_quantised
    if config.model.quantization == "none" and not needs_floats:
        yield (
            "model.quantization=nf4",
            lambda one: replace(one, model=replace(one.model, quantization="nf4")),
            1.0,
        )


def most_adapters(config: Config, shape: Shape, device: DeviceMemory, tokens: int, cap: int) -> int:
    """Return how many adapters fit when trained together, at least one and at most `cap`."""
    for adapters in range(cap, 1, -1):
        need = estimate(config, shape, device, tokens=tokens, adapters=adapters)
        if need.total <= device.free:
            return adapters
    return 1
