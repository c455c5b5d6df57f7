"""Which runs share a training step: decided from their settings alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from finetune.config.schema import Config, DataConfig, LoraConfig, ModelConfig, OptimizerConfig
from finetune.pipeline import run_jobs
from finetune.training import multi_adapter
from finetune.training.adapter_training import AdapterTraining

from finetune.config.schema import PeftConfig, TrainingConfig  # isort: skip
from finetune.files import file_digest
from finetune.pipeline.jobs import Job
from finetune.pipeline.session import Session
from finetune.training.grouping import Group, Limit, find_groups, find_limit, find_obstacle
from tests.conftest import TINY, Command, last_of_each

ROOM = Limit(8, "it is measured")
BASE = Config(data=DataConfig(path="rows.jsonl"), training=TrainingConfig(data_seed=1))


def test_runs_that_differ_in_their_adapters_go_together() -> None:
    """Rank, alpha, dropout, targets, rsLoRA, optimizer, schedule and seed part nothing."""
    grid = [
        BASE,
        replace(BASE, lora=LoraConfig(r=4, alpha=8, dropout=0.1, use_rslora=True)),
        replace(BASE, lora=LoraConfig(target_modules=["q_proj"], init="gaussian")),
        replace(BASE, optimizer=OptimizerConfig(lr=1e-5, scheduler="linear", max_grad_norm=0.0)),
        replace(BASE, training=replace(BASE.training, seed=7, checkpoint_every=3)),
    ]
    assert find_groups(grid, [ROOM] * 5) == [Group([0, 1, 2, 3, 4])]
    assert find_groups(grid, [Limit(1, "it is so")] * 5) == [
        Group([index], "it is so") for index in range(5)
    ]


def test_groups_are_as_few_as_can_be_and_of_even_sizes() -> None:
    """One that is left over says what kept it out; the least of the limits holds for all."""
    two = Limit(2, "there is room for two")
    assert find_groups([BASE] * 5, [ROOM, two, ROOM, ROOM, ROOM]) == [
        Group([0], "there is room for two"), Group([1, 2]), Group([3, 4]),
    ]  # fmt: skip
    assert [len(group.indices) for group in find_groups([BASE] * 9, [ROOM] * 9)] == [4, 5]


@pytest.mark.parametrize(
    ("training", "asked", "most", "reason"),
    [
        ({"batch_size": 1}, None, 8, "more than 8"),
        ({"batch_size": 4}, None, 1, "training.batch_size=4"),
        ({"batch_size": 1, "sequence_packing": True}, None, 1, "training.sequence_packing=true"),
        ({"batch_size": 4}, 3, 3, "sweep.max_concurrent_adapters=3"),
    ],
)
def test_as_many_go_together_as_pay_or_as_the_sweep_says(
    training: dict[str, Any], asked: int | None, most: int, reason: str
) -> None:
    """The limit names what set it."""
    config = replace(BASE, training=TrainingConfig(**training))
    config.sweep = replace(BASE.sweep, max_concurrent_adapters=asked)
    limit = find_limit(config)
    assert limit.most == most
    assert reason in limit.reason


@pytest.mark.parametrize(
    "other",
    [
        replace(BASE, model=ModelConfig(quantization="nf4")),
        replace(BASE, data=DataConfig(path="rows.jsonl", num_examples=5)),
        replace(BASE, training=TrainingConfig(data_seed=2)),
        replace(BASE, training=TrainingConfig(data_seed=1, batch_size=1)),
        replace(BASE, training=TrainingConfig(data_seed=1, precision="bf16")),
        replace(BASE, training=TrainingConfig(data_seed=1, epochs=2)),
        replace(BASE, training=TrainingConfig(data_seed=1, sequence_packing=True)),
    ],
)
def test_another_base_other_rows_or_batches_part_runs(other: Config) -> None:
    """What the common step has once must be the same for all."""
    groups = find_groups([BASE, other, BASE], [ROOM] * 3)
    assert [group.indices for group in groups] == [[0, 2], [1]]


def test_a_seed_that_orders_the_rows_parts_runs() -> None:
    """Without a data_seed of its own the seed also orders the rows."""
    unordered = replace(BASE, training=TrainingConfig(data_seed=None, seed=1))
    other = replace(BASE, training=TrainingConfig(data_seed=None, seed=2))
    assert [g.indices for g in find_groups([BASE, unordered, other], [ROOM] * 3)] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": LoraConfig(use_dora=True)}, "use_dora"),
        ({"lora": LoraConfig(init="pissa")}, "lora.init=pissa changes the base"),
        ({"model": ModelConfig(quantization="int8")}, "int8"),
        ({"optimizer": OptimizerConfig(name="adafactor")}, "optimizer.name=adafactor"),
        ({"peft": PeftConfig(method="ia3")}, "peft.method=ia3"),
    ],
)
def test_what_cannot_share_a_step_goes_alone_with_its_reason(
    changes: dict[str, Any], said: str
) -> None:
    """The plan can say why."""
    alone = replace(BASE, **changes)
    assert said in str(find_obstacle(alone))
    groups = find_groups([BASE, alone, BASE], [ROOM] * 3)
    assert [group.indices for group in groups] == [[0, 2], [1]]
    assert said in str(groups[1].reason)


def adapters(folder: Path) -> dict[str, str]:
    files = folder.glob("*/adapter/adapter_model.safetensors")
    return {path.parts[-3]: file_digest(path) for path in files}


@pytest.mark.slow
def test_a_sweep_trains_together_what_it_plans_so(tmp_path: Path, finetune: Command) -> None:
    """The plan names the group; results and adapters are those of runs one by one."""
    grid = ("--multirun", *TINY, "lora=default,dora", "lora.r=2,4")
    planned = finetune(*grid, "sweep.max_concurrent_adapters=8", "sweep.dry_run=true")
    assert "trained together: lora=default lora.r=2; lora=default lora.r=4" in planned.stdout
    alone_for = "trained separately: lora=dora lora.r=2; lora=dora lora.r=4 (lora.use_dora=true"
    assert alone_for in planned.stdout
    together = finetune(*grid, "sweep.max_concurrent_adapters=8")
    assert together.returncode == 0, together.stderr
    assert "train 2 adapters" in together.stderr
    alone = finetune(*grid, "sweep.max_concurrent_adapters=1", "output_dir=alone")
    assert alone.returncode == 0, alone.stderr
    assert "train 2 adapters" not in alone.stderr
    assert len(adapters(tmp_path / "alone")) == 4
    assert adapters(tmp_path / "outputs") == adapters(tmp_path / "alone")


@pytest.mark.slow
def test_a_killed_group_goes_on_also_when_it_is_smaller(tmp_path: Path, finetune: Command) -> None:
    """Kill -9 in mid-group; two of its three runs are asked for again and come out as alone."""
    settings = (
        *last_of_each((*TINY, "data.num_examples=64")), "training.epochs=2",
        "training.checkpoint_every=1", "lora.dropout=0.1",
        "sweep.max_concurrent_adapters=8", "evaluation=none",
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "--multirun", *settings, "lora.r=2,4,8"],
        cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None:
        logs = list(tmp_path.glob("outputs/*/events.jsonl"))
        if len(logs) == 3 and all(log.read_text().count("train/loss") >= 3 for log in logs):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    assert adapters(tmp_path / "outputs") == {}
    again = finetune("--multirun", *settings, "lora.r=2,8")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("resumed at step") == 2
    alone = finetune("--multirun", *settings[:-2], "evaluation=none", "lora.r=2,8",
                     "sweep.max_concurrent_adapters=1", "output_dir=alone")  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert adapters(tmp_path / "outputs") == adapters(tmp_path / "alone") != {}


def job(folder: Path, **changes: Any) -> Job:
    """Return a job on the tiny model and a few rows of the demo, without evaluation."""
    config = Config(model=ModelConfig(path="random://tiny"), output_dir=str(folder))
    config.data = DataConfig(path="package://finetune/demo/rows.jsonl", num_examples=8)
    config.training.max_length, config.training.batch_size = 400, 2
    config.evaluation.tasks = []
    config = replace(config, **changes)
    return Job(config, OmegaConf.to_yaml(OmegaConf.structured(config)), [], {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_too_many_adapters_for_the_memory_are_halved(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory with four and with two: each finishes alone, none is lost."""
    sizes = []
    together = multi_adapter.train_together

    def greedy(base: Any, specs: Any, precision: Any) -> Any:
        sizes.append(len(specs))
        if len(specs) > 1:
            raise error
        return together(base, specs, precision)

    monkeypatch.setattr(multi_adapter, "train_together", greedy)
    jobs = [job(tmp_path, lora=LoraConfig(r=rank)) for rank in (1, 2, 3, 4)]
    assert run_jobs.run(jobs) == ["finished"] * 4
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_one_failing_run_of_a_group_is_recorded_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cannot begin, one breaks at its second step; the third is what it is alone."""
    begun, step = AdapterTraining.__init__, AdapterTraining.learn

    def begin(self: AdapterTraining, base: Any, spec: Any) -> None:
        if spec.lora.r == 1:
            raise RuntimeError("no such thing")
        begun(self, base, spec)

    def learn(self: AdapterTraining, loss: float) -> None:
        if self.spec.lora.r == 3 and self.step == 1:
            raise RuntimeError("it broke")
        step(self, loss)

    monkeypatch.setattr(AdapterTraining, "__init__", begin)
    monkeypatch.setattr(AdapterTraining, "learn", learn)
    jobs = [job(tmp_path / "together", lora=LoraConfig(r=rank)) for rank in (1, 2, 3)]
    assert run_jobs.run(jobs) == ["failed", "finished", "failed"]
    told = [json.loads(path.read_text()) for path in tmp_path.glob("together/*/status.json")]
    reasons = {one["reason"] for one in told if one["state"] == "failed"}
    assert reasons == {"RuntimeError: no such thing", "RuntimeError: it broke"}
    assert run_jobs.run([job(tmp_path / "alone", lora=LoraConfig(r=2))]) == ["finished"]
    assert adapters(tmp_path / "together") == adapters(tmp_path / "alone") != {}


def test_one_diverging_run_of_a_group_is_recorded_alone(tmp_path: Path) -> None:
    """States and reasons are each run's own."""
    wild = OptimizerConfig(lr=1e25, warmup_ratio=0.0)
    jobs = [job(tmp_path), job(tmp_path, optimizer=wild), job(tmp_path, lora=LoraConfig(r=2))]
    assert run_jobs.run(jobs) == ["finished", "diverged", "finished"]
    told = [json.loads(path.read_text()) for path in tmp_path.glob("*/status.json")]
    assert sorted(status["state"] for status in told) == ["diverged", "finished", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base_leaves_none_behind(
    tmp_path: Path, init: str
) -> None:
    """The run after it, in the same process, is the run alone."""
    plain = job(tmp_path / "after", lora=LoraConfig(r=2))
    session = Session()
    changing = job(tmp_path, lora=LoraConfig(r=2, init=init))
    assert run_jobs.run([changing], session) == ["finished"]
    assert run_jobs.run([plain], session) == ["finished"]
    assert run_jobs.run([job(tmp_path / "alone", lora=LoraConfig(r=2))]) == ["finished"]
    assert adapters(tmp_path / "after") == adapters(tmp_path / "alone") != {}
