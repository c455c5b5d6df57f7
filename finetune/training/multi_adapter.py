"""Train LoRA adapters together over one frozen base, or a single one as a group of one.

The micro-batches of all runs are concatenated for one forward/backward pass over the base. Each
run's matrices apply to its tokens only; each has its own optimizer, schedule, gradient clipping,
loss scale (fp16), checkpoints and end. Bitwise equal to solo training from 7 tokens per run and
micro-batch upward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from finetune.data.token_rows import IGNORED, Example
from finetune.models.adapters import LoraWeights
from finetune.models.attention import has_varlen
from finetune.models.compatibility import CHECKPOINTING, disable_checkpointing, enable_checkpointing
from finetune.models.gpu_power import PowerMeter
from finetune.models.kernels import FLASH
from finetune.models.precision import Precision
from finetune.models.process_memory import is_out_of_memory, reset_peak_memory, return_freed_memory
from finetune.signals import StopSignals
from finetune.training.adapter_training import AdapterSpec, AdapterTraining, num_labels
from finetune.training.grouped_lora import GroupedLora, Part
from finetune.training.label_loss import LabelLoss
from finetune.training.recorded_passes import GraphInputs, RecordedPasses, is_worthwhile
from finetune.training.sequence_attention import (
    SequenceAttention,
    find_layout_problem,
    positions,
)
from finetune.training.steps import TrainResult, advance, open_bar
from finetune.training.token_batch import TokenBatch

Outcome = TrainResult | Exception  # an exception ends one run, not the others


def find_obstacle(base: PreTrainedModel, rows: Sequence[Sequence[int]]) -> str | None:
    """Return why a base needs the Trainer instead; None where it can be trained here.

    Args:
        base: the model, in evaluation mode.
        rows: the tokens of all sequences that it will see.
    """
    settings = base.config.get_text_config().to_dict()
    if "output_router_logits" in settings and settings.get("router_aux_loss_coef"):
        return "the model's router loss is computed over the tokens of all runs in a batch"
    dropouts = [m.p for m in base.modules() if isinstance(m, torch.nn.Dropout)]
    if any(dropouts) or settings.get("attention_dropout") or settings.get("dropout"):
        return "the base model uses dropout, which shares one random generator between runs"
    return find_layout_problem(base, rows) or _find_routed_layer(base)


def _find_routed_layer(base: PreTrainedModel) -> str | None:
    """Return a problem if a layer does not map every token by itself, as routers and experts."""
    ids = torch.arange(1, 10, device=base.device)[None]
    odd: list[str] = []

    def look(name: str, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, torch.Tensor) or args[0].shape[:-1].numel() != ids.numel():
            odd.append(f"the model's layer {name} is a router, or gets only some of the tokens")

    with ExitStack() as stack, torch.no_grad():
        for name, layer in base.named_modules():
            weight = getattr(layer, "weight", None)
            is_layer = isinstance(weight, torch.Tensor) and not isinstance(
                layer, torch.nn.Embedding
            )
            if is_layer and layer is not base.get_output_embeddings():
                hook = layer.register_forward_hook(lambda _, a, out, name=name: look(name, a, out))
                stack.callback(hook.remove)
        base(input_ids=ids, use_cache=False)
    return odd[0] if odd else None


@dataclass(frozen=True)
class Graphs:
    """The recorded passes of a group of trainings; None where they run as they are."""

    trainings: list[AdapterTraining]
    passes: RecordedPasses | None


class SharedBase:
    """The frozen base with the matrices of all trainings hooked into its layers."""

    def __init__(self, base: PreTrainedModel, precision: Precision) -> None:
        self._base = base
        self.power = PowerMeter(base.device)  # of all trainings; each has its share of the seconds
        self._precision = precision
        self._attention = SequenceAttention(base)
        self._loss = LabelLoss(base)
        self._present: list[tuple[AdapterTraining, slice, int]] = []  # tokens, dropout's seed
        self._graphs: Graphs | None = None

    @property
    def device(self) -> torch.device:
        return self._base.device

    @contextmanager
    def opened(
        self, trainings: Sequence[AdapterTraining], *, checkpointing: bool
    ) -> Iterator[None]:
        """Hook the adapters into the base while the context lasts."""
        names = {name for one in trainings for name in one.weights.layers}
        with ExitStack() as stack:
            stack.enter_context(self._attention.installed())
            for number, (name, layer) in enumerate(self._base.named_modules()):
                if name in names:
                    hook = layer.register_forward_hook(self._hook(name, number))
                    stack.callback(hook.remove)
            if checkpointing:
                if self.device.type == "cpu":
                    return_freed_memory()
                enable_checkpointing(self._base)
                stack.callback(disable_checkpointing, self._base)
            stack.callback(self._base.eval)
            stack.callback(self._forget_graphs)
            self._base.train()
            yield

    def _hook(self, name: str, number: int) -> Callable[..., torch.Tensor]:
        def add(_layer: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> Any:
            parts: list[Part] = []
            matrices: list[torch.Tensor] = []
            cast: list[torch.Tensor] = []
            for one, tokens, seed in self._present:
                layer = one.weights.layers.get(name)
                if layer is not None:
                    dropout = one.spec.lora.dropout if torch.is_grad_enabled() else 0.0
                    parts.append(Part(tokens, layer.scaling, dropout, seed * 4099 + number))
                    matrices += [layer.a, layer.b]
                    cast += one.cast[name]
            if not parts:
                return output
            return GroupedLora.apply(output, args[0], parts, cast, *matrices)  # type: ignore[no-untyped-call]

        return add

    def learn(
        self, batches: Sequence[tuple[AdapterTraining, Sequence[Example], float, int]]
    ) -> list[float]:
        """Add the gradients of each training's micro-batch; return the losses, [training]."""
        trainings = [one for one, *_ in batches]
        parts = [TokenBatch.of(examples, weight) for _, examples, weight, _ in batches]
        if self._graphs is None or self._graphs.trainings != trainings:
            self._graphs = self._find_graphs(trainings)
        if self._graphs.passes is not None:
            self._cast(trainings)
            if (found := self._graphs.passes.learn(parts)) is not None:
                return found
            self._graphs = Graphs(trainings, None)
        losses = self.losses(trainings, parts, [seed for *_, seed in batches])
        scaled = [one.scaled(loss) for one, loss in zip(trainings, losses, strict=True)]
        torch.stack(scaled).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
        return [float(loss) for loss in losses.tolist()]

    def losses(
        self,
        trainings: Sequence[AdapterTraining],
        parts: Sequence[TokenBatch],
        seeds: Sequence[int],
    ) -> torch.Tensor:
        """Return the summed weighted loss of each training's micro-batch, [training]."""
        device, batch = self.device, TokenBatch.joined(parts)
        bounds = [0, *accumulate(len(part.tokens) for part in parts)]
        spans = [slice(start, end) for start, end in pairwise(bounds)]
        self._present = list(zip(trainings, spans, seeds, strict=True))
        targets = torch.tensor(batch.targets, device=device)
        rows = (targets != IGNORED).nonzero()[:, 0]
        self._attention.lay_out(batch.bounds)
        ids = torch.tensor([batch.tokens], device=device)
        self._cast(trainings)
        counts = [part.num_labels for part in parts]
        weights = torch.tensor(batch.weights, device=device)
        with self._autocast():
            each = self._loss(
                lambda: self._base(
                    input_ids=ids, position_ids=positions(batch.bounds, device), use_cache=False
                ),
                rows,
                targets[rows],
                weights[rows],
                counts,
            )
        return torch.stack([part.sum() for part in torch.split(each, counts)])

    def _cast(self, trainings: Sequence[AdapterTraining]) -> None:
        for one in trainings:
            one.cast_matrices(self._precision.autocast)

    def _autocast(self) -> AbstractContextManager[Any]:
        low = self._precision.autocast
        return torch.autocast(
            self.device.type, low, enabled=low != torch.float32, cache_enabled=False
        )

    def _find_graphs(self, trainings: list[AdapterTraining]) -> Graphs:
        """Return the graphs of a group, empty as yet; none where they cannot be or do not pay."""
        self._forget_graphs()
        num_passes = max(one.num_passes for one in trainings)
        if not (
            has_varlen(self.device)
            and self._precision.autocast != torch.float16  # whose loss scales change
            and self._loss.is_plain
            and self._base.config._attn_implementation not in FLASH
            and not any(one.spec.lora.dropout for one in trainings)
            and is_worthwhile(num_passes)
        ):
            return Graphs(trainings, None)

        def run(inputs: GraphInputs, width: int) -> torch.Tensor:
            return self._losses_on(trainings, inputs, width)

        longest = max(one.longest for one in trainings)
        return Graphs(
            trainings,
            RecordedPasses(run, self.device, longest=longest, num_passes=num_passes),
        )

    def _forget_graphs(self) -> None:
        if self._graphs is not None and self._graphs.passes is not None:
            self._graphs.passes.forget()
        self._graphs = None

    def _losses_on(
        self, trainings: Sequence[AdapterTraining], inputs: GraphInputs, width: int
    ) -> torch.Tensor:
        """Return the losses as `losses` does, of inputs that lie on the device in slots."""
        spans = [slice(start * width, (start + 1) * width) for start in range(len(trainings))]
        self._present = [(one, span, 0) for one, span in zip(trainings, spans, strict=True)]
        self._attention.lay_out_on_device(inputs.bounds, width)
        with self._autocast():
            each = self._loss(
                lambda: self._base(
                    input_ids=inputs.ids, position_ids=inputs.positions, use_cache=False
                ),
                None,
                inputs.targets,
                inputs.weights,
                [width] * len(trainings),
            )
        return each.view(len(trainings), width).sum(1)

    def validate(self, one: AdapterTraining) -> float:
        """Return the mean loss of a training's held-out labels."""
        examples = one.spec.examples.validation
        size = one.arguments.per_device_eval_batch_size
        weight = 1 / max(sum(map(num_labels, examples)), 1)
        with torch.no_grad():
            parts = [
                self.losses([one], [TokenBatch.of(examples[start : start + size], weight)], [0])
                for start in range(0, len(examples), size)
            ]
        return float(torch.cat(parts).sum())


