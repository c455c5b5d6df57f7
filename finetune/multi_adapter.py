"""Train LoRA adapters over one frozen base: several in each step, or one as a group of one.

The micro-batches of all runs lie end to end in one row. The base passes over it once; each run's
matrices see only their own part of it, and each run has its own optimizer, schedule, clipping,
checkpoints and end. From seven tokens a part on, a run gets the bits that it gets alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, get_scheduler
from trl.trainer.sft_config import SFTConfig

from finetune import adapters
from finetune.adapters import LoraWeights
from finetune.checkpoints import find_newest, write_checkpoint
from finetune.config import LoraConfig
from finetune.data import IGNORED, Example, Examples
from finetune.grouped_lora import GroupedLora, Part
from finetune.label_loss import LabelLoss
from finetune.run_folder import EventLog, write_atomic
from finetune.sequence_attention import SequenceAttention, find_layout_problem, positions
from finetune.training import (
    Precision,
    StopSignals,
    TrainResult,
    log_resume,
    peak_memory_gib,
    record_step,
)

STATE = "state.json"


@dataclass(frozen=True)
class Lesson:
    """What one run wants trained."""

    lora: LoraConfig
    arguments: SFTConfig
    examples: Examples
    events: EventLog


Outcome = TrainResult | Exception  # an exception ends one run, not the others


class Student:
    """One run's adapter, optimizer, schedule and place in its rows."""

    def __init__(self, base: PreTrainedModel, lesson: Lesson) -> None:
        self.lesson = lesson
        self.arguments = lesson.arguments
        self.weights: LoraWeights = adapters.draw(base, lesson.lora, self.arguments.seed)
        self.parameters = list(self.weights.tensors.values())
        self.num_steps = num_steps(len(lesson.examples.train), self.arguments)
        self.optimizer = self._build_optimizer()
        self.scheduler = get_scheduler(
            self.arguments.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=self.arguments.get_warmup_steps(self.num_steps),
            num_training_steps=self.num_steps,
        )
        self.step = 0
        self.total_loss = 0.0  # over all steps
        self.last_loss = math.nan
        self.seconds = 0.0
        self.num_tokens = 0
        self.validation_loss: float | None = None
        self._waiting: list[list[Example]] = []  # micro-batches of this step
        self._labels = 0  # in this step
        self._loss = 0.0  # of this step so far
        self._resume()
        lesson.events.tag("train.max_steps", str(self.num_steps))
        tokens = sum(len(e["input_ids"]) for e in lesson.examples.train)
        rows = len(lesson.examples.train) / rows_a_step(self.arguments)
        lesson.events.tag("train.num_tokens", str(round(tokens * self.num_steps / rows)))

    def _build_optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer that the Trainer would."""
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(self.arguments)
        groups = [{"params": self.parameters, "weight_decay": self.arguments.weight_decay}]
        built: torch.optim.Optimizer = kind(groups, **settings)
        return built

    @property
    def is_done(self) -> bool:
        return self.step == self.num_steps

    @property
    def is_between_steps(self) -> bool:
        return not self._waiting

    def next_batch(self) -> tuple[list[Example], float, int]:
        """Return the next micro-batch, the weight of its labels, and a seed for its dropout."""
        if not self._waiting:
            rows = self.lesson.examples.train
            batches = rows_of_step(self.step, len(rows), self.arguments)
            self._waiting = [[rows[row] for row in batch] for batch in batches]
            self._labels = sum(num_labels(e) for batch in self._waiting for e in batch)
        batch = self._waiting.pop(0)
        self.num_tokens += sum(len(example["input_ids"]) for example in batch)
        place = self.step * self.arguments.gradient_accumulation_steps + len(self._waiting)
        return batch, 1 / max(self._labels, 1), self.arguments.seed * 1_000_003 + place

    def learn(self, loss: float, seconds: float) -> None:
        """Count a micro-batch whose gradients are there; after the step's last one, step.

        Raises:
            Diverged: the loss or the gradient's norm is not finite.
            OSError: a checkpoint cannot be written.
        """
        self._loss += loss
        self.seconds += seconds
        if self._waiting:
            return
        bound = self.arguments.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, bound))
        rate = float(self.scheduler.get_last_lr()[0])
        self.step += 1
        told = {"loss": self._loss, "grad_norm": norm, "learning_rate": rate}
        record_step(self.lesson.events, told, self.step, self.num_steps)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.total_loss += self._loss
        self.last_loss, self._loss = self._loss, 0.0
        if self.step % self.arguments.save_steps == 0 and not self.is_done:
            self.save_checkpoint()

    def result(self, device: torch.device) -> TrainResult:
        return TrainResult(
            steps=self.step,
            loss=self.total_loss / self.step,
            validation_loss=self.validation_loss,
            train_seconds=self.seconds,
            tokens_per_second=self.num_tokens / self.seconds,
            peak_memory_gib=peak_memory_gib(device),
            num_trainable_parameters=sum(p.numel() for p in self.parameters),
            layout="end to end",
        )

    def save_checkpoint(self) -> None:
        """Write all that a resume needs, whole or not at all."""

        def fill(folder: Path) -> None:
            adapters.save_weights(self.weights, folder)
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            torch.save(self.scheduler.state_dict(), folder / "scheduler.pt")
            kept = {
                "total_loss": self.total_loss,
                "num_tokens": self.num_tokens,
                "validation_loss": self.validation_loss,
            }
            write_atomic(folder / STATE, json.dumps(kept) + "\n")

        folder, keep = Path(str(self.arguments.output_dir)), self.arguments.save_total_limit or 1
        write_checkpoint(folder, self.step, self.seconds, fill, keep=keep)

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        checkpoint = find_newest(Path(str(self.arguments.output_dir)))
        if checkpoint is None:
            return
        log_resume(checkpoint)
        adapters.load_weights(self.weights, checkpoint.path)
        device = self.parameters[0].device
        for name, owner in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            path = checkpoint.path / f"{name}.pt"
            owner.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        kept = json.loads((checkpoint.path / STATE).read_text(encoding="utf-8"))
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        self.total_loss, self.num_tokens = kept["total_loss"], kept["num_tokens"]
        self.validation_loss = kept["validation_loss"]


def find_obstacle(
    base: PreTrainedModel, rows: Sequence[Sequence[int]], precision: Precision
) -> str | None:
    """Return why this base cannot be trained here; the Trainer then does it.

    Args:
        base: the model, in evaluation mode.
        rows: the tokens of all sequences that it will see.
        precision: of the training.
    """
    if precision.autocast == torch.float16:
        return "fp16 scales the losses of a whole step"
    settings = base.config.get_text_config().to_dict()
    if "output_router_logits" in settings and settings.get("router_aux_loss_coef"):
        return "its experts' routers have a loss over all tokens of a step"
    dropouts = [m.p for m in base.modules() if isinstance(m, torch.nn.Dropout)]
    if any(dropouts) or settings.get("attention_dropout") or settings.get("dropout"):
        return "the base drops out by itself, with one random stream for all"
    return find_layout_problem(base, rows) or _find_routed_layer(base)


def _find_routed_layer(base: PreTrainedModel) -> str | None:
    """Return the name of a linear layer that does not see all tokens in their order."""
    seen: dict[str, int] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, args, __, name=name: seen.update({name: args[0].shape[:-1].numel()})
        )
        for name, layer in base.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not base.get_output_embeddings()
    ]
    try:
        with torch.no_grad():
            base(input_ids=torch.arange(1, 10, device=base.device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return next(
        (f"its layer {name} sees part of the tokens" for name, n in seen.items() if n != 9), None
    )


def rows_a_step(arguments: SFTConfig) -> int:
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps


def num_steps(num_rows: int, arguments: SFTConfig) -> int:
    """Return the optimizer steps of a training, counted as the Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    return math.ceil(arguments.num_train_epochs * math.ceil(num_rows / rows_a_step(arguments)))


