"""Reruns verify themselves: identical, within tolerance, or different with the first difference."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors.numpy import save_file

from finetune import rerun
from finetune.config.schema import Config
from finetune.problems import Refused
from finetune.reporting.reproduction import compare_runs, find_other_conditions
from finetune.rerun import build_job, refuse_foreign, report
from finetune.tracking.events import EventLog
from finetune.tracking.run_files import SECTIONS
from finetune.tracking.run_folder import RunFolder
from tests.conftest import TINY, Command


@pytest.mark.slow
def test_a_rerun_is_identical_and_says_what_else_changed(tmp_path: Path, finetune: Command) -> None:
    """The same bits in a new folder; a version that differs is named, a changed run is told."""
    assert finetune(*TINY, "lora.r=2", "lora.alpha=4").returncode == 0
    (run,) = tmp_path.glob("outputs/*")
    done = finetune(str(run), module="finetune.rerun")
    assert done.returncode == 0, done.stderr
    assert "\nidentical\n" in done.stdout
    assert "not the same" not in done.stdout
    (again,) = tmp_path.glob("reruns/*/*/adapter")
    assert again.parent.name == run.name

    environment = json.loads((run / "environment.json").read_text())
    environment["versions"]["trl"] = "1.0.0"
    RunFolder(run).write_json("environment.json", environment)
    other = list(find_other_conditions(RunFolder(run), RunFolder(again.parent)))
    assert other == [f"trl was 1.0.0, is {_version('trl')}"]

    events = (run / "events.jsonl").read_text()
    told = [json.loads(line) for line in events.splitlines()]
    step = next(e for e in told if e.get("key") == "train/loss" and e["step"] == 3)
    for shift, verdict in ((1e-5, "within tolerance"), (0.5, "different")):
        changed = {**step, "value": step["value"] + shift}
        (run / "events.jsonl").write_text(events.replace(json.dumps(step), json.dumps(changed)))
        found = compare_runs(RunFolder(run), RunFolder(again.parent))
        assert found.verdict == verdict
        assert "the loss of step 3 was" in found.describe()


@pytest.mark.slow
def test_other_answers_are_different(tmp_path: Path, finetune: Command) -> None:
    """Equal losses do not hide another outcome."""
    assert finetune(*TINY).returncode == 0
    (run,) = tmp_path.glob("outputs/*")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert compare_runs(RunFolder(run), RunFolder(copy)).verdict == "identical"
    items = copy / "evaluation" / "demo_science.items.jsonl"
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    for line in lines[:3]:
        line["tuned"]["acc"] = 1 - line["tuned"]["acc"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    RunFolder(copy).write_text(f"evaluation/{items.name}", text)
    found = compare_runs(RunFolder(run), RunFolder(copy))
    assert found.verdict == "different"
    assert re.search(r"; 3 of \d+ answers changed \(", found.describe())


def test_answers_count_without_a_base_beside_them(tmp_path: Path) -> None:
    """Such as of training=none; where there is nothing to compare, nothing is called identical."""
    runs = [RunFolder(tmp_path / name) for name in ("one", "other")]
    assert compare_runs(*runs).verdict == "different"
    for run, right in zip(runs, (1, 0), strict=True):
        run.write_json("evaluation/task.json", {"tuned": {"metrics": {"acc": right}}})
        item = {"hash": "h", "prompt": "p", "tuned": {"acc": right}}
        (run.evaluation / "task.items.jsonl").write_text(json.dumps(item) + "\n")
    found = compare_runs(*runs)
    assert (found.verdict, found.changed, found.answers) == ("different", 1, 1)
    assert compare_runs(runs[0], runs[0]).verdict == "identical"


def write_weights(run: RunFolder, shift: float, threads: int = 1) -> RunFolder:
    """Write what a run without tasks leaves, its weights moved by a share of their norm."""
    weights = np.linspace(-1, 1, 200, dtype="float32").reshape(10, 20)
    run.adapter.mkdir(parents=True)
    file = run.adapter / "adapter_model.safetensors"
    save_file({"first": weights, "second": weights * (1 + shift)}, file)
    run.write_json("environment.json", {"versions": {}, "threads": threads})
    run.write_json("config.yaml", {name: {} for name in SECTIONS})
    events = EventLog(run.events)
    events.metrics({"train/loss": 2.5}, 1)
    events.close()
    return run


@pytest.mark.parametrize(
    ("shift", "verdict", "told"),
    [
        (0.0, "identical", "weight tensor 0.0e+00 (tolerance 0.05) of its norm"),
        (1e-5, "within tolerance", "weight tensor 1.0e-05 (tolerance 0.05) of its norm, second"),
        (0.5, "different", "weight tensor 5.0e-01 (tolerance 0.05) of its norm, second"),
        (100.0, "different", "weight tensor 1.0e+02 (tolerance 0.05) of its norm, second"),
        (float("nan"), "different", "weight tensor inf (tolerance 0.05) of its norm, second"),
    ],
)
def test_weights_are_held_to_a_tolerance_in_numbers(
    tmp_path: Path, shift: float, verdict: str, told: str
) -> None:
    """Equal losses do not let other weights pass, and the verdict says how far apart they are."""
    before = write_weights(RunFolder(tmp_path / "before"), 0.0)
    found = compare_runs(before, write_weights(RunFolder(tmp_path / "after"), shift))
    assert found.verdict == verdict
    assert told in found.describe()


def test_a_tensor_that_is_not_there_is_different(tmp_path: Path) -> None:
    """Other names, another file, a file that is none: never a tolerance."""
    before, after = (write_weights(RunFolder(tmp_path / name), 0.0) for name in "ab")
    file = after.adapter / "adapter_model.safetensors"
    save_file({"first": np.ones(3, "float32")}, file)
    assert "names or shapes differ" in compare_runs(before, after).describe()
    file.write_bytes(b"noise")
    assert compare_runs(before, after).verdict == "different"
    file.unlink()
    assert "1 files became 0" in compare_runs(before, after).describe()


def test_another_number_of_threads_promises_the_tolerance_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order of sums changes bits; what came of it is said beside the verdict."""
    before = write_weights(RunFolder(tmp_path / "before"), 0.0, threads=2)
    write_weights(RunFolder(tmp_path / "into" / "after"), 1e-6)
    assert report(before, tmp_path / "into") == 0
    out = capsys.readouterr().out
    assert "threads was 2, is 1: sums are in another order, so results agree within" in out
    assert "\nwithin tolerance\n" in out


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({"host": "a", "worker": "GPU 0"}, {"host": "b", "worker": None}, []),
        ({"dtype": "bf16"}, {"dtype": "fp16"}, ["dtype was bf16, is fp16"]),
        ({}, {"dtype": "fp16", "host": "b"}, []),  # of an older release
    ],
)
def test_a_rerun_may_run_elsewhere_but_not_in_another_dtype(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], named: list[str]
) -> None:
    """Host and worker change no number."""
    runs = [write_weights(RunFolder(tmp_path / name), 0.0) for name in ("before", "after")]
    for run, environment in zip(runs, (before, after), strict=True):
        run.write_json("environment.json", {"versions": {}, "threads": 1, **environment})
    assert list(find_other_conditions(*runs)) == named


