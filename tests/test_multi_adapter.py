"""Several adapters in one step: each is what it is alone, and that is what the Trainer makes."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from finetune.config import methods
from finetune.config.schema import ModelConfig
from finetune.evaluation.loglikelihood import SharedContextLM
from finetune.models import adapters
from finetune.models.base_model import find_model, load_tokenizer
from finetune.models.compatibility import is_checkpointing
from finetune.models.precision import Precision
from finetune.tracking.events import read_events
from finetune.tracking.run_folder import RunFolder
from finetune.training import trainer
from finetune.training.adapter_training import AdapterSpec, AdapterTraining
from finetune.training.checkpoints import newest_step
from finetune.training.multi_adapter import Outcome, SharedBase, train_together
from finetune.training.row_order import rows_of_step
from finetune.training.steps import Diverged, TrainResult
from tests.trainings import (
    CPU,
    TINY,
    Killed,
    Setting,
    broken_off,
    copied,
    equal,
    load,
    losses,
    spec,
    train,
)


def trained_by_the_trainer(folder: Path, setting: Setting) -> tuple[dict[str, torch.Tensor], Any]:
    """Train one run on the path of the other methods."""
    run, base = RunFolder(folder), load()
    one = spec(run, setting)
    adapted = adapters.attach(base, methods.lora_settings(one.lora), one.arguments.seed)
    tokenizer = load_tokenizer(TINY, find_model(TINY))
    result = trainer.train(adapted, tokenizer, one.examples, one.arguments, one.events)
    one.events.close()
    tensors = {
        name.replace(".default.", "."): parameter.detach().clone()
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    return tensors, result


@pytest.mark.parametrize(
    "setting",
    [
        Setting(training={"epochs": 4}),
        Setting(training={"epochs": 1.5, "batch_size": 3}, validation=5),
        Setting({"use_rslora": True, "target_modules": ["q_proj"]}, {"max_grad_norm": 0.05}),
        Setting(training={"max_steps": 7, "gradient_checkpointing": True}),
        Setting(optimizer={"scheduler": "linear", "warmup_ratio": 0.3}),
    ],
)
def test_a_group_of_one_is_what_the_trainer_makes(tmp_path: Path, setting: Setting) -> None:
    """Same steps, same losses, same adapter within 1e-5; and the same validation loss."""
    ours = train(tmp_path / "ours", [setting])[0]
    theirs = trained_by_the_trainer(tmp_path / "theirs", setting)
    assert isinstance(ours[1], TrainResult)
    assert ours[1].steps == theirs[1].steps
    for key in ("train/loss", "train/grad_norm"):
        mine = losses(tmp_path / "ours" / "0", key)
        assert mine == pytest.approx(losses(tmp_path / "theirs", key), abs=1e-5)
    assert ours[0].keys() == theirs[0].keys()
    assert max((ours[0][n] - theirs[0][n]).abs().max() for n in ours[0]) < 1e-5
    assert ours[1].num_trainable_parameters == theirs[1].num_trainable_parameters
    told = [
        {e["key"]: e["value"] for e in read_events(folder / "events.jsonl") if e["event"] == "tag"}
        for folder in (tmp_path / "ours" / "0", tmp_path / "theirs")
    ]
    assert told[0] == told[1]
    assert told[0].keys() >= {"train.max_steps", "train.num_tokens"}


LOSS = "train/loss"
VARIED = [
    Setting({"r": 2}, {"lr": 1e-3}),
    Setting({"r": 8, "alpha": 32, "dropout": 0.1}, {"lr": 1e-4, "scheduler": "linear"}),
    Setting({"target_modules": ["q_proj", "down_proj"]}, {"max_grad_norm": 0.1}, {"seed": 7}),
    Setting({"use_rslora": True, "init": "gaussian"}, {"weight_decay": 0.1, "name": "sgd"}),
]


def test_every_run_of_a_group_is_bitwise_its_solo_run(tmp_path: Path) -> None:
    """Rank, alpha, dropout, targets, initialisation, seed, optimizer: all differ, none mix."""
    together = train(tmp_path / "together", VARIED)
    for number, setting in enumerate(VARIED):
        (alone, _) = train(tmp_path / f"alone{number}", [setting])[0]
        assert equal(together[number][0], alone), number
        mine = losses(tmp_path / "together" / str(number))
        assert mine == losses(tmp_path / f"alone{number}" / "0")
        assert len(mine) == 5


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("autocast", "tolerance"),
    [(torch.float32, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 0.02)],
    ids=["fp32", "bf16", "fp16"],
)
def test_on_a_card_every_run_of_a_group_follows_its_solo_run(
    autocast: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    """A product's rounding depends on its size there, so that losses agree within a tolerance."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    base = load(device="cuda:0")
    precision = Precision(base.device, autocast)
    train(tmp_path / "together", VARIED, base, precision)
    for number, setting in enumerate(VARIED):
        train(tmp_path / f"alone{number}", [setting], base, precision)
        mine = losses(tmp_path / "together" / str(number))
        assert mine == pytest.approx(losses(tmp_path / f"alone{number}" / "0"), abs=tolerance)
        assert len(mine) == 5


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    group=st.lists(
        st.builds(
            Setting,
            lora=st.fixed_dictionaries(
                {
                    "r": st.sampled_from([1, 3, 16]),
                    "alpha": st.sampled_from([1, 16]),
                    "dropout": st.sampled_from([0.0, 0.2]),
                    "target_modules": st.sampled_from(
                        [["all-linear"], ["v_proj"], ["o_proj", "up_proj"]]
                    ),
                    "use_rslora": st.booleans(),
                    "init": st.sampled_from(["default", "gaussian"]),
                }
            ),
            optimizer=st.fixed_dictionaries(
                {
                    "lr": st.sampled_from([1e-4, 3e-2]),
                    "scheduler": st.sampled_from(["cosine", "linear", "constant"]),
                    "weight_decay": st.sampled_from([0.0, 0.1]),
                    "max_grad_norm": st.sampled_from([0.0, 0.01, 1.0]),
                }
            ),
            training=st.fixed_dictionaries(
                {
                    "seed": st.sampled_from([1, 42]),
                    "batch_size": st.just(1),
                    "max_steps": st.just(3),
                }
            ),
        ),
        min_size=2,
        max_size=5,
    ),
    place=st.integers(0, 4),
)
def test_random_groups_mix_nothing(tmp_path: Path, group: list[Setting], place: int) -> None:
    """Any grid, one row of seven tokens and more at a time: each run has its solo bits."""
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    together = train(folder, group)
    number = place % len(group)
    (alone, _) = train(folder / "alone", [group[number]])[0]
    assert equal(together[number][0], alone)


