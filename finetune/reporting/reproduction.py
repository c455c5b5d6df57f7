"""Compare a run with its rerun: versions, hardware, settings, losses, answers and weights.

With equal versions, hardware and threads they are bitwise identical. Otherwise losses, answers and
weights each have a tolerance, which the verdict states in numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.config.schema import CONDUCT, Config, flatten, marked
from finetune.files import Damaged, file_digest, read_yaml
from finetune.reporting.outcomes import read_sides
from finetune.tracking.events import read_events
from finetune.tracking.run_folder import RunFolder

LOSS_TOLERANCE = 1e-3  # relative, at any step: for other kernels or machines
ANSWER_TOLERANCE = 0.01  # share of answers
WEIGHT_TOLERANCE = 0.05  # of a tensor's norm; under Adam, small tensors differ by a full step

Verdict = Literal["identical", "within tolerance", "different"]


@dataclass(frozen=True)
class Reproduction:
    """The largest differences between a run and its rerun; infinite where a side is missing."""

    steps: tuple[int, int]  # with a loss, of each
    loss: float  # relative
    at_step: str  # the first step whose loss differs, with both losses
    answers: int  # compared
    changed: int
    equal_answers: bool  # to the last bit
    weight: float  # of a tensor's norm
    tensor: str  # the tensor of the largest difference

    @property
    def verdict(self) -> Verdict:
        if self.is_empty:
            return "different"
        if self.loss == self.weight == 0 and self.equal_answers:
            return "identical"
        is_close = (
            self.loss <= LOSS_TOLERANCE
            and self.changed <= ANSWER_TOLERANCE * self.answers
            and self.weight <= WEIGHT_TOLERANCE
        )
        return "within tolerance" if is_close else "different"

    @property
    def is_empty(self) -> bool:
        return not any(self.steps) and not self.answers

    def describe(self) -> str:
        """Return each largest difference beside its tolerance."""
        if self.is_empty:
            return "there are neither losses nor answers to compare"
        parts = []
        if self.steps[0] != self.steps[1]:
            parts.append(f"{self.steps[0]} steps became {self.steps[1]}")
        elif self.steps[0]:
            at = f", first: {self.at_step}" if self.at_step else ""
            parts.append(f"largest difference of a loss {_share(self.loss, LOSS_TOLERANCE)}{at}")
        if self.answers:
            most = math.floor(ANSWER_TOLERANCE * self.answers)
            parts.append(f"{self.changed} of {self.answers} answers changed (tolerance {most})")
        where = f", {self.tensor}" if self.tensor else ""
        share = _share(self.weight, WEIGHT_TOLERANCE)
        parts.append(f"largest difference of a weight tensor {share} of its norm{where}")
        return "; ".join(parts)


def _share(value: float, tolerance: float) -> str:
    return f"{value:.1e} (tolerance {tolerance:g})"


def compare_runs(before: RunFolder, after: RunFolder) -> Reproduction:
    """Compare losses, answers and weights; of a damaged log only the steps that both have."""
    losses = [_losses(run) for run in (before, after)]
    common = [step for step in losses[0] if step in losses[1]]
    if "events.jsonl" in before.find_damage(of_weights=False):
        losses = [{step: one[step] for step in common} for one in losses]
    differing = [step for step in common if losses[0][step] != losses[1][step]]
    largest = max((_relative(losses[0][s], losses[1][s]) for s in differing), default=0.0)
    if losses[0].keys() != losses[1].keys():
        largest = math.inf
    answers = list(_answers(before, after))
    weight, tensor = _compare_weights(before, after)
    return Reproduction(
        steps=(len(losses[0]), len(losses[1])),
        loss=largest,
        at_step=_render_step(differing[0], *losses) if differing else "",
        answers=len(answers),
        changed=sum(not _is_near(one, other) for one, other in answers),
        equal_answers=all(one == other for one, other in answers),
        weight=weight,
        tensor=tensor,
    )


def _relative(one: float, other: float) -> float:
    difference = abs(one - other) / max(1.0, abs(one))
    return math.inf if math.isnan(difference) else difference


def _is_near(one: float, other: float | None) -> bool:
    """Compare outcomes; a different 0 or 1 always counts as changed."""
    return other is not None and _relative(one, other) <= LOSS_TOLERANCE


def _render_step(step: int, before: dict[int, float], after: dict[int, float]) -> str:
    return f"the loss of step {step} was {before[step]:.6g}, is {after[step]:.6g}"


def _losses(run: RunFolder) -> dict[int, float]:
    return {loss.step: loss.value for loss in run.metric("train/loss")}


def _answers(before: RunFolder, after: RunFolder) -> Iterator[tuple[float, float | None]]:
    """Yield the tuned models' outcomes of each question and metric; None where one is missing."""
    for task in before.scored_tasks():
        scores = before.read_scores(task)
        for metric in scores.tuned.metrics if scores else ():
            one, other = (read_sides(run, task, metric)["tuned"] for run in (before, after))
            yield from ((value, other.get(question)) for question, value in one.items())