def test_other_questions_are_named(tmp_path: Path) -> None:
    """A file of questions, or a task file, may have changed between a run and its rerun."""
    runs = [write_weights(RunFolder(tmp_path / name), 0.0) for name in ("before", "after")]
    for run, digest in zip(runs, ("a", "b"), strict=True):
        side = {"metrics": {"acc": 1.0}, "setup": {"digest": digest}}
        run.write_json("evaluation/mine.json", {"tuned": side})
    assert list(find_other_conditions(*runs)) == [
        "mine: the questions, their prompts or the task's definition"
    ]
    assert list(find_other_conditions(runs[0], runs[0])) == []


def test_what_the_run_itself_has_lost_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its damaged files are told, and their part is never called the same."""
    before = write_weights(RunFolder(tmp_path / "before"), 0.0)
    before.record("adapter")
    write_weights(RunFolder(tmp_path / "into" / "after"), 0.0)
    file = before.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\xff\xff\xff\xff")
    assert report(before, tmp_path / "into") == 1
    assert f"damaged: {file}: it was altered since it was written" in capsys.readouterr().out


def test_a_rerun_is_made_of_the_runs_own_settings(tmp_path: Path) -> None:
    """Groups of a `--config-dir` that is gone are in them; code of a model is asked for."""
    run = RunFolder(tmp_path / "run")
    config = Config()
    config.lora.r = 5
    run.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    run.write_text("overrides.yaml", "- lora=of_a_folder_that_is_gone\n")
    refuse_foreign(run, [])
    job = build_job(run, tmp_path / "into")
    assert (job.config.lora.r, job.config.tracking.enabled) == (5, False)
    assert job.config.output_dir == str(tmp_path / "into")
    config.model.trust_remote_code = True
    run.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    with pytest.raises(Refused, match=r"type it again: .* model\.trust_remote_code=True"):
        refuse_foreign(run, [])
    run.write_text("overrides.yaml", "- model.trust_remote_code=true\n")
    refuse_foreign(run, ["model.trust_remote_code=true"])


def test_a_rerun_asks_for_code_of_tasks_again(tmp_path: Path) -> None:
    """The folder of task files is the run's; what would run has to be typed."""
    run = RunFolder(tmp_path / "run")
    config = Config()
    config.evaluation.include_path, config.evaluation.trust_task_code = "mine", True
    run.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    typed = "evaluation.trust_task_code=true"
    run.write_text("overrides.yaml", f"- evaluation.include_path=mine\n- {typed}\n")
    with pytest.raises(Refused, match=r"runs Python code that comes with task files; .* type it"):
        refuse_foreign(run, [])
    refuse_foreign(run, [typed])
    assert build_job(run, tmp_path / "into").config.evaluation.include_path == "mine"


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path, finetune: Command) -> None:
    """One line and exit code 2."""
    done = finetune(str(tmp_path), module="finetune.rerun")
    assert done.returncode == 2
    assert "is not a run's folder" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b"]])