def test_micro_batches_of_a_step_are_taken_together_up_to_the_longest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card: fewer passes, none longer than the longest was, and the same training."""
    setting = Setting(training={"batch_size": 1, "gradient_accumulation_steps": 8, "epochs": 3})
    expected = train(tmp_path / "apart", [setting])[0][0]
    begun, passed = AdapterTraining.__init__, AdapterTraining.next_batch
    sizes: list[int] = []

    def begin(self: AdapterTraining, *given: Any) -> None:
        begun(self, *given)
        rows = [
            sum(len(self.spec.examples.train[row]["input_ids"]) for row in batch)
            for step in range(self.num_steps)
            for batch in rows_of_step(step, len(self.spec.examples.train), self.arguments)
        ]
        self.longest, self._is_on_gpu = self._longest_batch(), True
        assert self.longest == max(rows)
        sizes.append(len(rows))

    def count(self: AdapterTraining) -> Any:
        found = passed(self)
        assert sum(len(example["input_ids"]) for example in found[0]) <= self.longest
        sizes[0] -= 1
        return found

    monkeypatch.setattr(AdapterTraining, "__init__", begin)
    monkeypatch.setattr(AdapterTraining, "next_batch", count)
    together = train(tmp_path / "together", [setting])[0][0]
    assert sizes[0] > 0  # passes that were spared
    mine = losses(tmp_path / "together" / "0")
    assert mine == pytest.approx(losses(tmp_path / "apart" / "0"), abs=1e-5)
    assert max((expected[name] - together[name]).abs().max() for name in expected) < 1e-5


def test_a_run_that_diverges_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    """Its outcome says so; the others have the bits of their solo runs."""
    wild = Setting({"r": 2}, {"lr": 1e25, "warmup_ratio": 0.0})
    together = train(tmp_path / "together", [VARIED[0], wild, VARIED[1]])
    assert isinstance(together[1][1], Diverged)
    for number, setting in ((0, VARIED[0]), (2, VARIED[1])):
        assert isinstance(together[number][1], TrainResult)
        (alone, _) = train(tmp_path / f"alone{number}", [setting])[0]
        assert equal(together[number][0], alone)


def test_the_bar_shows_the_newest_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every run of the group, and nothing before there is one."""
    train(tmp_path, list(VARIED))
    shown = capsys.readouterr().err
    newest = " ".join(f"{losses(tmp_path / str(number))[-1]:.3f}" for number in range(len(VARIED)))
    assert f"loss {newest}" in shown
    assert "nan" not in shown