def train_together(
    base: PreTrainedModel, specs: Sequence[AdapterSpec], precision: Precision
) -> Iterator[tuple[int, LoraWeights | None, Outcome]]:
    """Train adapters, and yield index, weights and outcome of each as it ends.

    A run that fails leaves the group; the others go on unchanged. Each resumes from its own newest
    valid checkpoint.

    Raises:
        KeyboardInterrupt: a stop was asked for; all steps were ended, checkpoints written.
    """
    signals, shared = StopSignals(), SharedBase(base, precision)
    reset_peak_memory(shared.device)
    live: dict[int, AdapterTraining] = {}
    for number, spec in enumerate(specs):
        try:
            live[number] = AdapterTraining(base, spec)
        except Exception as error:
            if is_out_of_memory(error):
                raise  # the group does not fit
            yield number, None, error  # of this run only
    if not live:
        return
    checkpointing = any(getattr(spec.arguments, CHECKPOINTING) for spec in specs)
    with (
        shared.opened(list(live.values()), checkpointing=checkpointing),
        signals.watched(),
        _open_bar(list(live.values())) as bar,
    ):
        interrupted: KeyboardInterrupt | None = None
        while live:
            if signals.stop_requested and (leaving := _take_between_steps(live)):
                interrupted = signals.request
                for number, one in leaving.items():
                    try:
                        one.save_checkpoint()
                    except Exception as error:  # of this run only
                        yield number, None, error
            else:
                for number, outcome in _advance(shared, live, bar):
                    yield number, live.pop(number).weights, outcome
        if interrupted is not None:
            raise interrupted


