"""The command as a user calls it: runs, sweeps, refusals and failures, on the tiny model."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
from omegaconf import OmegaConf

from finetune.config.schema import Config, DataConfig, ModelConfig, WorkersConfig
from finetune.models.base_model import load_base
from finetune.pipeline import preflight, run_jobs
from finetune.pipeline.identity import find_inputs
from finetune.pipeline.jobs import Job
from finetune.pipeline.session import Session
from finetune.reporting.results import Results
from finetune.sweeps import launchers, run_sweep
from finetune.sweeps.lost_runs import write_failure
from finetune.sweeps.worker import Worker
from finetune.sweeps.worker_process import WorkerDied
from finetune.tracking.run_folder import RunFolder, Status
from finetune.tracking.sweep_record import SweepRecord
from finetune.tracking.tracker import follow
from tests.conftest import TINY, Command, train_tiny


def results(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("multirun_reports/*/results.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def status(row: dict[str, str], folder: Path) -> Status:
    text = (folder / "outputs" / row["run"] / "status.json").read_text(encoding="utf-8")
    return Status(**json.loads(text))


@pytest.mark.slow
def test_a_sweep_ends_with_results_and_repeats_nothing(tmp_path: Path, finetune: Command) -> None:
    """Two ranks give two rows with all columns; the same command again finds them finished."""
    arguments = [*TINY, "lora.r=2,4", "data.validation_fraction=0.2", "--multirun"]
    first = finetune(*arguments)
    assert first.returncode == 0, first.stderr
    rows = results(tmp_path)
    assert [row["lora.r"] for row in rows] == ["2", "4"]
    for row in rows:
        assert row["status"] == "finished"
        base, tuned = float(row["demo_science/base_acc"]), float(row["demo_science/acc"])
        assert float(row["demo_science/acc_diff"]) == pytest.approx(tuned - base)
        for column in (
            "demo_science/acc_stderr", "demo_science/acc_norm", "demo_science/base_acc_norm",
            "demo_science/acc_taught", "demo_science/acc_control", "train/loss",
            "validation/loss", "train_seconds", "evaluation_seconds", "tokens_per_second",
            "peak_memory_gib", "num_trainable_parameters",
        ):  # fmt: skip
            assert float(row[column]) >= 0, column
    assert int(rows[1]["num_trainable_parameters"]) == 2 * int(rows[0]["num_trainable_parameters"])
    for row in rows:
        folder = tmp_path / "outputs" / row["run"]
        assert status(row, tmp_path).state == "finished"
        for name in (
            "config.yaml", "overrides.yaml", "environment.json", "events.jsonl", "finetune.log",
            "adapter/adapter_model.safetensors", "evaluation/demo_science.json",
            "evaluation/demo_science.items.jsonl", "data.json", "training.json",
        ):  # fmt: skip
            assert (folder / name).is_file(), name
    again = finetune(*arguments)
    assert again.returncode == 0
    assert again.stdout.count("finished already") == 2
    assert results(tmp_path) == rows


@pytest.mark.slow
def test_one_failing_job_neither_stops_the_others_nor_goes_unseen(
    tmp_path: Path, finetune: Command
) -> None:
    """A diverged run in the middle: the others finish, its reason is told, exit code 1."""
    done = finetune(
        *TINY, "optimizer.lr=1e-3,1e18,1e-4", "optimizer.warmup_ratio=0", "training.epochs=4",
        "evaluation=none", "--multirun",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    rows = results(tmp_path)
    assert [row["status"] for row in rows] == ["finished", "diverged", "finished"]
    assert "at step" in rows[1]["reason"]
    assert rows[1]["reason"] in done.stderr


@pytest.mark.slow
def test_a_single_run_is_a_sweep_of_one(tmp_path: Path, finetune: Command) -> None:
    """It writes the same results and events, and follows no secret into a file."""
    done = finetune(*TINY, "evaluation=none", "sweep.name=../one")
    assert done.returncode == 0, done.stderr
    (row,) = results(tmp_path)
    assert row["status"] == "finished"
    (report,) = (tmp_path / "multirun_reports").iterdir()  # a digest for what the name lost
    assert re.fullmatch(r"one-[0-9a-f]+", report.name)
    assert (report / "results.csv").is_file()


@pytest.mark.slow
def test_an_mlflow_store_compares_the_runs(tmp_path: Path, finetune: Command) -> None:
    """The default store holds a parent and its child with params, curve and artifacts."""
    import mlflow

    done = finetune(*[a for a in TINY if a != "tracking=none"])
    assert done.returncode == 0, done.stderr
    assert "compare: python -m finetune.ui multirun_reports/" in done.stdout
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (row,) = results(tmp_path)
    child = client.get_run(row["mlflow_run_id"])
    assert child.info.status == "FINISHED"
    assert child.data.params["lora.r"] == "16"
    assert client.get_metric_history(child.info.run_id, "train/loss")
    names = {artifact.path for artifact in client.list_artifacts(child.info.run_id)}
    assert {"adapter", "config"} <= names
    (model,) = client.search_registered_models()
    champion = client.get_model_version_by_alias(model.name, "champion")
    assert champion.run_id == row["mlflow_run_id"]
    tags = client.get_experiment(child.info.experiment_id).tags
    assert any(tag.startswith("mlflow.sharedViewState.finetune-") for tag in tags)
    parent = client.get_run(child.data.tags["mlflow.parentRunId"])
    assert parent.data.metrics["num_finished"] == 1
    assert "report" in {one.path for one in client.list_artifacts(parent.info.run_id)}
    assert child.inputs is not None
    contexts = [tag.value for one in child.inputs.dataset_inputs for tag in one.tags]
    assert sorted(contexts) == ["evaluation", "training"]
    assert any(key.startswith("system/") for key in child.data.metrics)


EARLY = {
    "option": (["model=nope"], "there is no such option"),
    "type": (["lora.r=abc"], "could not be converted to Integer"),
    "rank 0": (["lora.r=0"], "lora.r is 0; it must be at least 1"),
    "data unset": (["data=local"], "data.path"),
    "folder": (["output_dir=file/outputs"], "output_dir=file/outputs cannot be written"),
    "grid": (["lora.r=4,0", "--multirun"], "lora.r is 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EARLY)
def test_bad_settings_are_refused_at_once(name: str, tmp_path: Path, finetune: Command) -> None:
    """Exit code 2, one problem in one line, and nothing written."""
    arguments, message = EARLY[name]
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = finetune(*[a for a in TINY if not a.startswith(arguments[0][:6])], *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "1 problem, nothing was started" in done.stderr
    assert "Error executing job" not in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["file"]


@pytest.mark.slow
def test_all_that_checking_finds_is_told_together(tmp_path: Path, finetune: Command) -> None:
    """Ranges, model, data, task and optimizer of a grid: one message, exit code 2."""
    done = finetune(
        *TINY[:-1], "training.max_length=4096", "lora.target_modules=[q_prj]", "data=local",
        "data.path=none.jsonl", "evaluation.tasks=[arc_eazy]", "optimizer.name=adamm,adamw_torch",
        "sweep.job_timeout=0", "--multirun",
    )  # fmt: skip
    assert done.returncode == 2
    assert "6 problems, nothing was started" in done.stderr
    for message in (
        "sweep.job_timeout is 0",
        "made for at most 1024 tokens", "did you mean 'q_proj'?", "none.jsonl: there is no file",
        "did you mean 'arc_easy'?", "optimizer.name is 'adamm'",
    ):  # fmt: skip
        assert message in done.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.slow
def test_one_run_has_one_evaluation(finetune: Command) -> None:
    """A grid over the evaluation alone would score one point and drop the others."""
    done = finetune(*TINY, "evaluation.num_fewshot=0,1", "--multirun")
    assert done.returncode == 2
    assert "evaluation.num_fewshot differs between jobs that train the same run" in done.stderr


def test_a_report_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pictures that fail are said; a table that fails is known to the exit code too."""

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    of = cast(Any, SimpleNamespace(folder=tmp_path))
    results = Results(tmp_path, SweepRecord("a", [], [], [], []), [], [])
    monkeypatch.setattr(run_sweep, "write_report", full)
    monkeypatch.setattr(run_sweep, "read_results", lambda _: results)
    assert run_sweep._write_report(of) == (results, True)
    assert (tmp_path / "results.csv").is_file()
    monkeypatch.setattr(run_sweep, "write_csv", full)
    assert run_sweep._write_report(of) == (results, False)
    assert "results.csv cannot be written: [Errno 28]" in caplog.text