def test_groups_resume_bit_for_bit_also_when_smaller(tmp_path: Path) -> None:
    """Broken off after some steps, one run is taken out, and the rest goes on as alone."""
    group = [replace(one, training={**one.training, "checkpoint_every": 2}) for one in VARIED]
    runs = [RunFolder(tmp_path / str(number)) for number in range(len(group))]
    broken = train_together(load(), specs := [*map(spec, runs, group)], CPU)
    steps = itertools.count()

    class Killed(BaseException):
        pass

    def count_steps(values: Mapping[str, float], step: int) -> None:
        if "train/loss" in values and next(steps) == 3:
            raise Killed

    specs[2].events.metrics = count_steps  # type: ignore[method-assign]
    with pytest.raises(Killed):
        list(broken)
    assert [max((run.checkpoints).iterdir()).name[-1] for run in runs] == ["4", "4", "2", "2"]
    rest = [spec(runs[number], group[number]) for number in (0, 1, 3)]
    resumed = {number: copied(weights) for number, weights, _ in train_together(load(), rest, CPU)}
    for one in (*specs, *rest):
        one.events.close()
    for place, number in enumerate((0, 1, 3)):
        (alone, _) = train(tmp_path / f"alone{number}", [group[number]])[0]
        assert equal(resumed[place], alone)
        assert losses(tmp_path / str(number)) == losses(tmp_path / f"alone{number}" / "0")


def the_one_that_ends(specs: list[AdapterSpec]) -> tuple[int, Outcome]:
    """Train a group that is interrupted; return the place and the outcome of who ends before."""
    ended = train_together(load(), specs, CPU)
    number, _, outcome = next(ended)
    with pytest.raises(KeyboardInterrupt):
        next(ended)
    for one in specs:
        one.events.close()
    return number, outcome


def test_who_ends_after_an_interrupt_does_not_hide_it(tmp_path: Path) -> None:
    """One leaves between two steps, and the other's step, begun by then, was its last."""
    setting = Setting(training={"batch_size": 6, "max_steps": 7})  # an epoch: 2, 2, 2, 1 batches
    runs = [RunFolder(tmp_path / name) for name in ("leaves", "ends")]
    for run, last in zip(runs, (3, 6), strict=True):
        one = broken_off(spec(run, setting), LOSS, last, "stop")
        with pytest.raises(KeyboardInterrupt):
            list(train_together(load(), [one], CPU))
        one.events.close()
    specs = [broken_off(spec(runs[0], setting), LOSS, 4, "stop"), spec(runs[1], setting)]
    number, outcome = the_one_that_ends(specs)
    assert isinstance(outcome, TrainResult)
    assert (number, outcome.steps) == (1, 7)
    assert newest_step(runs[0].checkpoints) == 4


