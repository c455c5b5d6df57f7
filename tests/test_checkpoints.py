"""Checkpoints: whole, or passed over; a resumed training is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from finetune import signals
from finetune.config.schema import OptimizerConfig, TrainingConfig, build_config
from finetune.files import file_digest
from finetune.pipeline import run_jobs
from finetune.pipeline.jobs import Job
from finetune.signals import REPEAT_SECONDS
from finetune.tracking.claims import ClaimLost
from finetune.tracking.events import EventLog
from finetune.tracking.run_folder import RunFolder
from finetune.training import adapter_training, callbacks
from finetune.training import steps as steps_module
from finetune.training.checkpoints import (
    MANIFEST,
    MARKER,
    find_newest,
    find_problem,
    find_step,
    newest_step,
    write_checkpoint,
)
from finetune.training.steps import find_resume
from finetune.training.trainer import build_arguments
from tests.conftest import TINY, Command, last_of_each
from tests.takeover import build_job
from tests.test_trainer import train as train_alone
from tests.trainings import CPU, Setting, train

# Warm-up, decay, dropout and accumulation: all that a resume could get wrong.
TRAINING = last_of_each(
    (
        *TINY, "evaluation=none", "data.num_examples=32", "training.epochs=2",
        "training.batch_size=2", "training.gradient_accumulation_steps=2",
        "optimizer.scheduler=cosine", "optimizer.warmup_ratio=0.2", "lora.dropout=0.1",
        "training.checkpoint_every=1", "training.keep_checkpoints=2",
    )
)  # fmt: skip


def write(
    folder: Path,
    step: int,
    keep: int = 9,
    best: int | None = None,
    *,
    claim: Any = None,
    during: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint of two files."""

    def fill(into: Path) -> None:
        (into / "weights").write_bytes(bytes([step]) * 1000)
        (into / "state").write_text(f"step {step}")
        during()

    write_checkpoint(folder, step, step * 1.5, fill, keep=keep, best=best, claim=claim)
    return folder / f"step-{step:07d}"


def test_who_lost_the_run_puts_no_checkpoint_in_place(tmp_path: Path) -> None:
    """At any moment of it: its successor's checkpoints stay as they are."""
    folder = tmp_path / "checkpoints"
    for moment in ("before", "while it is filled"):
        claim = SimpleNamespace(token="old", check=lambda: None)
        write(folder, 5, claim=claim)

        def lose(claim: SimpleNamespace = claim) -> None:
            def check() -> None:
                raise ClaimLost("another process has taken over")

            claim.check = check

        if moment == "before":
            lose()
        with pytest.raises(ClaimLost):
            write(folder, 6, claim=claim, during=lose)
        assert [path.name for path in folder.iterdir()] == ["step-0000005"]


def test_a_successor_removes_what_is_not_in_place(tmp_path: Path) -> None:
    """So that a process that was halted just before the rename cannot put it there."""
    run = RunFolder(tmp_path)
    arguments = build_arguments(run, OptimizerConfig(), TrainingConfig(), CPU, validate=False)
    (run.checkpoints / ".step-0000005.0123.tmp").mkdir(parents=True)
    events = EventLog(run.events)
    assert find_resume(arguments, events) is None
    events.close()
    assert not list(run.checkpoints.iterdir())


def test_a_checkpoint_of_the_newest_claim_comes_first(tmp_path: Path) -> None:
    """One that an earlier holder marked late is not resumed from."""
    for step, token in ((5, "old"), (8, "new"), (10, "old")):
        write(tmp_path, step, claim=SimpleNamespace(token=token, check=lambda: None))
    for claims, step in (
        (["old", "new"], 8),
        (["old", "new", "third"], 8),
        ([], 10),
        (["old"], 10),
    ):
        newest = find_newest(tmp_path, claims)
        assert newest is not None
        assert newest.step == step


