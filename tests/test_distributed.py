"""Several processes under a launcher give what one gives, and leave what one leaves."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch
from safetensors.torch import load_file

from finetune import distributed
from finetune.config.inputs import Inputs, Source
from finetune.config.schema import Config, DataConfig, ModelConfig, PeftConfig, SweepConfig
from finetune.data.token_rows import Example
from finetune.models.precision import pick_device
from finetune.pipeline import identity
from finetune.pipeline.jobs import Job
from finetune.signals import StopSignals
from finetune.sweeps import launchers
from finetune.sweeps.pool import build_pool
from finetune.sweeps.worker import LaunchedWorker, Worker
from finetune.tracking.events import NullEventLog
from finetune.training import grouping
from finetune.training.callbacks import is_stop_agreed
from finetune.training.row_order import EvenOrder, filled_up, rows_of_step, with_filler
from finetune.training.steps import Diverged
from tests.conftest import TINY, Command, last_of_each

# Eighteen rows: the last step of each epoch is not full.
TRAINING = (
    *TINY, "data.num_examples=18", "training.batch_size=2", "training.epochs=3",
    "training.checkpoint_every=1", "lora.r=4", "evaluation.limit=4",
)  # fmt: skip
ACCELERATE = ("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2",
              "--main_process_port=0")  # fmt: skip
FSDP = ("accelerate.commands.accelerate_cli", "launch", "--use_fsdp", "--fsdp_version=2",
        "--num_processes=2", "--main_process_port=0")  # fmt: skip
TORCHRUN = ("torch.distributed.run", "--nproc_per_node=2", "--standalone")


def start(folder: Path, launcher: tuple[str, ...], *arguments: str) -> subprocess.Popen[str]:
    """Start the command in two processes, in an empty folder."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *(["-m", *launcher] if launcher else []), "-m", "finetune",
         *last_of_each(arguments)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(folder: Path, launcher: tuple[str, ...], *arguments: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of the command in two processes."""
    process = start(folder, launcher, *arguments)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def run_and_kill(folder: Path, launcher: tuple[str, ...], *arguments: str, steps: int) -> Path:
    """Kill -9 all processes of the command after some steps, and return the run's folder."""
    process = start(folder, launcher, *arguments)
    while process.poll() is None:
        logs = list(folder.glob("outputs/*/events.jsonl"))
        if logs and logs[0].read_text().count("train/loss") >= steps:
            family = psutil.Process(process.pid)
            for one in [family, *family.children(recursive=True)]:
                one.send_signal(signal.SIGKILL)
        time.sleep(0.005)
    process.communicate()
    (run_folder,) = folder.glob("outputs/*")
    return run_folder


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("multirun_reports/*/results.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def events(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[object]:
    return [event["value"] for event in events(run) if event.get("key") == "train/loss"]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Return the folder of a finished sweep of two processes, what it printed, and its errors."""
    folder = tmp_path_factory.mktemp("launched")
    code, out, err = run(folder, ACCELERATE, "--multirun", *TRAINING, "lora.dropout=0,0.1")
    assert code == 0, err
    return folder, out, err


@pytest.mark.slow
def test_two_processes_train_what_one_does(
    launched: tuple[Path, str, str], finetune: Command, tmp_path: Path
) -> None:
    """Two of batch 2 take the steps of one of batch 2 x 2: losses within 1e-5, adapter 1e-4."""
    (row, _) = rows(launched[0])
    ours = launched[0] / "outputs" / row["run"]
    one = finetune(*TRAINING, "training.gradient_accumulation_steps=2", "evaluation=none")
    assert one.returncode == 0, one.stderr
    (theirs,) = tmp_path.glob("outputs/*")
    assert len(losses(ours)) == 15
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    mine, other = adapter(ours), adapter(theirs)
    assert max(float((mine[name] - other[name]).abs().max()) for name in other) < 1e-4


@pytest.mark.slow
def test_a_worker_of_two_processes_trains_what_a_launcher_does(
    launched: tuple[Path, str, str], tmp_path: Path
) -> None:
    """The same run in the same steps, also where one of the processes is killed in training."""
    (row, _) = rows(launched[0])
    theirs = launched[0] / "outputs" / row["run"]
    sweep = start(tmp_path, (), *TRAINING, "lora.dropout=0", "workers.gpus_per_worker=2")
    while not any(len(losses(log.parent)) > 2 for log in tmp_path.glob("outputs/*/events.jsonl")):
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.01)
    family = psutil.Process(sweep.pid).children(recursive=True)
    (rank,) = [one for one in family if one.cmdline()[1:] == ["-m", "finetune"]]
    rank.kill()
    out, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, err
    assert "a process of the worker was killed by SIGKILL; it is tried once more" in out
    (ours,) = tmp_path.glob("outputs/*")
    assert ours.name == theirs.name
    assert all(torch.equal(one, adapter(theirs)[name]) for name, one in adapter(ours).items())
    left = [one for one in family if one.is_running() and one.status() != "zombie"]
    assert left == []


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(launched: tuple[Path, str, str]) -> None:
    """One folder a run with one set of events and files; one table; each line printed once."""
    folder, out, err = launched
    assert [row["status"] for row in rows(folder)] == ["finished", "finished"]
    assert all(float(row["demo_science/base_acc"]) >= 0 for row in rows(folder))
    assert out.count("report: ") == 1
    assert err.count("rows read, 18 used") == 2
    assert sorted(path.name for path in folder.iterdir()) == ["multirun_reports", "outputs"]
    runs = list(folder.glob("outputs/*"))
    assert len(runs) == 2
    for run in runs:
        assert sorted(path.name for path in run.iterdir()) == [
            ".outcomes", "adapter", "config.yaml", "data.json", "digests.json", "environment.json",
            "evaluation", "events.jsonl", "finetune.log", "overrides.yaml", "samples.json",
            "status.json",
            "training.json",
        ]  # fmt: skip
        steps = [event["step"] for event in events(run) if event.get("key") == "train/loss"]
        assert steps == list(range(1, 16))
        states = [event["state"] for event in events(run) if event["event"] == "status"]
        assert states == ["running", "finished"]
        assert json.loads((run / "environment.json").read_text())["processes"] == 2


# Each step ends later than this time, by rank 0's clock, which decides for both.
BY_TIME = ("training.checkpoint_every=1000", "training.checkpoint_minutes=0.000001")


@pytest.mark.slow
@pytest.mark.parametrize("every", [(), BY_TIME], ids=["steps", "minutes"])
def test_a_killed_launch_goes_on_bit_for_bit(
    tmp_path: Path, launched: tuple[Path, str, str], every: tuple[str, ...]
) -> None:
    """Kill -9 of all processes in the third epoch; the same command gives the same adapter."""
    command = (*TRAINING, "lora.dropout=0.1", *every)
    run_folder = run_and_kill(tmp_path, TORCHRUN, *command, steps=11)
    assert not (run_folder / "adapter").exists()
    checkpoint = max(run_folder.glob("checkpoints/step-*"))  # a kill may leave the last one too
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    code, _, err = run(tmp_path, TORCHRUN, *command)
    assert code == 0, err
    assert "resuming at step" in err
    whole = launched[0] / "outputs" / run_folder.name
    assert losses(run_folder) == losses(whole)
    mine, other = adapter(run_folder), adapter(whole)
    assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.slow
def test_weights_dealt_out_train_as_in_one_process(tmp_path: Path, finetune: Command) -> None:
    """Two processes under FSDP, killed and resumed, give one's losses and weights within 1e-5."""
    command = (*(given for given in TRAINING if given != "lora.r=4"), "peft=full")
    ours = run_and_kill(tmp_path / "two", FSDP, *command, steps=6)
    assert not (ours / "model").exists()
    checkpoint = max(ours.glob("checkpoints/step-*"))
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    trained = load_file(checkpoint / "trained.safetensors")
    assert {name: moments["exp_avg"].shape for name, moments in state.items()} == {
        name: weights.shape for name, weights in trained.items()
    }
    code, _, err = run(tmp_path / "two", FSDP, *command)
    assert code == 0, err
    assert "resuming at step" in err
    assert float(rows(tmp_path / "two")[0]["demo_science/acc"]) >= 0
    one = finetune(*command, "training.gradient_accumulation_steps=2", "evaluation=none")
    assert one.returncode == 0, one.stderr
    (theirs,) = tmp_path.glob("outputs/*")
    assert len(losses(ours)) == 15
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    mine, other = (load_file(each / "model" / "model.safetensors") for each in (ours, theirs))
    assert mine.keys() == other.keys()
    assert max(float((mine[name] - other[name]).abs().max()) for name in other) < 1e-5


@pytest.mark.slow
def test_a_refusal_ends_all_processes(tmp_path: Path) -> None:
    """What only the first process finds ends the others with its exit code; it is told once."""
    _, _, err = run(tmp_path, TORCHRUN, *TRAINING, "optimizer.name=adamm")
    assert err.count("optimizer.name is 'adamm'") == 1
    assert "exitcode  : 2" in err
    assert "exitcode  : 1" not in err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_one_process_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's world of one is the ordinary case: a worker, and nothing told to anybody."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not distributed.is_launched()
    assert isinstance(build_pool([Job(Config(), "", [], {})], is_quiet=True)._workers[0], Worker)
    assert distributed.from_main(lambda: 3) == 3
    assert distributed.from_all("this") == ["this"]
    inputs = Inputs("cpu", Source("", ""), [], ModelConfig(), "", Path())
    with distributed.leading(), distributed.training_together(Config(), inputs, Diverged):
        assert not is_stop_agreed(StopSignals())
    with (
        pytest.raises(OSError, match="disk"),
        distributed.training_together(Config(), inputs, Diverged),
    ):
        raise OSError("disk")
    assert not distributed.is_desynchronised()


def test_a_launched_process_knows_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its GPU, why runs go alone, another identity, and what its launcher may not ask for."""
    config = Config(model=ModelConfig(path="random://tiny"), output_dir=str(tmp_path))
    config.data = DataConfig(path="package://finetune/demo/rows.jsonl", num_examples=8)
    alone = identity.find_inputs(config).identity
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert (distributed.rank(), distributed.is_main()) == (3, False)
    assert pick_device("cuda") == torch.device("cuda", 1)
    assert grouping.find_obstacle(config) == "4 processes train each run"
    assert identity.find_inputs(config).identity != alone
    assert isinstance(
        build_pool([Job(config, "", [], {})], is_quiet=True)._workers[0], LaunchedWorker
    )
    assert launchers.find_problems(config) == []
    config.sweep = SweepConfig(job_timeout=5)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    problems = launchers.find_problems(config)
    assert len(problems) == 4
    assert "set training.precision" in problems[0]
    assert "use --fsdp_version 2" in problems[1]
    assert "FSDP is for peft=full only" in problems[2]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("FSDP_VERSION", "2")
    config.sweep, config.peft = SweepConfig(), PeftConfig(method="full")
    assert launchers.find_problems(config) == []
    config.optimizer.name = "adafactor"
    assert "under FSDP use adamw_torch" in launchers.find_problems(config)[0]
    config.optimizer.name = "sgd"
    sharded = identity.find_inputs(config).identity
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert identity.find_inputs(config).identity != sharded


def test_the_rows_of_all_processes_are_those_of_one() -> None:
    """An epoch's order is that of one process; what fills the last batches has no labels."""
    arguments = SimpleNamespace(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, world_size=3, data_seed=7
    )
    order = EvenOrder(10, cast(Any, arguments))
    order.on_epoch_begin(cast(Any, None), cast(Any, SimpleNamespace(epoch=1.5)), cast(Any, None))
    assert len(order) == len(list(order)) == 12
    second_epoch = rows_of_step(1, 10, cast(Any, arguments))
    assert list(order)[:10] == [row for batch in second_epoch for row in batch]
    assert list(order)[10:] == [10, 10]
    filled = with_filler([Example(input_ids=[5, 6, 7], labels=[5, 6, 7]),
                          Example(input_ids=[8, 9], labels=[8, 9])])  # fmt: skip
    assert filled[2] == {"input_ids": [8, 9], "labels": [-100, -100]}


def test_held_out_and_joined_rows_are_filled_up_alike() -> None:
    """Validation is dealt out in full batches; a joined row says where its parts end."""
    joined = Example(input_ids=[5, 6, 7], labels=[-100, 6, -100], seq_lengths=[2, 1])
    filler = {"input_ids": [5, 6, 7], "labels": [-100] * 3, "seq_lengths": [3]}
    assert filled_up([joined] * 3, 4) == [joined] * 3 + [filler]
    assert filled_up([joined] * 4, 4) == [joined] * 4


def test_another_process_writes_no_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The null log takes all that an event log takes."""
    monkeypatch.chdir(tmp_path)
    log = NullEventLog()
    log.metrics({"train/loss": 1.0}, 1)
    log.tag("a", "b")
    log.params({"a": "b"})
    log.status("running")
    log.artifact("a", "b")
    log.close()
    assert list(tmp_path.iterdir()) == []