def rows_of_step(step: int, num_rows: int, arguments: SFTConfig) -> list[list[int]]:
    """Return the rows of a step's micro-batches: an epoch's order is the Trainer's own."""
    epoch, place = divmod(step, math.ceil(num_rows / rows_a_step(arguments)))
    draw = torch.Generator().manual_seed((arguments.data_seed or 0) + epoch)
    order = torch.randperm(num_rows, generator=draw).tolist()
    size = rows_a_step(arguments)
    mine = order[place * size : (place + 1) * size]
    batch = arguments.per_device_train_batch_size
    return [mine[start : start + batch] for start in range(0, len(mine), batch)]


def num_labels(example: Example) -> int:
    return sum(label != IGNORED for label in example["labels"][1:])


class Classroom:
    """The frozen base with every student's matrices hooked into its layers."""

    def __init__(self, base: PreTrainedModel, precision: Precision) -> None:
        self._base = base
        self._precision = precision
        self._attention = SequenceAttention(base)
        self._loss = LabelLoss(base)
        self._present: list[tuple[Student, slice, int]] = []  # student, tokens, dropout's seed

    @property
    def device(self) -> torch.device:
        return self._base.device

    @contextmanager
    def opened(self, students: Sequence[Student], *, checkpointing: bool) -> Iterator[None]:
        """Hook the adapters in; at the end the base is what it was."""
        names = {name for student in students for name in student.weights.layers}
        with ExitStack() as stack:
            stack.enter_context(self._attention.installed())
            for number, (name, layer) in enumerate(self._base.named_modules()):
                if name in names:
                    hook = layer.register_forward_hook(self._hook(name, number))
                    stack.callback(hook.remove)
            if checkpointing:
                self._base.activation_checkpointing_enable({"use_reentrant": False})
                stack.callback(self._base.disable_input_require_grads)
                stack.callback(self._base.activation_checkpointing_disable)
            stack.callback(self._base.eval)
            self._base.train()
            yield

    def _hook(self, name: str, number: int) -> Callable[..., torch.Tensor]:
        def add(_layer: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> Any:
            parts, matrices = [], []
            for student, tokens, seed in self._present:
                layer = student.weights.layers.get(name)
                if layer is not None:
                    dropout = student.lesson.lora.dropout if torch.is_grad_enabled() else 0.0
                    parts.append(Part(tokens, layer.scaling, dropout, seed * 4099 + number))
                    matrices += [layer.a, layer.b]
            if not parts:
                return output
            return GroupedLora.apply(output, args[0], parts, *matrices)  # type: ignore[no-untyped-call]

        return add

    def losses(self, batches: Sequence[tuple[Student, list[Example], float, int]]) -> torch.Tensor:
        """Return the summed weighted loss of each student's micro-batch, [student]."""
        device = self.device
        tokens: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        bounds, counts = [0], []
        self._present = []
        for student, examples, weight, seed in batches:
            start = len(tokens)
            for example in examples:
                tokens += example["input_ids"]
                labels += [*example["labels"][1:], IGNORED]  # what each place predicts
                bounds.append(len(tokens))
            counts.append(sum(num_labels(example) for example in examples))
            weights += [weight] * counts[-1]
            self._present.append((student, slice(start, len(tokens)), seed))
        predicted = torch.tensor(labels, device=device)
        rows = (predicted != IGNORED).nonzero()[:, 0]
        self._attention.lay_out(bounds)
        ids = torch.tensor([tokens], device=device)
        low, kind = self._precision.autocast, device.type
        with torch.autocast(kind, low, enabled=low != torch.float32):
            each = self._loss(
                lambda: self._base(
                    input_ids=ids, position_ids=positions(bounds, device), use_cache=False
                ),
                rows,
                predicted[rows],
                torch.tensor(weights, device=device),
                counts,
            )
        return torch.stack([part.sum() for part in torch.split(each, counts)])

    def validate(self, student: Student) -> float:
        """Return the mean loss of a student's held-out labels."""
        examples = student.lesson.examples.validation
        size = student.arguments.per_device_eval_batch_size
        weight = 1 / max(sum(map(num_labels, examples)), 1)
        with torch.no_grad():
            parts = [
                self.losses([(student, examples[start : start + size], weight, 0)])
                for start in range(0, len(examples), size)
            ]
        return float(torch.cat(parts).sum())


def train_together(
    base: PreTrainedModel, lessons: Sequence[Lesson], precision: Precision
) -> Iterator[tuple[int, LoraWeights, Outcome]]:
    """Train one adapter a lesson, and yield each as it comes to its end: number, weights, result.

    A run that fails leaves the group; the others go on unchanged. Runs go on from their own
    newest whole checkpoints.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came; all steps were ended, checkpoints written.
    """
    signals, room = StopSignals(), Classroom(base, precision)
    live: dict[int, Student] = {}
    for number, lesson in enumerate(lessons):
        live[number] = Student(base, lesson)
    checkpointing = any(lesson.arguments.activation_checkpointing for lesson in lessons)
    with (
        room.opened(list(live.values()), checkpointing=checkpointing),
        signals.watched(),
        _progress(list(live.values())) as bar,
    ):
        while live:
            if signals.stop_requested:
                _save_and_leave(live)
            if not live:
                raise KeyboardInterrupt
            for number, outcome in _advance(room, live, bar):
                yield number, live.pop(number).weights, outcome


def _advance(
    room: Classroom, live: dict[int, Student], bar: tqdm[Any]
) -> list[tuple[int, Outcome]]:
    """Take one micro-batch of every student; return who came to an end, and how."""
    started = time.monotonic()
    losses = room.losses([(student, *student.next_batch()) for student in live.values()])
    losses.sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    values = losses.tolist()
    share = (time.monotonic() - started) / len(live)
    ended: list[tuple[int, Outcome]] = []
    for (number, student), loss in zip(list(live.items()), values, strict=True):
        try:
            before = student.step
            student.learn(loss, share)
            bar.update(student.step - before)
            _validate_at_epochs(room, student, before)
            if student.is_done:
                ended.append((number, student.result(room.device)))
        except (ArithmeticError, OSError) as error:
            ended.append((number, error))
    newest = " ".join(f"{student.last_loss:.3f}" for student in live.values())
    bar.set_postfix_str(f"loss {newest}", refresh=False)
    return ended


def _validate_at_epochs(room: Classroom, student: Student, before: int) -> None:
    """Measure the validation loss where a step has ended an epoch, or the training."""
    rows = len(student.lesson.examples.train)
    ends_epoch = student.step % math.ceil(rows / rows_a_step(student.arguments)) == 0
    if student.step == before or not student.lesson.examples.validation:
        return
    if ends_epoch or student.is_done:
        student.validation_loss = room.validate(student)
        loss = {"validation/loss": student.validation_loss}
        student.lesson.events.metrics(loss, student.step)


def _save_and_leave(live: dict[int, Student]) -> None:
    """Let every student that is between two steps write a checkpoint and leave."""
    for number, student in list(live.items()):
        if student.is_between_steps:
            student.save_checkpoint()
            del live[number]


@contextmanager
def _progress(students: Sequence[Student]) -> Iterator[tqdm[Any]]:
    done, total = (sum(getattr(s, name) for s in students) for name in ("step", "num_steps"))
    name = "train" if len(students) == 1 else f"train {len(students)} adapters"
    with tqdm(desc=name, initial=done, total=total, unit="step") as bar:
        yield bar