def test_a_mirror_that_cannot_be_kept_stops_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's bookkeeping lies in report_dir, which may fill up."""

    def fail(_: RunFolder) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    follow(cast(Any, SimpleNamespace(follow=fail)), RunFolder(tmp_path))
    assert "No space left on device" in caplog.text


def test_a_run_that_another_process_ended_stays_as_it_is(tmp_path: Path) -> None:
    """Whoever lost its own process on the run finds out when it gets the run's claim."""
    run, before = RunFolder(tmp_path), Status("interrupted", "stopped by SIGTERM", 1.0, 2.0)
    run.write_status(Status("finished", None, 3.0, 4.0))
    assert write_failure(run, "its worker died", before) == "finished"
    assert write_failure(run, "its worker died", run.status()) == "failed"
    assert run.status() is not None
    assert run.read_json("status.json")["reason"] == "its worker died"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "a", "output": "b"}\n{"instr', "line 2, column"),
        ("", "holds no rows"),
        ('{"question": "a", "output": "b"}\n', "no column 'instruction'"),
        ('{"instruction": "a", "output": ""}\n', "output is empty; first: row 1"),
    ],
)
def test_bad_data_is_refused_before_the_start(tmp_path: Path, text: str, message: str) -> None:
    """Checking a job reads its data, and names the place."""
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    config = Config(model=ModelConfig(path="random://tiny"), data=DataConfig(path=str(path)))
    config.output_dir = str(tmp_path / "outputs")
    plan = preflight.prepare(config)
    assert plan.inputs is None
    (problem,) = plan.problems
    assert message in problem
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_the_reference_experiment_is_refused_here_with_what_is_missing(finetune: Command) -> None:
    """Without a GPU and the model, both are named at once."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = finetune("experiment=mistral_alpaca_arc")
    assert done.returncode == 2
    assert "training.device is cuda, and this machine has no CUDA device" in done.stderr
    assert "mistralai/Mistral-7B-v0.1 is not on this machine" in done.stderr


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_and_replaced(tmp_path: Path) -> None:
    """The pipe's end is a reason, not a hang, and the next request gets a fresh process."""
    config = Config(model=ModelConfig(path="random://tiny"), output_dir=str(tmp_path))
    config.data.path = "package://finetune/demo/rows.jsonl"
    job = Job(config, "", [], {})
    with Worker() as worker:
        plan = worker.prepare(job)
        assert worker._process is not None
        assert worker._process.pid is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="killed by SIGKILL"):
            worker.prepare(job)
        assert worker.prepare(job) == plan


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_worker_behind(tmp_path: Path) -> None:
    """Kill -9 of the sweep in the middle of a job ends its worker too."""
    sweep = subprocess.Popen(
        [sys.executable, "-m", "finetune", "tracking=none", "evaluation=none"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert sweep.stderr is not None
    for line in sweep.stderr:
        if "rows read" in line:
            break
    sweep.kill()
    # The worker holds the same pipe open: it ends when the worker does.
    started = time.monotonic()
    sweep.stderr.read()
    assert time.monotonic() - started < 10
    sweep.wait()
    sweep.stderr.close()
    (status,) = tmp_path.glob("outputs/*/status.json")
    assert '"running"' in status.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_base_is_scored_once_and_by_the_fast_path(
    finetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run of a sweep, and a later sweep elsewhere, spend no time on the base."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    first = finetune(*TINY, "lora.r=2,4", "--multirun")
    assert first.stderr.count("base: demo_science: 12 questions in") == 1
    logs = [log.read_text() for log in tmp_path.glob("outputs/*/finetune.log")]
    assert all("tuned: demo_science: 12 questions" in log for log in logs)
    later = finetune(*TINY, "lora.r=8", "output_dir=elsewhere")
    assert "base: demo_science" not in later.stderr
    for path in tmp_path.glob("*/*/evaluation/demo_science.json"):
        scores = json.loads(path.read_text())
        for side in ("base", "tuned"):
            assert scores[side]["scoring"]["path"] == "shared"
            assert scores[side]["scoring"]["reason"] is None
            assert scores[side]["scoring"]["differences"]["float32"] < 1e-4
            assert scores[side]["scoring"]["forwarded_tokens"] > 0
        compared = [scores[side]["scoring"]["compared"] for side in ("base", "tuned")]
        assert compared[0] > compared[1] > 0


@pytest.mark.slow
def test_a_lower_dtype_is_said_with_the_answers_it_flips(finetune: Command, tmp_path: Path) -> None:
    """evaluation.dtype=bf16 scores anew and counts what changed against the model's own dtype."""
    done = finetune(*TINY, "evaluation.dtype=bf16")
    assert done.returncode == 0
    assert "evaluation.dtype flipped" in done.stderr
    (path,) = tmp_path.glob("outputs/*/evaluation/demo_science.json")
    assert json.loads(path.read_text())["tuned"]["scoring"]["sampled"] == 12
    (run,) = tmp_path.glob("outputs/*")
    done = finetune(*TINY)
    assert done.returncode == 0
    assert [path.name for path in tmp_path.glob("outputs/*")] == [run.name]  # trained once
    assert json.loads(path.read_text())["tuned"]["scoring"]["sampled"] == 0


# Put into the worker by PYTHONPATH: what a rank stands for happens in the middle of training.
TROUBLE = """
import builtins, os, signal, sys, time
load = builtins.__import__

def patched(name, *args, **kwargs):
    module = load(name, *args, **kwargs)
    training = sys.modules.get("finetune.training.adapter_training")
    if training is not None and hasattr(training, "AdapterTraining"):
        builtins.__import__ = load
        learn = training.AdapterTraining.learn
        def trouble(self, loss):
            import torch
            learn(self, loss)
            rank = self.spec.lora.r
            if self.step == 2:
                if rank == 3: raise RuntimeError("the test says so")
                if rank == 5: os.kill(os.getpid(), signal.SIGKILL)
                if rank == 6: time.sleep(600)
                if rank == 7: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
                if rank == 8:
                    for parameter in self.parameters: parameter.data.fill_(float("inf"))
        training.AdapterTraining.learn = trouble
    return module

builtins.__import__ = patched
"""
REASONS = {
    "2": ("finished", ""),
    "3": ("failed", "RuntimeError: the test says so"),
    "4": ("finished", ""),
    "5": ("failed", "killed by SIGKILL"),
    "6": ("failed", "longer than 60 s (sweep.job_timeout)"),
    "7": ("failed", "out of memory; a smaller training.batch_size"),
    "8": ("diverged", "became"),
    "9": ("finished", ""),
}
GRID = (
    *TINY, f"lora.r={','.join(REASONS)}", "evaluation=none", "sweep.job_timeout=60",
    "training.batch_size=2", "training.epochs=1", "--multirun",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_kind_of_trouble_stays_with_its_run(
    tmp_path: Path, finetune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failure has its state, its reason and its log; the others finish; exit code 1."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(TROUBLE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    done = finetune(*GRID)
    assert done.returncode == 1, done.stderr
    found = {row["lora.r"]: (row["status"], row["reason"]) for row in results(tmp_path)}
    for rank, (state, reason) in REASONS.items():
        assert found[rank][0] == state, found[rank]
        assert reason in found[rank][1]
    (status,) = list(tmp_path.glob("outputs/*-r5-*/status.json"))
    assert json.loads(status.read_text())["last_lines"]
    (page,) = tmp_path.glob("multirun_reports/*/report.md")
    assert "killed by SIGKILL" in page.read_text()

    # Without the trouble: left or tried again, as asked; what diverged stays, and stops nothing.
    monkeypatch.delenv("PYTHONPATH")
    done = finetune("sweep.retry_failed=false", "sweep.dry_run=true", *GRID)
    assert done.returncode == 0
    assert done.stdout.count("failed, not retried") == 4
    assert done.stdout.count("finished already") == 3
    assert "diverged, not retried" in done.stdout
    done = finetune("sweep.fail_fast=true", *GRID)
    assert done.returncode == 1  # for the diverged one
    states = {row["lora.r"]: row["status"] for row in results(tmp_path)}
    assert states == {rank: "diverged" if rank == "8" else "finished" for rank in REASONS}


@pytest.mark.slow
def test_a_dry_run_shows_the_plan_and_starts_nothing(tmp_path: Path, finetune: Command) -> None:
    """Repeated points are dropped and said; nothing is written; then everything is new."""
    done = finetune(*TINY, "lora.r=2,4,2", "sweep.dry_run=true", "--multirun")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" new") == 2
    assert "is in the grid twice" in done.stdout
    assert done.stdout.startswith("checking 3 runs ...\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_same_command_repeats_nothing(tmp_path: Path, finetune: Command) -> None:
    """Finished runs are skipped, also in a longer grid in another order; moved folders count."""
    grid = (*TINY, "evaluation=none", "--multirun")
    finetune("lora.r=2,4", *grid)
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/*/training.json")}
    (tmp_path / "outputs").rename(tmp_path / "moved")
    done = finetune("lora.r=8,4,2", "output_dir=moved", *grid)
    assert done.stdout.count("finished already") == 2
    now = {path: path.stat().st_mtime_ns for path in tmp_path.glob("moved/*/training.json")}
    assert len(now) == 3
    assert set(trained.values()) <= set(now.values())


@pytest.mark.slow
def test_two_sweeps_at_once_share_their_runs(tmp_path: Path, finetune: Command) -> None:
    """The second sweep waits for the runs of the first and trains none of them again."""
    grid = [*TINY, "evaluation=none", "lora.r=2,4", "--multirun"]
    first = subprocess.Popen(
        [sys.executable, "-m", "finetune", *grid], cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    second = finetune("sweep.name=second", *grid)
    same = finetune(*grid) if first.poll() is None else None
    assert first.wait(timeout=200) == 0
    assert second.returncode == 0, second.stderr
    assert same is None or same.returncode in (0, 2)
    assert len(list(tmp_path.glob("outputs/*/training.json"))) == 2
    for log in tmp_path.glob("outputs/*/events.jsonl"):
        events = [json.loads(line) for line in log.read_text().splitlines()]
        assert [e["state"] for e in events if e["event"] == "status"] == ["running", "finished"]
        steps = [event["step"] for event in events if event.get("key") == "train/loss"]
        assert steps == sorted(set(steps))


def test_a_base_serves_the_runs_that_follow_and_stays_what_it_is(tmp_path: Path) -> None:
    """The worker loads the base once; after each run its weights are the same bits."""
    import torch

    session = Session()
    config = Config(model=ModelConfig(path="random://tiny"), output_dir=str(tmp_path))
    config.data.path = "package://finetune/demo/rows.jsonl"
    config.data.num_examples, config.training.max_length = 8, 400
    bases = []
    for rank in (2, 4):
        config.lora.r = rank
        job = Job(config, OmegaConf.to_yaml(OmegaConf.structured(config)), [], {})
        assert run_jobs.run([job], session) == ["finished"]
        inputs = find_inputs(config)
        bases.append(session.base(config, inputs))
    assert bases[0] is bases[1]
    fresh = load_base(config.model, inputs.source, torch.device("cpu"))
    assert dict(bases[0].named_parameters()).keys() == dict(fresh.named_parameters()).keys()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, bases[0].state_dict()[name]), name


def test_the_environment_of_a_training_stays_recorded(tmp_path: Path) -> None:
    """Another worker may score the run, with other threads on another host."""
    run = RunFolder(train_tiny(tmp_path))
    trained = {**run.read_json("environment.json"), "worker": "GPU 7", "threads": 9}
    run.write_json("environment.json", trained)
    run.write_status(Status("running", started=1.0))
    train_tiny(tmp_path)
    assert run.read_json("environment.json") == trained
    status = run.status()
    assert status is not None
    assert (status.state, status.started) == ("finished", 1.0)


def test_a_launchers_processes_are_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting is ignored; one worker is what there is."""
    asked = replace(Config(), workers=WorkersConfig(num=2, stop_after="3h"))
    assert launchers.find_problems(asked) == []
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    problems = launchers.find_problems(asked)
    assert [problem.partition(",")[0] for problem in problems] == [
        "workers.num is 2",
        "workers.stop_after is 3h",
    ]
    assert launchers.find_problems(replace(Config(), workers=WorkersConfig(num=1))) == []
