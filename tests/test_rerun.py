"""Reruns verify themselves: identical, within tolerance, or different with the first difference."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import rerun
from finetune.rerun import compare_runs, find_other_conditions
from finetune.run_folder import RunFolder, Status
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
    (run / "environment.json").write_text(json.dumps(environment))
    other = list(find_other_conditions(RunFolder(run), RunFolder(again.parent)))
    assert other == [f"trl was 1.0.0, is {_version('trl')}"]

    events = (run / "events.jsonl").read_text()
    told = [json.loads(line) for line in events.splitlines()]
    step = next(e for e in told if e.get("key") == "train/loss" and e["step"] == 3)
    for shift, verdict in ((1e-5, "within tolerance"), (0.5, "different")):
        changed = {**step, "value": step["value"] + shift}
        (run / "events.jsonl").write_text(events.replace(json.dumps(step), json.dumps(changed)))
        found, first = compare_runs(RunFolder(run), RunFolder(again.parent))
        assert found == verdict
        assert "the loss of step 3 was" in str(first)


@pytest.mark.slow
def test_other_answers_are_different(tmp_path: Path, finetune: Command) -> None:
    """Equal losses do not hide another outcome."""
    assert finetune(*TINY).returncode == 0
    (run,) = tmp_path.glob("outputs/*")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert compare_runs(RunFolder(run), RunFolder(copy)) == ("identical", None)
    items = copy / "evaluation" / "demo_science.items.jsonl"
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    for line in lines[:3]:
        line["tuned"]["acc"] = 1 - line["tuned"]["acc"]
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    verdict, first = compare_runs(RunFolder(run), RunFolder(copy))
    assert verdict == "different"
    assert str(first).startswith("3 of ")


def test_answers_count_without_a_base_beside_them(tmp_path: Path) -> None:
    """Such as of training=none; where there is nothing to compare, nothing is called identical."""
    runs = [RunFolder(tmp_path / name) for name in ("one", "other")]
    assert compare_runs(*runs)[0] == "different"
    for run, right in zip(runs, (1, 0), strict=True):
        run.write_json("evaluation/task.json", {"tuned": {"metrics": {"acc": right}}})
        item = {"hash": "h", "prompt": "p", "tuned": {"acc": right}}
        (run.evaluation / "task.items.jsonl").write_text(json.dumps(item) + "\n")
    assert compare_runs(*runs) == ("different", "1 of 1 answers")
    assert compare_runs(runs[0], runs[0]) == ("identical", None)


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path, finetune: Command) -> None:
    """One line and exit code 2."""
    done = finetune(str(tmp_path), module="finetune.rerun")
    assert done.returncode == 2
    assert "is no run's folder" in done.stdout


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
    assert "demo_science: acc" in listed.stdout
    one, other = sorted(tmp_path.glob("outputs/*"))
    compared = finetune(str(one), str(other), module="finetune.runs")
    assert compared.returncode == 0, compared.stderr
    assert "demo_science/acc_norm" in compared.stdout


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


class StoppedProcess:
    """Stands for the sweep of a rerun, which the machine stops."""

    def __init__(self, *_: object) -> None:
        self.waited = self.terminated = 0

    def wait(self) -> int:
        self.waited += 1
        if self.waited == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return 75 if self.terminated else 0

    def terminate(self) -> None:
        self.terminated += 1


def test_a_stopped_rerun_passes_the_stop_on_and_its_code_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM at the rerun alone ends its sweep too, with a checkpoint; the exit code is 75."""
    run = RunFolder(tmp_path / "run")
    run.write_status(Status("finished"))
    (run.path / "overrides.yaml").write_text("- lora.r=4\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", StoppedProcess)
    monkeypatch.setattr(sys, "argv", ["rerun", str(run.path)])
    with pytest.raises(SystemExit) as end:
        rerun.main()
    assert end.value.code == 75