def _advance(
    shared: SharedBase, live: dict[int, AdapterTraining], bar: tqdm[Any]
) -> list[tuple[int, Outcome]]:
    """Train one micro-batch of every run; return the outcomes of those that ended."""
    started = time.monotonic()
    losses = shared.learn([(one, *one.next_batch()) for one in live.values()])
    share = (time.monotonic() - started) / len(live)
    for one in live.values():
        one.seconds += share
    num_steps = 0
    ended: list[tuple[int, Outcome]] = []
    for (number, one), loss in zip(list(live.items()), losses, strict=True):
        started = time.monotonic()
        try:
            before = one.step
            one.learn(loss)
            num_steps += one.step - before
            if one.step > before:
                one.end_step(shared.validate(one) if one.is_to_be_validated else None)
            one.seconds += time.monotonic() - started
            if one.is_done:
                one.keep_best()
                ended.append((number, one.result(shared.device, shared.power.mean_watts())))
        except Exception as error:
            if is_out_of_memory(error):
                raise  # the group does not fit
            ended.append((number, error))  # of this run only
    newest = [one.last_loss for one in live.values() if one.last_loss is not None]
    advance(bar, num_steps, newest)
    return ended


def _take_between_steps(live: dict[int, AdapterTraining]) -> dict[int, AdapterTraining]:
    """Remove and return the trainings that are between steps, where a checkpoint can be saved."""
    return {number: live.pop(number) for number, one in list(live.items()) if one.is_between_steps}


def _open_bar(trainings: Sequence[AdapterTraining]) -> tqdm[Any]:
    done, total = (sum(getattr(s, name) for s in trainings) for name in ("step", "num_steps"))
    return open_bar(len(trainings), done, total)