def test_a_checkpoint_that_cannot_be_written_costs_no_other_run_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are interrupted; one has no room, the other can be gone on with."""
    save = AdapterTraining.save_checkpoint

    def full(self: AdapterTraining) -> None:
        if self.spec.lora.r == 2:
            raise OSError("no room")
        save(self)

    monkeypatch.setattr(AdapterTraining, "save_checkpoint", full)
    runs = [RunFolder(tmp_path / str(rank)) for rank in (2, 4)]
    specs = [spec(run, Setting({"r": int(run.path.name)})) for run in runs]
    broken_off(specs[0], LOSS, 2, "stop")
    number, outcome = the_one_that_ends(specs)
    assert (number, str(outcome)) == (0, "no room")
    assert newest_step(runs[1].checkpoints) == 2


def test_the_time_of_a_run_counts_its_validations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Trainer's does."""

    def validate(self: SharedBase, one: AdapterTraining) -> float:
        time.sleep(1)
        return 1.0

    monkeypatch.setattr(SharedBase, "validate", validate)
    (_, result) = train(tmp_path, [Setting(training={"epochs": 2}, validation=4)])[0]
    assert isinstance(result, TrainResult)
    assert result.train_seconds > 2


def test_a_base_that_is_let_go_of_leaves_the_memory(tmp_path: Path) -> None:
    """Neither the attention of the training nor that of the scorer keeps it."""
    base = load()
    train(tmp_path, VARIED[:1], base)
    lm = SharedContextLM(base, load_tokenizer(TINY, find_model(TINY)))
    lm.loglikelihood([Instance("loglikelihood", {}, ("Which?", " iron"), 0)])
    assert lm.scoring.path == "shared"
    kept = weakref.ref(base)
    del base, lm
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_base_is_bitwise_what_it_was(tmp_path: Path, quantization: str) -> None:
    """Its answer after a group, gradient checkpointing included, is the one before."""
    base = load(ModelConfig(path="random://tiny", quantization=quantization))
    hooks = [len(module._forward_hooks) for module in base.modules()]
    ids = torch.arange(30)[None]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    train(tmp_path, [Setting(training={"gradient_checkpointing": True}), VARIED[1]], base)
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert [len(module._forward_hooks) for module in base.modules()] == hooks
    assert not is_checkpointing(base)


@pytest.mark.parametrize(
    ("model", "autocast", "tolerance"),
    [
        (ModelConfig(path="random://tiny", quantization="nf4"), torch.float32, 0.0),
        (ModelConfig(path="random://tiny", dtype="bf16"), torch.bfloat16, 0.02),
    ],
    ids=["nf4", "bf16"],
)
def test_low_precision_groups_equal_their_solo_runs(
    tmp_path: Path, model: ModelConfig, autocast: torch.dtype, tolerance: float
) -> None:
    """nf4 in fp32 to the bit; bf16 within what its rounding makes of five steps."""
    precision = Precision(torch.device("cpu"), autocast)
    together = train(tmp_path / "together", VARIED[:2], load(model), precision)
    for number in range(2):
        (alone, _) = train(tmp_path / str(number), [VARIED[number]], load(model), precision)[0]
        mine = together[number][0]
        scale = max(tensor.abs().max() for tensor in alone.values())
        difference = max((mine[name] - alone[name]).abs().max() for name in alone)
        assert difference <= tolerance * scale


FP16 = Precision(torch.device("cpu"), torch.float16)  # which only tests train in, on a CPU
HALF = ModelConfig(path="random://tiny", dtype="fp16")