def test_runs_without_any_run_says_so(finetune: Command, arguments: list[str]) -> None:
    """Nothing to list or to compare is one line and exit code 2."""
    done = finetune(*arguments, module="finetune.runs")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr


@pytest.mark.slow
def test_runs_are_listed_and_compared(tmp_path: Path, finetune: Command) -> None:
    """State, settings and scores of each; two of them question by question."""
    finetune(*TINY, "lora.r=2,4", "--multirun")
    listed = finetune(module="finetune.runs")
    assert listed.stdout.count("finished") == 2
    assert "lora.r=4" in listed.stdout
    assert "demo_science" in listed.stdout
    one, other = sorted(tmp_path.glob("outputs/*"))
    compared = finetune(str(one), str(other), module="finetune.runs")
    assert compared.returncode == 0, compared.stderr
    assert "acc_norm" in compared.stdout


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


@pytest.mark.parametrize("code", [1, 2, 75, 130])
def test_a_rerun_that_was_stopped_has_the_exit_code_of_its_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The sweep runs in the same process, so a stop by the machine ends in 75 here too."""
    run = RunFolder(tmp_path / "run")
    run.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(Config())))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rerun, "run_sweep", lambda jobs, arguments, resumes: code)
    monkeypatch.setattr(sys, "argv", ["rerun", str(run.path)])
    with pytest.raises(SystemExit) as end:
        rerun.main()
    assert end.value.code == code


def test_a_rerun_that_the_machine_stops_exits_with_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM at the rerun reaches its sweep, which is the same process."""
    run = RunFolder(tmp_path / "run")
    run.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(Config())))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rerun, "run_sweep", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["rerun", str(run.path)])
    with pytest.raises(SystemExit) as end:
        rerun.main()
    assert end.value.code == 75


def test_a_rerun_that_was_stopped_says_what_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command would begin another one, in a new folder."""
    run = RunFolder(tmp_path / "a run")
    run.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(Config())))
    monkeypatch.chdir(tmp_path)
    said: list[str] = []

    def stop(jobs: object, arguments: object, resumes: str) -> int:
        said.append(resumes)
        return 130

    monkeypatch.setattr(rerun, "run_sweep", stop)
    monkeypatch.setattr(sys, "argv", ["rerun", str(run.path)])
    with pytest.raises(SystemExit):
        rerun.main()
    (folder,) = (tmp_path / "reruns").iterdir()
    again = f"python -m finetune.rerun '{run.path}' --into '{folder.relative_to(tmp_path)}'"
    assert said == [f"{again} resumes it"]
