"""Who works on a sweep: what Slurm is asked, what it has left, and what the user is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from finetune.config.schema import Config, WorkersConfig
from finetune.pipeline.jobs import Job
from finetune.problems import Refused
from finetune.sweeps import crew, elsewhere, run_sweep
from finetune.sweeps.crew import Launch
from finetune.sweeps.planning import Point, Sweep, decide
from finetune.sweeps.slurm_queue import Array, SlurmTasks, find_array
from finetune.tracking.events import State
from finetune.tracking.run_folder import RunFolder, Status
from finetune.tracking.tracker import NullTracker
from tests.test_slurm import commands as commands
from tests.test_slurm import stand_in

LAUNCH = Launch(cast(Any, None), ["lora.r=2", "--multirun"])
COUNTED = 'echo x >>"${0%/*}/../asked"; '


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Return a sweep of two runs for Slurm, whose array 12 is recorded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(elsewhere, "LOST_SECONDS", 0.0)
    monkeypatch.setattr(elsewhere, "POLL_SECONDS", 0.0)
    config = replace(Config(), report_dir="reports", workers=WorkersConfig(launch="slurm", num=2))
    folders = [tmp_path / "outputs" / name for name in ("a", "b")]
    points = [Point(Job(config, "", [], {}), RunFolder(folder), "train") for folder in folders]
    found = Sweep("grid", points, [])
    found.folder.mkdir(parents=True)
    (found.folder / "slurm.json").write_text(json.dumps({"job": "12", "workers": 2}))
    return found


def test_an_array_in_the_queue_is_asked_for_once(sweep: Sweep, commands: Path) -> None:
    """The command that follows it knows it from there on."""
    stand_in(commands, "squeue", COUNTED + 'echo "0|RUNNING|None"')
    array = crew.find_queued(sweep)
    assert array == Array("12", 2)
    with crew.assembled(sweep, NullTracker(), replace(LAUNCH, array=array)) as workers:
        assert isinstance(workers, elsewhere.Follower)
    assert (commands.parent / "asked").read_text() == "x\n"


def test_of_finished_runs_slurm_is_not_asked(sweep: Sweep, commands: Path) -> None:
    """Nothing is left to submit or to wait for, also where Slurm is gone."""
    stand_in(commands, "squeue", COUNTED + "exit 1")
    for point in sweep.points:
        point.run.write_status(Status("finished", started=1.0, ended=2.0))
    done = replace(sweep, points=[replace(point, action="skip") for point in sweep.points])
    with crew.assembled(done, NullTracker(), LAUNCH):
        pass
    assert not (commands.parent / "asked").exists()


def test_tasks_whose_python_is_broken_leave_their_output(
    sweep: Sweep, commands: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name is shown by the command that follows them, and by the one that submits again."""
    caplog.set_level("INFO", "finetune")
    stand_in(commands, "squeue", "exit 0")
    stand_in(commands, "sacct", 'printf "12_0|FAILED|1:0\\n12_1|FAILED|127:0\\n"')
    array = find_array(sweep.folder)
    assert array is not None
    assert SlurmTasks(array, sweep.folder).alive() == 0
    end = "task 0 FAILED (exit code 1), task 1 FAILED (exit code 127)"
    output = "output: multirun_reports/grid/slurm-12_*.log".replace("multirun_reports", "reports")
    assert f"none in the queue; {end}; {output}" in caplog.text
    assert crew.submit(sweep, LAUNCH.again) == Array("12", 2)
    assert f"the last array, 12, has left runs: {end}; its {output}" in caplog.text


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ('echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1', "contact"),
        ("sleep 5", "timed out after"),
        (None, "'squeue'"),
    ],
)
def test_slurm_that_does_not_answer_is_refused(
    sweep: Sweep, commands: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, fault: str
) -> None:
    """A second array would be submitted beside one that may be at work."""
    monkeypatch.setattr("finetune.sweeps.slurm_queue.ANSWER_SECONDS", 0.2)
    if script is None:
        monkeypatch.setenv("PATH", str(commands))
    else:
        stand_in(commands, "squeue", script)
    with pytest.raises(Refused) as refused:
        crew.find_queued(sweep)
    (problem,) = refused.value.problems
    assert problem.startswith("squeue does not answer: ")
    assert fault in problem
    assert "run the command where squeue works, once it does: grid may be in its queue" in problem


def test_slurm_that_falls_silent_loses_no_array(
    sweep: Sweep, commands: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The command that follows goes on, with what it saw last."""
    stand_in(commands, "squeue", 'echo "Unable to contact slurm controller" >&2; exit 1')
    assert SlurmTasks(Array("12", 2), sweep.folder).alive() == 2
    assert "Unable to contact slurm controller; the array is taken to be as before" in caplog.text


@pytest.mark.parametrize(
    "stored", [b"", b"{", b"\xff", b"[]", b'{"job": 12}', b'{"job": "12", "workers": "2"}']
)
def test_a_damaged_record_of_the_array_lets_it_be_submitted_again(
    sweep: Sweep, commands: Path, caplog: pytest.LogCaptureFixture, stored: bytes
) -> None:
    """Named and set aside; the runs are claimed, so that nothing is done twice."""
    (sweep.folder / "slurm.json").write_bytes(stored)
    assert crew.find_queued(sweep) is None
    assert "slurm.json" in caplog.text
    assert caplog.text.count("WARNING") == 1
    assert crew.submit(sweep, LAUNCH.again) == find_array(sweep.folder) == Array("12", 2)


@pytest.mark.parametrize("state", ["failed", "diverged", "finished", "running"])
def test_what_has_failed_is_tried_again_by_a_new_submission_only(
    sweep: Sweep, commands: Path, state: State
) -> None:
    """A task that is requeued meets the failure of a run in its own sweep, and leaves it."""
    stand_in(commands, "squeue", "exit 0")
    point = replace(sweep.points[0], earlier=state)
    joining = replace(point.job.config, workers=WorkersConfig(join=True))
    point.run.write_status(Status(state, "out of memory", 1.0, 2.0))
    crew.submit(replace(sweep, points=[point]), LAUNCH.again)
    status = point.run.status()
    assert status is not None
    if state != "failed":
        assert status == Status(state, "out of memory", 1.0, 2.0)
        return
    assert (status.state, status.reason) == (
        "interrupted",
        "to be tried again after: out of memory",
    )
    requeued = replace(point.job, config=joining)
    assert decide(requeued, point.run, "interrupted") == "train"
    assert decide(requeued, point.run, "failed") == "leave"
    assert decide(point.job, point.run, "failed") == "train"


def test_a_command_that_finds_runs_left_submits_and_returns(
    sweep: Sweep,
    commands: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With where to look; squeue is asked once."""
    stand_in(commands, "squeue", COUNTED)
    monkeypatch.setattr(run_sweep, "check_sweep", lambda *_: sweep)
    monkeypatch.setattr(run_sweep, "sweep_name", lambda *_: sweep.name)
    monkeypatch.setattr(run_sweep, "render_plan", lambda *_: "")
    monkeypatch.setattr(run_sweep, "_record", lambda *_: None)
    job = sweep.points[0].job
    assert run_sweep.run_sweep([job], ["lora.r=2"], LAUNCH.again) == 0
    printed = capsys.readouterr().out
    assert "submitted: Slurm array 12 of 2 workers" in printed
    assert "output: reports/grid/slurm-12_*.log    end: scancel 12" in printed
    assert (commands.parent / "asked").read_text() == "x\n"
