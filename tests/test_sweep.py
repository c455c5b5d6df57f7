"""The command as a user calls it: runs, sweeps, refusals and failures, on the tiny model."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import pipeline
from finetune.config import Config, DataConfig, ModelConfig
from finetune.runs import Job, Status
from finetune.worker import Worker, WorkerDied
from tests.conftest import TINY, Command


def results(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("multirun_reports/*/results.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def status(row: dict[str, str], folder: Path) -> Status:
    text = (folder / "outputs" / row["run"] / "status.json").read_text(encoding="utf-8")
    return Status(**json.loads(text))


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
    assert again.stderr.count("is finished already") == 2
    assert results(tmp_path) == rows


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


def test_a_single_run_is_a_sweep_of_one(tmp_path: Path, finetune: Command) -> None:
    """It writes the same results and events, and follows no secret into a file."""
    done = finetune(*TINY, "evaluation=none", "sweep.name=../one")
    assert done.returncode == 0, done.stderr
    (row,) = results(tmp_path)
    assert row["status"] == "finished"
    assert (tmp_path / "multirun_reports" / "one" / "results.csv").is_file()


def test_an_mlflow_store_compares_the_runs(tmp_path: Path, finetune: Command) -> None:
    """The default store holds a parent and its child with params, curve and artifacts."""
    import mlflow

    done = finetune(*[a for a in TINY if a != "tracking=none"], "evaluation=none")
    assert done.returncode == 0, done.stderr
    assert "mlflow ui --backend-store-uri sqlite:///" in done.stdout
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (row,) = results(tmp_path)
    child = client.get_run(row["mlflow_run_id"])
    assert child.info.status == "FINISHED"
    assert child.data.params["lora.r"] == "16"
    assert client.get_metric_history(child.info.run_id, "train/loss")
    names = {artifact.path for artifact in client.list_artifacts(child.info.run_id)}
    assert {"adapter", "config"} <= names


EARLY = {
    "option": (["model=nope"], "there is no such option"),
    "type": (["lora.r=abc"], "could not be converted to Integer"),
    "rank 0": (["lora.r=0"], "lora.r is 0; it must be at least 1"),
    "data unset": (["data=local"], "data.path"),
    "folder": (["output_dir=file/outputs"], "output_dir=file/outputs cannot be written"),
    "grid": (["lora.r=4,0", "--multirun"], "lora.r is 0"),
}


@pytest.mark.parametrize("name", EARLY)
def test_bad_settings_are_refused_at_once(name: str, tmp_path: Path, finetune: Command) -> None:
    """Exit code 2, one problem in one line, and nothing written."""
    arguments, message = EARLY[name]
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = finetune(*[a for a in TINY if not a.startswith(arguments[0][:6])], *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "1 problem, nothing was started" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["file"]


def test_all_that_checking_finds_is_told_together(tmp_path: Path, finetune: Command) -> None:
    """Model, data, task and optimizer problems of a grid come in one message, exit code 2."""
    done = finetune(
        *TINY[:-1], "training.max_length=4096", "lora.target_modules=[q_prj]", "data=local",
        "data.path=none.jsonl", "evaluation.tasks=[arc_eazy]", "optimizer.name=adamm,adamw_torch",
        "--multirun",
    )  # fmt: skip
    assert done.returncode == 2
    assert "5 problems, nothing was started" in done.stderr
    for message in (
        "made for at most 1024 tokens", "did you mean 'q_proj'?", "none.jsonl: there is no file",
        "did you mean 'arc_easy'?", "optimizer.name is 'adamm'",
    ):  # fmt: skip
        assert message in done.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


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
    plan = pipeline.prepare(config)
    assert plan.folder is None
    (problem,) = plan.problems
    assert message in problem
    assert not (tmp_path / "outputs").exists()


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


def test_the_base_is_scored_once_and_by_the_fast_path(
    finetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run of a sweep, and a later sweep elsewhere, spend no time on the base."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    finetune(*TINY, "lora.r=2,4", "--multirun")
    logs = [log.read_text() for log in sorted(tmp_path.glob("outputs/*/finetune.log"))]
    assert sorted(log.count("base: demo_science: 12 questions") for log in logs) == [0, 1]
    assert all("tuned: demo_science: 12 questions" in log for log in logs)
    finetune(*TINY, "lora.r=8", "output_dir=elsewhere")
    (log,) = tmp_path.glob("elsewhere/*/finetune.log")
    assert "base:" not in log.read_text()
    for path in tmp_path.glob("*/*/evaluation/demo_science.json"):
        scores = json.loads(path.read_text())
        for side in ("base", "tuned"):
            assert scores[side]["scoring"]["path"] == "shared"
            assert scores[side]["scoring"]["reason"] is None
            assert scores[side]["scoring"]["differences"]["float32"] < 1e-4
            assert scores[side]["scoring"]["forwarded_tokens"] > 0


def test_a_lower_dtype_is_said_with_the_answers_it_flips(finetune: Command, tmp_path: Path) -> None:
    """evaluation.dtype=bf16 scores anew and counts what changed against the model's own dtype."""
    done = finetune(*TINY, "evaluation.dtype=bf16")
    assert done.returncode == 0
    assert "another dtype flipped" in done.stderr
    (path,) = tmp_path.glob("outputs/*/evaluation/demo_science.json")
    assert json.loads(path.read_text())["tuned"]["scoring"]["sampled"] == 12
    (run,) = tmp_path.glob("outputs/*")
    done = finetune(*TINY)
    assert done.returncode == 0
    assert [path.name for path in tmp_path.glob("outputs/*")] == [run.name]  # trained once
    assert json.loads(path.read_text())["tuned"]["scoring"]["sampled"] == 0