def scales(monkeypatch: pytest.MonkeyPatch, *firsts: float) -> None:
    """Let the trainings that are built next begin with these loss scales, in order."""
    remaining, build = list(firsts), torch.amp.GradScaler

    def begin(device: str, *, enabled: bool) -> torch.amp.GradScaler:
        return build(device, init_scale=remaining.pop(0), enabled=enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", begin)


@pytest.mark.parametrize("model", [TINY, HALF], ids=["fp32 weights", "fp16 weights"])
def test_every_run_of_a_group_in_fp16_is_bitwise_its_solo_run(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside a run whose gradients overflow at first: each has its own loss scale."""
    firsts = (65536.0, 2.0**21, 65536.0, 65536.0)
    scales(monkeypatch, *firsts, *firsts)
    together = train(tmp_path / "together", VARIED, load(model), FP16)
    for number, setting in enumerate(VARIED):
        (alone, _) = train(tmp_path / f"alone{number}", [setting], load(model), FP16)[0]
        folder = tmp_path / "together" / str(number)
        assert equal(together[number][0], alone), number
        assert losses(folder) == losses(tmp_path / f"alone{number}" / "0")
        skipped = len(losses(folder)) - len(losses(folder, "train/grad_norm"))
        assert (skipped > 0) == (number == 1)


def test_a_step_that_overflows_is_skipped_with_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by accelerate: the loss scale is halved, and the schedule waits."""
    scales(monkeypatch, 2.0**21)
    setting = Setting({}, {"lr": 1e-2, "warmup_ratio": 0.0}, {"max_steps": 12})
    train(tmp_path, [setting], load(), FP16)
    rates = losses(tmp_path / "0", "train/lr")
    events = read_events(tmp_path / "0" / "events.jsonl")
    taken = {e["step"] for e in events if e.get("key") == "train/grad_norm"}
    assert 0 < len(taken) < 12
    moved = [later < rate for rate, later in itertools.pairwise(rates)]
    assert moved == [step in taken for step in range(1, 12)]


def test_gradients_that_overflow_without_a_loss_scale_have_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halving it further would not help."""
    scales(monkeypatch, 1.0)
    overflow = torch.tensor(float("inf"))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: overflow)
    outcome = train(tmp_path, [Setting()], load(), FP16)[0][1]
    assert isinstance(outcome, Diverged)


def test_a_training_in_fp16_resumes_with_its_loss_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; a first scale would overflow again, and skip other steps."""
    setting = Setting(training={"max_steps": 12, "checkpoint_every": 6})
    scales(monkeypatch, *[2.0**21] * 3)
    (whole, _) = train(tmp_path / "whole", [setting], load(), FP16)[0]
    run = RunFolder(tmp_path / "killed" / "0")
    killed = broken_off(spec(run, setting, FP16), LOSS, 9, "killed")
    with pytest.raises(Killed):
        list(train_together(load(), [killed], FP16))
    killed.events.close()
    assert newest_step(run.checkpoints) == 6
    (resumed, _) = train(tmp_path / "killed", [setting], load(), FP16)[0]
    assert equal(whole, resumed)


def test_a_checkpoint_of_the_trainer_is_not_resumed_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Runs that it trained in an earlier version, as those in fp16, begin anew."""
    setting = Setting(training={"max_steps": 4, "checkpoint_every": 2})
    (whole, _) = train(tmp_path / "whole", [setting])[0]
    trained_by_the_trainer(tmp_path / "0", setting)
    assert newest_step(tmp_path / "0" / "checkpoints") is not None
    with caplog.at_level("WARNING", logger="finetune"):
        (anew, _) = train(tmp_path, [setting])[0]
    assert "was written by the Trainer: training begins anew" in caplog.text
    assert equal(whole, anew)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_the_8bit_optimizers_train_and_resume_on_the_cpu(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Matrices of 4,096 numbers and more have states of 8 bits, also in the checkpoint."""
    setting = Setting({"r": 64}, {"name": name}, {"max_steps": 4, "checkpoint_every": 2})
    (whole, _) = train(tmp_path, [setting])[0]
    (saved,) = tmp_path.glob("0/checkpoints/*/optimizer.pt")
    states = torch.load(saved, weights_only=True)["state"].values()
    kept = [state["__bnb_optimizer_quant_state__"] for state in states]  # bitsandbytes' own wrap
    assert any(state["state1"].dtype == torch.uint8 for state in kept)
    with caplog.at_level("INFO", logger="finetune"):
        (resumed, _) = train(tmp_path, [setting])[0]
    assert "resuming at step 2" in caplog.text
    assert equal(whole, resumed)