@pytest.mark.parametrize("file", [MANIFEST, MARKER])
def test_a_damaged_one_is_named_whatever_its_claim(
    tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its claim may be what cannot be read."""
    claim = SimpleNamespace(token="mine", check=lambda: None)
    write(tmp_path, 5, claim=claim)
    (write(tmp_path, 10, claim=claim) / file).unlink()
    newest = find_newest(tmp_path, ["mine"])
    assert newest is not None
    assert newest.step == 5
    assert "skipping the damaged checkpoint" in caplog.text


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    """`keep` newest stay; step and time come back."""
    for step in (5, 10, 15):
        write(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000010", "step-0000015"]
    newest = find_newest(tmp_path)
    assert newest is not None
    assert (newest.step, newest.seconds) == (15, 22.5)
    assert newest_step(tmp_path) == 15
    assert find_newest(tmp_path / "none") is None


@pytest.mark.parametrize("file", ["weights", "state", MANIFEST, MARKER])
@pytest.mark.parametrize("harm", ["missing", "truncated", "empty", "flipped"])
def test_a_harmed_checkpoint_is_passed_over(
    tmp_path: Path, file: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before it is used, and the log says what was wrong."""
    write(tmp_path, 5)
    harmed = write(tmp_path, 10) / file
    content = harmed.read_bytes()
    if harm == "missing":
        harmed.unlink()
    else:
        middle = len(content) // 2
        changed = {
            "truncated": content[:middle],
            "empty": b"",
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        }
        harmed.write_bytes(changed[harm])
    newest = find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 5
    assert "skipping the damaged checkpoint" in caplog.text
    assert "step-0000010" in caplog.text


def test_one_that_was_passed_over_does_not_push_out_what_came_after(tmp_path: Path) -> None:
    """It is of a later step than the training that went on without it, and goes first."""
    write(tmp_path, 5, keep=1)
    (write(tmp_path, 10, keep=2) / MARKER).unlink()
    write(tmp_path, 7, keep=1)
    newest = find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000007"]


def test_a_whole_one_is_not_written_again(tmp_path: Path) -> None:
    """For a moment there would be none; one that is not whole is."""
    path = write(tmp_path, 5)
    before = (path / MARKER).stat()
    write(tmp_path, 5)
    assert (path / MARKER).stat() == before
    (path / "weights").write_bytes(b"other")
    write(tmp_path, 5)
    assert find_problem(path) is None


def test_the_best_one_stays_and_those_after_it_need_it(tmp_path: Path) -> None:
    """It goes once another is the best; harmed, it takes those with it that name it."""
    for step, best in ((5, 5), (10, 5), (15, 5)):
        write(tmp_path, step, keep=1, best=best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000005", "step-0000015"]
    newest = find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 15
    best_path = find_step(tmp_path, 5)
    (best_path / "weights").write_bytes(b"other")
    problem = "the checkpoint of its best step 5: weights has 5 bytes of 1000"
    assert find_problem(newest.path) == problem
    assert find_newest(tmp_path) is None
    fault = r"the adapter of step 5 cannot be loaded.*weights has 5 bytes"
    with pytest.raises(OSError, match=fault):
        find_step(tmp_path, 5)
    write(tmp_path, 20, keep=1, best=20)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000020"]


def test_a_failure_while_writing_leaves_the_older_ones(tmp_path: Path) -> None:
    """What was half-written is gone; the message says where and how many bytes."""
    older = write(tmp_path, 5)

    def fill(into: Path) -> None:
        (into / "weights").write_bytes(b"1" * 123)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"step-0000006 after 123 bytes .*No space.*bytes are free"):
        write_checkpoint(tmp_path, 6, 1.0, fill, keep=1)
    assert list(tmp_path.iterdir()) == [older]
    assert find_problem(older) is None


@pytest.mark.parametrize("is_grouped", [True, False], ids=["group", "trainer"])
def test_checkpoints_by_time_change_no_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_grouped: bool
) -> None:
    """Each step that ends later than the time gets one; here every one."""
    steps: list[int] = []
    write_one = write_checkpoint

    def noted(folder: Path, step: int, *more: Any, **settings: Any) -> None:
        steps.append(step)
        write_one(folder, step, *more, **settings)

    monkeypatch.setattr(steps_module, "write_checkpoint", noted)
    weights = []
    for number, minutes in enumerate((None, 1e-9)):
        settings = {"max_steps": 4, "checkpoint_minutes": minutes}
        if is_grouped:
            weights.append(train(tmp_path / str(number), [Setting(training=settings)])[0][0])
        else:
            adapted, _, _ = train_alone(tmp_path / str(number), training=settings)
            state = adapted.state_dict().items()
            weights.append({name: tensor for name, tensor in state if "lora" in name})
        if minutes is None:
            assert steps == ([] if is_grouped else [4])  # the Trainer's at its end
            steps.clear()
    assert steps == ([1, 2, 3] if is_grouped else [1, 2, 3, 4])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_checkpoint_is_due_by_the_time_since_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of whatever reason that one was; without the setting none is ever due."""
    now = [1000.0]
    monkeypatch.setattr(steps_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    timer, never = steps_module.CheckpointTimer(2.5), steps_module.CheckpointTimer(None)
    for passed, is_due in ((149, False), (1, True), (1000, True), (0, False), (149, False)):
        now[0] += passed
        if passed == 0:
            timer.restart()
        assert timer.is_due is is_due
    now[0] += 10**9
    assert (timer.is_due, never.is_due) == (True, False)


class EverySecondStep:
    """Stands for a CheckpointTimer of which every second step since a checkpoint is due."""

    def __init__(self, minutes: float | None) -> None:
        assert minutes == 7.5
        self.restart()

    def restart(self) -> None:
        self.steps = 0

    @property
    def is_due(self) -> bool:
        self.steps += 1
        return self.steps == 2


@pytest.mark.parametrize("is_grouped", [True, False], ids=["group", "trainer"])
def test_a_checkpoint_by_steps_restarts_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_grouped: bool
) -> None:
    """Both loops write those of `checkpoint_every` (here 3, 6) and those that are due by time."""
    steps: list[int] = []
    monkeypatch.setattr(
        steps_module, "write_checkpoint", lambda folder, step, *_, **__: steps.append(step)
    )
    for module in (adapter_training, callbacks):
        monkeypatch.setattr(module, "CheckpointTimer", EverySecondStep)
    settings = {"max_steps": 8, "checkpoint_every": 3, "checkpoint_minutes": 7.5}
    if is_grouped:
        train(tmp_path, [Setting(training=settings)])
    else:
        train_alone(tmp_path, training=settings)
    assert steps == ([2, 3, 5, 6] if is_grouped else [2, 3, 5, 6, 8])


def adapters(folder: Path) -> dict[str, str]:
    """Return each run's adapter by sha256."""
    files = folder.glob("outputs/*/adapter/adapter_model.safetensors")
    return {path.parts[-3]: file_digest(path) for path in files}