def _compare_weights(before: RunFolder, after: RunFolder) -> tuple[float, str]:
    """Return the largest difference of a tensor, as a share of its norm, and the tensor."""
    files = [run.weights() for run in (before, after)]
    names = [[file.relative_to(run.path) for file in run.weights()] for run in (before, after)]
    if names[0] != names[1]:
        return math.inf, f"{len(names[0])} files became {len(names[1])}"
    largest, where = 0.0, ""
    for one, other in zip(*files, strict=True):
        if file_digest(one) != file_digest(other):
            share, tensor = _compare_tensors(one, other)
            if not share <= largest:
                largest, where = share, tensor
    return largest, where


def _compare_tensors(one: Path, other: Path) -> tuple[float, str]:
    import torch  # only where weights differ
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        before, after = load_file(one), load_file(other)
    except (SafetensorError, OSError, ValueError) as error:
        return math.inf, f"which cannot be read ({error})"
    if {name: t.shape for name, t in before.items()} != {n: t.shape for n, t in after.items()}:
        return math.inf, "whose names or shapes differ"
    largest, where = 0.0, ""
    for name, tensor in before.items():
        distance = float(torch.linalg.vector_norm(tensor.double() - after[name].double()))
        norm = float(torch.linalg.vector_norm(tensor.double()))
        share = distance / norm if norm else (math.inf if distance else 0.0)
        share = math.inf if math.isnan(share) else share
        if share > largest:
            largest, where = share, name
    return largest, where


def find_other_conditions(before: RunFolder, after: RunFolder) -> Iterator[str]:
    """Yield differences in versions, hardware, code, settings and data."""
    one, other = (run.read_json("environment.json") for run in (before, after))
    if one is None or other is None:
        yield "versions and hardware are not known: environment.json is missing or damaged"
    else:
        yield from _other_environment(one, other)
    yield from _other_settings(before, after)
    datasets = [
        {event["digest"] for event in read_events(run.events) if event["event"] == "dataset"}
        for run in (before, after)
    ]
    if datasets[0] != datasets[1]:
        yield "the data's content"
    for task in before.scored_tasks():
        scores = [run.read_scores(task) for run in (before, after)]
        digests = {one.tuned.setup.get("digest") for one in scores if one is not None}
        if len(digests - {None}) > 1:
            yield f"{task}: the questions, their prompts or the task's definition"
    for name, files in (
        ("prompt", [run.prompt_template for run in (before, after)]),
        ("chat", [run.chat_template for run in (before, after)]),
    ):
        if all(path.is_file() for path in files) and len(set(map(file_digest, files))) > 1:
            yield f"the {name} template's content"


def is_conduct(setting: str) -> bool:
    """Return whether a key or override is about the sweep or its records; reruns replace them."""
    key = setting.lstrip("+").partition("=")[0]
    return key.partition(".")[0] in marked(Config, CONDUCT)


def _other_environment(one: dict[str, object], other: dict[str, object]) -> Iterator[str]:
    versions = [side.get("versions") or {} for side in (one, other)]
    assert all(isinstance(side, dict) for side in versions), "run_files checks it"
    before, after = (dict(side) for side in versions)  # type: ignore[call-overload]
    for package, number in before.items():
        if after.get(package) != number:
            yield f"{package} was {number}, is {after.get(package)}"
    if one.get("threads") != other.get("threads"):
        yield (
            f"threads was {one.get('threads')}, is {other.get('threads')}: sums are in another "
            "order, so results agree within the tolerance, not bitwise"
        )
    for key in ("python", "platform", "processes", "gpu", "git_commit", "lock_digest"):
        if one.get(key) != other.get(key):
            yield f"{key} was {one.get(key)}, is {other.get(key)}"
    dtypes = [side.get("dtype") for side in (one, other)]
    if None not in dtypes and dtypes[0] != dtypes[1]:  # older runs have none
        yield f"dtype was {dtypes[0]}, is {dtypes[1]}"


def _other_settings(before: RunFolder, after: RunFolder) -> Iterator[str]:
    try:
        one, other = (
            dict(flatten(read_yaml(run.path / "config.yaml", dict) or {}))
            for run in (before, after)
        )
    except Damaged as damage:
        yield f"the settings are not known: config.yaml is damaged: {damage}"
        return
    for key in sorted(one.keys() | other.keys()):
        if not is_conduct(key) and one.get(key) != other.get(key):
            yield f"{key} was {one.get(key)}, is {other.get(key)}"
