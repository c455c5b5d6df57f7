"""Passes recorded as CUDA graphs: the same training, from slots of one width."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.data.token_rows import IGNORED, Example
from finetune.models.precision import Precision
from finetune.training import multi_adapter, sequence_attention
from finetune.training.adapter_training import AdapterTraining
from finetune.training.recorded_passes import GraphInputs, Key, RecordedPasses, find_step
from finetune.training.token_batch import TokenBatch
from tests.flash import attend_in_each
from tests.trainings import TINY, Setting, equal, load, losses, train

SIZES = {"epochs": 12, "batch_size": 3, "gradient_accumulation_steps": 2}
PAIR = [Setting(training=SIZES), Setting({"r": 2}, {"lr": 1e-3}, SIZES)]


def batch(*lengths: int) -> TokenBatch:
    examples = [Example(input_ids=list(range(n)), labels=[IGNORED, *range(1, n)]) for n in lengths]
    return TokenBatch.of(examples, 0.5)


def test_a_batch_holds_each_label_at_the_position_that_predicts_it() -> None:
    """The last token of a sequence predicts none, and weighs nothing."""
    held = batch(3, 2)
    assert held.tokens == [0, 1, 2, 0, 1]
    assert held.targets == [1, 2, IGNORED, 1, IGNORED]
    assert held.weights == [0.5, 0.5, 0.0, 0.5, 0.0]
    assert (held.bounds, held.num_labels) == ([0, 3, 5], 3)


def test_a_slot_is_filled_up_with_a_sequence_without_labels() -> None:
    """What was there stays; a full one gets nothing."""
    filled = batch(3).filled_up(5)
    assert (filled.bounds, len(filled.tokens), filled.num_labels) == ([0, 3, 5], 5, 2)
    assert filled.weights[3:] == [0.0, 0.0]
    assert batch(3).filled_up(3) == batch(3)
    assert TokenBatch.joined([filled, batch(2)]).bounds == [0, 3, 5, 7]


@pytest.mark.parametrize(
    ("longest", "num_passes", "step"),
    [(2400, 376, 128), (2400, 24, 1216), (2400, 12, 2432), (50, 10_000, 64), (64, 12, 64)],
)
def test_few_passes_share_few_widths(longest: int, num_passes: int, step: int) -> None:
    """Each recorded width must be worth its recording."""
    assert find_step(longest, num_passes) == step


class Replayed:
    """Stands for a graph: its replay calls the pass again."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """Let trainings take their passes from slots; return the widths that are recorded."""
    recorded: list[Key] = []
    begin = AdapterTraining.__init__

    def begun(self: AdapterTraining, *given: Any) -> None:
        begin(self, *given)
        self._is_on_gpu, self.longest = True, self._longest_batch()

    def record(self: RecordedPasses, key: Key, num_runs: int) -> Any:
        recorded.append(key)
        inputs = GraphInputs.blank(key, num_runs, torch.device("cpu"))
        self._run(inputs, key[0])  # which may fail
        found = torch.zeros(num_runs)

        def replay() -> None:
            computed = self._run(inputs, key[0])
            computed.sum().backward()  # type: ignore[no-untyped-call]  # torch's own
            found.copy_(computed.detach())

        return Replayed(replay), inputs, found

    monkeypatch.setattr(AdapterTraining, "__init__", begun)
    monkeypatch.setattr(RecordedPasses, "_record", record)
    monkeypatch.setattr(RecordedPasses, "forget", lambda self: self._graphs.clear())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(multi_adapter, "has_varlen", lambda _: True)
    monkeypatch.setattr(sequence_attention, "fits_varlen", lambda *_: True)
    monkeypatch.setattr(sequence_attention, "attend_by_varlen", attend_in_each)
    return recorded


def test_a_training_from_slots_is_the_training(
    tmp_path: Path, as_on_a_gpu: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a group, whose runs differ in rank and in rate: the same losses and adapters."""
    found = train(tmp_path / "slots", PAIR)
    assert 1 < len(as_on_a_gpu) < 10
    assert all(width % 64 == 0 for width, _ in as_on_a_gpu)
    monkeypatch.setattr(multi_adapter, "is_worthwhile", lambda _: False)
    as_on_a_gpu.clear()
    expected = train(tmp_path / "plain", PAIR)
    assert not as_on_a_gpu
    for number in range(2):
        mine, theirs = (losses(tmp_path / name / str(number)) for name in ("slots", "plain"))
        assert mine == pytest.approx(theirs, abs=1e-5)
        one, other = found[number][0], expected[number][0]
        assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        (Setting({"dropout": 0.1}, training=SIZES), "dropout draws anew at each pass"),
        (Setting(training={**SIZES, "epochs": 0.5}), "few passes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_replayed_is_not_recorded(
    tmp_path: Path, as_on_a_gpu: list[Key], setting: Setting, why: str
) -> None:
    """Such a training runs as it is."""
    train(tmp_path, [setting])
    assert not as_on_a_gpu, why


def test_a_pass_that_cannot_be_recorded_is_taken_as_it_is(
    tmp_path: Path,
    as_on_a_gpu: list[Key],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once it failed, no further one is tried, and the log says why."""
    monkeypatch.setattr(sequence_attention, "fits_varlen", lambda *_: False)
    with caplog.at_level(logging.INFO, "finetune"):
        found = train(tmp_path / "slots", PAIR[:1])
    monkeypatch.setattr(multi_adapter, "is_worthwhile", lambda _: False)
    assert equal(found[0][0], train(tmp_path / "plain", PAIR[:1])[0][0])
    (said,) = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert "not PyTorch's flash attention" in said


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_recorded_passes_train_as_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, checkpointing: bool
) -> None:
    """Twice the same bits; and what passes that are not recorded give, within bf16's rounding."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    replays: list[int] = []
    learn = RecordedPasses.learn

    def counted(self: RecordedPasses, batches: Any) -> Any:
        found = learn(self, batches)
        replays.append(found is not None)
        return found

    monkeypatch.setattr(RecordedPasses, "learn", counted)
    sizes = {**SIZES, "gradient_checkpointing": checkpointing}
    group = [replace(one, training=sizes) for one in PAIR]
    base = load(replace(TINY, dtype="bf16", quantization=quantization), "cuda")
    low = Precision(torch.device("cuda", 0), torch.bfloat16)
    first = train(tmp_path / "first", group, base, low)
    again = train(tmp_path / "again", group, base, low)
    assert len(replays) > 100
    assert all(replays)
    monkeypatch.setattr(multi_adapter, "is_worthwhile", lambda _: False)
    train(tmp_path / "plain", group, base, low)
    for number in range(2):
        assert equal(first[number][0], again[number][0])
        mine, theirs = (losses(tmp_path / name / str(number)) for name in ("first", "plain"))
        assert mine == pytest.approx(theirs, abs=0.01)