def losses(folder: Path) -> list[tuple[int, float]]:
    """Return the steps and losses of the only run."""
    (log,) = folder.glob("outputs/*/events.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return [(e["step"], e["value"]) for e in events if e.get("key") == "train/loss"]


def interrupted_at(folder: Path, step: int, number: int, *more: str) -> int:
    """Start the run, send its sweep a signal once a step was logged, and return its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", *last_of_each((*TRAINING, *more))], cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None:
        logs = list(folder.glob("outputs/*/events.jsonl"))
        if logs and logs[0].read_text().count("train/loss") >= step:
            process.send_signal(number)
            break
        time.sleep(0.01)
    return process.wait(timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 75),
        (signal.SIGUSR1, 75),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, finetune: Command, number: int, code: int
) -> None:
    """Adapter and every step's loss are the same bits, however the run was stopped."""
    whole = tmp_path / "whole"
    whole.mkdir()
    longer = "training.epochs=6"  # seconds, so that a busy machine does not miss the moment
    finetune(*TRAINING, longer, f"output_dir={whole}/outputs")
    assert interrupted_at(tmp_path, 5, number, longer) == code
    (run,) = tmp_path.glob("outputs/*")
    stopped_at = newest_step(run / "checkpoints")
    assert stopped_at is not None
    assert not (run / "adapter").exists()
    if number != signal.SIGKILL:
        assert '"interrupted"' in (run / "status.json").read_text()
        tables = [path.read_text() for path in tmp_path.glob("multirun_reports/*/results.csv")]
        assert any(",interrupted," in table for table in tables)
    done = finetune(*TRAINING, longer)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stderr
    assert adapters(tmp_path) == adapters(whole)
    assert losses(tmp_path) == losses(whole)
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 49))
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("method", ["plain", "dora"])  # one by each of the two loops
def test_a_run_goes_on_at_the_step_of_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Its checkpoint is written though the signal is repeated meanwhile, as schedulers do."""
    job = build_job(tmp_path, method)
    job.config.training.checkpoint_every = 1000
    job.config.evaluation.tasks = []
    record, write = EventLog.metrics, write_checkpoint

    def stop_at_5(log: EventLog, values: Mapping[str, float], step: int) -> None:
        record(log, values, step)
        if step == 5 and "train/loss" in values:
            signal.raise_signal(signal.SIGTERM)

    def write_slowly(*given: Any, **named: Any) -> None:
        time.sleep(REPEAT_SECONDS * 1.2)
        signal.raise_signal(signal.SIGTERM)
        write(*given, **named)

    with monkeypatch.context() as patch, signals.stops_raised():
        patch.setattr(EventLog, "metrics", stop_at_5)
        patch.setattr(steps_module, "write_checkpoint", write_slowly)
        assert run_jobs.run([job], stage="train") == ["interrupted"]
    (run,) = map(RunFolder, tmp_path.iterdir())
    status = run.status()
    assert status is not None
    assert status.reason == "stopped by SIGTERM"
    last = run.metric("train/loss")[-1].step
    assert last in (5, 6)  # the Trainer logs a step once it has looked for a stop
    assert newest_step(run.checkpoints) == last
    caplog.set_level("INFO", "finetune")
    assert run_jobs.run([job], stage="train") == ["trained"]
    assert f"resuming at step {last}" in caplog.text
    assert [point.step for point in run.metric("train/loss")] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("method", [(), ("lora.use_dora=true",)], ids=["plain", "dora"])
def test_the_best_adapter_survives_kill_9(
    tmp_path: Path, finetune: Command, method: tuple[str, ...]
) -> None:
    """Killed behind the best step, where the newest checkpoint is a later one."""
    early = (
        *method, "training.epochs=20", "training.keep_checkpoints=1", "optimizer.lr=0.3",
        "data.validation_fraction=0.5", "training.validate_every=1", "training.early_stopping=10",
    )  # fmt: skip
    whole = tmp_path / "whole"
    whole.mkdir()
    done = finetune(*TRAINING, *early, f"output_dir={whole}/outputs", f"report_dir={whole}")
    assert done.returncode == 0, done.stderr
    (run,) = whole.glob("outputs/*")
    trained = json.loads((run / "training.json").read_text())
    assert f"stopped early at step {trained['steps']} of" in done.stderr
    best = trained["best_step"]
    assert interrupted_at(tmp_path, best + 2, signal.SIGKILL, *early) == -signal.SIGKILL
    (run,) = tmp_path.glob("outputs/*")
    assert find_problem(find_step(run / "checkpoints", best)) is None
    again = finetune(*TRAINING, *early)
    assert again.returncode == 0, again.stderr
    assert f"the adapter of step {best} is kept" in again.stderr
    assert adapters(tmp_path) == adapters(whole)
    assert losses(tmp_path) == losses(whole)


PLAIN = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt",
    "state.json", MANIFEST, MARKER,
)  # fmt: skip
# DoRA is trained by the Trainer, whose checkpoints hold its random state besides.
DORA = (
    "trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    MANIFEST, MARKER,
)  # fmt: skip
HARMED = [(method, file) for method, files in (("plain", PLAIN), ("dora", DORA)) for file in files]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return by method a folder with an uninterrupted run, `whole`, and one killed at step 5."""
    folders = {}
    for method, settings in (("plain", ()), ("dora", ("lora.use_dora=true",))):
        folder = folders[method] = tmp_path_factory.mktemp(method)
        whole = [f"output_dir={folder}/whole/outputs", f"report_dir={folder}/whole"]
        settings = (*settings, "training.epochs=3")  # steps enough for a busy machine to be met in
        typed = last_of_each((*TRAINING, *settings, *whole))
        command = [sys.executable, "-m", "finetune", *typed]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        assert interrupted_at(folder, 5, signal.SIGKILL, *settings) == -signal.SIGKILL
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(("method", "file"), HARMED)
@pytest.mark.parametrize("harm", ["missing", "truncated", "empty", "flipped"])
def test_a_harmed_checkpoint_costs_steps_but_no_bit(
    tmp_path: Path,
    killed: dict[str, Path],
    method: str,
    file: str,
    harm: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each file of a real checkpoint, each way to be harmed: the result is the same."""
    shutil.copytree(killed[method] / "outputs", tmp_path / "outputs")
    (run,) = tmp_path.glob("outputs/*")
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    harmed = checkpoints[-1] / file
    content = harmed.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    changed = {"truncated": content[:middle], "empty": b"", "flipped": flipped}
    harmed.unlink() if harm == "missing" else harmed.write_bytes(changed[harm])
    composed = OmegaConf.load(run / "config.yaml")
    assert isinstance(composed, DictConfig)
    composed.output_dir = str(tmp_path / "outputs")
    job = Job(build_config(composed), OmegaConf.to_yaml(composed), [], {})
    with caplog.at_level("INFO", logger="finetune"):
        assert run_jobs.run([job]) == ["finished"]
    assert "skipping the damaged checkpoint" in caplog.text
    assert adapters(tmp_path) == adapters(killed[method] / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_killed_at_twenty_moments_comes_out_the_same(
    tmp_path: Path, finetune: Command
) -> None:
    """Kill -9 of the sweep, or of its worker, at seeded moments; the same command finishes.

    Most moments are in the middle of training, some anywhere. A sweep that ends between two kills
    is compared and begun anew, so that all twenty hit one.
    """

    def num_steps() -> int:
        logs = tmp_path.glob("outputs/*/events.jsonl")
        return sum(log.read_text().count("train/loss") for log in logs)

    def num_resumed() -> int:
        logs = tmp_path.glob("outputs/*/finetune.log")
        return sum(log.read_text().count("resuming at step") for log in logs)

    grid = ("--multirun", *TRAINING, "lora.r=2,4")
    whole = tmp_path / "whole"
    undisturbed = finetune(*grid, f"output_dir={whole}/outputs", "report_dir=whole/reports")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert len(adapters(whole)) == 2
    draw = random.Random(20240603)
    kills = resumed = 0
    while kills < 20:
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", *grid], cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        if draw.random() < 0.25:
            time.sleep(draw.uniform(4, 14))
        else:
            until = num_steps() + draw.randint(1, 10)
            while process.poll() is None and num_steps() < until:
                time.sleep(0.01)
        worker = next(iter(children(process.pid)), None)
        victim = worker if worker and draw.random() < 0.5 else process.pid
        if process.poll() is None:
            os.kill(victim, signal.SIGKILL)
            kills += 1
        if process.wait(timeout=300) == 0:
            assert adapters(tmp_path) == adapters(whole)
            resumed += num_resumed()
            shutil.rmtree(tmp_path / "outputs")
    done = finetune(*grid)
    assert done.returncode == 0, done.stderr
    assert adapters(tmp_path) == adapters(whole)
    assert resumed + num_resumed() >= 5


def children(pid: int) -> list[int]:
    """Return the spawned workers of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(") ", 1)[1].split()
            command = (path.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and "spawn_main" in command:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_a_full_disk_is_said_and_nothing_partial_counts(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: the run fails with path and bytes."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    cache = {**os.environ, "HF_HUB_OFFLINE": "1"}
    plan = [sys.executable, "-m", "finetune", *TRAINING, "sweep.dry_run=true"]
    # The tiny model is made without the limit.
    subprocess.run(plan, cwd=tmp_path, env=cache, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *TRAINING, "lora.r=32"], cwd=tmp_path, env=cache,
        capture_output=True, text=True, preexec_fn=limited, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot write the checkpoint" in done.stderr
    assert "bytes" in done.stderr
    (run,) = tmp_path.glob("outputs/*")
    assert newest_step(run / "checkpoints") is None
    assert not (run / "adapter").exists()
    shutil.rmtree(tmp_path / "multirun_reports")
    again = subprocess.run(
        [sys.executable, "-m", "finetune", *TRAINING, "lora.r=32"], cwd=tmp_path, env=cache,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
