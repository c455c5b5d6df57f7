"""Slurm's script, its options and its answers, by stand-ins of its commands; and on a real node."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.config.schema import WorkersConfig
from finetune.problems import Refused
from finetune.sweeps import slurm, slurm_queue
from finetune.sweeps.slurm_queue import Array, TaskState

SLURM = WorkersConfig(launch="slurm")
TWO = Array("12", 2)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is first in PATH; its sbatch takes everything as array 12."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_queue, "PAUSE_SECONDS", 0)
    stand_in(folder, "sbatch", 'printf "%s\\n" "$@" >"${0%/*}/../options"; echo 12')
    stand_in(folder, "scancel", 'echo "$@" >"${0%/*}/../cancelled"')
    return folder


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def sweep_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "reports" / "tiny-demo-1"
    folder.mkdir(parents=True)
    return folder


def test_an_array_is_submitted_and_recorded(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options are arguments of sbatch, the log is in the sweep's folder, its job is on disk."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = sweep_folder(tmp_path)
    workers = replace(SLURM, partition="gpu", time="4:00:00", extra=["--mem=32G"], threads=3)
    array = slurm.submit(workers, folder, ["lora.r=2,4", "--multirun"], 2, needs_gpu=True)
    assert array == slurm_queue.find_array(folder) == TWO
    assert (tmp_path / "options").read_text().splitlines() == [
        "--parsable", "--job-name=finetune-tiny-demo-1", "--array=0-1", "--nodes=1", "--ntasks=1",
        f"--output={folder}/slurm-%A_%a.log", "--open-mode=append", "--signal=TERM@180",
        "--partition=gpu", "--time=4:00:00", "--gres=gpu:1", "--cpus-per-task=3", "--requeue",
        "--mem=32G", str(folder / "slurm.sh"),
    ]  # fmt: skip
    assert "-m finetune lora.r=2,4 --multirun workers=local" in (folder / "slurm.sh").read_text()


@pytest.mark.parametrize(
    ("changes", "needs_gpu", "gres"),
    [
        ({}, True, "gpu:1"),
        ({"gpus_per_worker": 2}, True, "gpu:2"),
        ({}, False, None),
        ({"gres": "gpu:a100:1"}, False, "gpu:a100:1"),
        ({"gres": "none"}, True, None),
    ],
)
def test_gpus_are_asked_for(changes: dict[str, object], needs_gpu: bool, gres: str | None) -> None:
    """By workers.gres; without it by the GPUs of a worker, unless the sweep is for the CPU."""
    workers = replace(SLURM, **changes)  # type: ignore[arg-type]
    options = slurm.list_options(workers, Path("x"), 1, needs_gpu=needs_gpu)
    asked = [o.removeprefix("--gres=") for o in options if o.startswith("--gres")]
    assert asked == ([] if gres is None else [gres])


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400), ("4:00:00", 14400), ("3:30", 210), ("1-12", 129600), ("1-0:30", 88200),
        ("2-01:00:10", 176410), ("UNLIMITED", float("inf")), ("90m", None), ("", None),
        ("4:00:00:00", None),
    ],
)  # fmt: skip
def test_a_time_limit_is_read_as_slurm_reads_it(time: str, seconds: float | None) -> None:
    """A number is minutes, two are minutes and seconds, three or days begin with hours."""
    assert slurm.read_time(time) == seconds


@pytest.mark.parametrize(("time", "save"), [(None, 180), ("3:00", 60), ("6:00", 120), ("60", 180)])
def test_the_signal_leaves_most_of_the_time_to_train(time: str | None, save: int) -> None:
    """Three minutes before the end, or the last third of a short time limit."""
    options = slurm.list_options(replace(SLURM, time=time), Path("x"), 1, needs_gpu=False)
    assert f"--signal=TERM@{save}" in options


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time": "90m"}, "workers.time is '90m'; write it as Slurm does"),
        ({"time": "2"}, "leaves no time to train"),
        ({"extra": ["-C", "a100"]}, "in their long form"),
        ({"extra": ["other.sh"]}, "workers.extra has 'other.sh'"),
        ({"extra": ["--mem=1\n#SBATCH --uid=0"]}, "workers.extra has '--mem=1"),
        ({"extra": ["--array=0-99"]}, "workers.extra has --array; set workers.num"),
        ({"extra": ["--no-requeue"]}, "--no-requeue, which the sweep sets itself"),
        ({"partition": "gpu\n#SBATCH --uid=0"}, "workers.partition is"),
    ],
)
def test_settings_that_slurm_cannot_take_are_refused(
    commands: Path, changes: dict[str, object], words: str
) -> None:
    """Before anything is planned, each with its setting."""
    problems = slurm.find_problems(replace(SLURM, **changes))  # type: ignore[arg-type]
    assert words in problems[0]
    assert slurm.find_problems(SLURM) == []


def test_slurm_that_is_not_installed_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is the login node."""
    monkeypatch.setenv("PATH", "/nowhere")
    (problem,) = slurm.find_problems(SLURM)
    assert "needs sbatch" in problem
    assert "login node" in problem


@pytest.mark.parametrize(
    "value",
    ["a b", "it's", "$(touch x)", "`x`", "a\n#SBATCH --uid=0\nb", "é\r\n", "a\\nb'\"", "\udcff"],
)
def test_values_reach_the_command_as_typed(tmp_path: Path, value: str) -> None:
    """No value is run by the shell, or read by sbatch as an option or a line's end."""
    script = slurm.write_script(tmp_path, [f"sweep.name={value}"])
    (command,) = [line for line in script.splitlines() if line.startswith("srun")]
    assert not [line for line in script.split("\n") if "#SBATCH" in line and line != command]
    assert "\r" not in script
    shown = f"srun() {{ printf '%s' \"${{@: -1}}\"; }}\n{command}"
    done = subprocess.run(["bash", "-c", shown], capture_output=True, check=True)
    assert done.stdout == os.fsencode(f"sweep.name={value}")


def test_a_worker_gets_the_sweeps_arguments_without_those_of_its_launch() -> None:
    """What a config file sets of them is reset; the settings of the worker itself stay."""
    typed = [
        "lora.r=2,4", "--multirun", "--config-dir", "mine", "workers=slurm", "workers.num=2",
        "workers.gres=none", "workers.threads=1", "workers.stop_after=3h",
    ]  # fmt: skip
    workers = replace(SLURM, num=2, gres="none", threads=1, stop_after="3h", time="60")
    assert slurm.join_arguments(typed, workers) == [
        "lora.r=2,4", "--multirun", "--config-dir", "mine", "workers.threads=1",
        "workers.stop_after=3h", "workers=local", "workers.launch=local", "workers.join=true",
        "workers.num=null", "workers.time=null", "workers.gres=null",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("printed", "remedy"),
    [
        ("Batch job submission failed: Invalid partition name specified", "set workers.partition"),
        ("Batch job submission failed: Invalid account or account/partition combination specified",
         "set workers.account"),
        ("Batch job submission failed: Invalid generic resource (gres) specification",
         "set workers.gres"),
        ("Batch job submission failed: Requested node configuration is not available",
         "to what one node has"),
        ("Batch job submission failed: Invalid job array specification", "lower workers.num"),
        ("Batch job submission failed: Invalid qos specification", "--qos=NAME"),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)",
         "where `sinfo` works"),
        ("unrecognized option '--memm=3'", "see workers.extra"),
    ],
)  # fmt: skip
def test_what_sbatch_refuses_is_one_line_with_the_remedy(
    tmp_path: Path, commands: Path, printed: str, remedy: str
) -> None:
    """The sweep's folder has no array then."""
    stand_in(commands, "sbatch", f'echo "sbatch: error: {printed}" >&2; exit 1')
    folder = sweep_folder(tmp_path)
    with pytest.raises(Refused) as refused:
        slurm.submit(SLURM, folder, [], 1, needs_gpu=False)
    (problem,) = refused.value.problems
    assert printed in problem
    assert remedy in problem
    assert "\n" not in problem
    assert slurm_queue.find_array(folder) is None


def test_an_array_that_cannot_be_recorded_is_cancelled(tmp_path: Path, commands: Path) -> None:
    """No tasks run that nobody knows of."""
    folder = sweep_folder(tmp_path)
    (folder / "slurm.json").mkdir()
    with pytest.raises(Refused, match=r"array 12 was cancelled"):
        slurm.submit(SLURM, folder, [], 1, needs_gpu=False)
    assert (tmp_path / "cancelled").read_text() == "12\n"


@pytest.mark.parametrize("stored", ["", "{", "[]", '{"job": "12"}', '{"task": 1}'])
def test_a_damaged_record_is_none(tmp_path: Path, stored: str) -> None:
    """The sweep is then submitted again; its runs are claimed, so that nothing is done twice."""
    (tmp_path / "slurm.json").write_text(stored)
    assert slurm_queue.find_array(tmp_path) is None


def test_tasks_in_the_queue_are_listed(commands: Path) -> None:
    """One line says how many run and why others wait."""
    stand_in(commands, "squeue", 'printf "0|RUNNING|None\\n1|PENDING|Resources\\n"')
    states = slurm_queue.list_states(TWO)
    assert states == [TaskState("0", "RUNNING", "None"), TaskState("1", "PENDING", "Resources")]
    assert slurm_queue.describe_states(states) == "1 running, 1 pending (Resources)"


def test_an_array_that_slurm_has_forgotten_has_no_tasks(commands: Path) -> None:
    """Some minutes after its end squeue calls its number invalid."""
    stand_in(commands, "squeue", 'echo "slurm_load_jobs: Invalid job id specified" >&2; false')
    assert slurm_queue.list_states(TWO) == []


def test_a_squeue_that_fails_once_is_asked_again(tmp_path: Path, commands: Path) -> None:
    """A controller that is restarted loses no array."""
    once = f'[ -e "{tmp_path}/again" ] || {{ : >"{tmp_path}/again"; echo late >&2; exit 1; }}'
    stand_in(commands, "squeue", f'{once}\necho "0|RUNNING|None"')
    assert slurm_queue.list_states(TWO) == [TaskState("0", "RUNNING", "None")]


def test_a_squeue_that_fails_is_not_an_array_that_ended(commands: Path) -> None:
    """What is not known is said."""
    stand_in(commands, "squeue", 'echo "Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(slurm_queue.SlurmUnavailable, match="Unable to contact slurm controller"):
        slurm_queue.list_states(TWO)


@pytest.mark.parametrize("has_accounting", [True, False])
def test_the_end_of_an_array_is_described(commands: Path, has_accounting: bool) -> None:
    """By sacct, or without accounting by what the controller still knows."""
    rows = 'printf "12_0|TIMEOUT|0:0\\n12_1|FAILED|2:0\\n"' if has_accounting else "exit 1"
    stand_in(commands, "sacct", rows)
    jobs = (
        "JobId=12 ArrayTaskId=1 JobState=FAILED ExitCode=2:0\\n"
        "JobId=13 ArrayTaskId=0 JobState=TIMEOUT ExitCode=0:0\\n"
    )
    stand_in(commands, "scontrol", f'printf "{jobs}"')
    assert slurm_queue.describe_end(TWO) == "task 0 TIMEOUT, task 1 FAILED (exit code 2)"


@pytest.mark.parametrize(
    ("code", "is_signalled", "is_requeued"),
    [(75, False, True), (75, True, False), (0, False, False), (1, False, False), (2, False, False)],
)
def test_only_a_worker_that_stopped_itself_is_requeued(
    tmp_path: Path, commands: Path, code: int, is_signalled: bool, is_requeued: bool
) -> None:
    """Not one that finished, failed or was refused, nor one that the user cancelled."""
    stand_in(commands, "srun", f"{'kill -TERM $PPID;' if is_signalled else ''} exit {code}")
    stand_in(commands, "scontrol", f'echo "$@" >{tmp_path}/requeued')
    stand_in(commands, "sleep", "")
    numbers = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(
        ["bash", "-c", slurm.write_script(tmp_path, ["lora.r=2"])],
        env={**os.environ, **numbers},
        check=False,
    )
    assert done.returncode == code
    asked = tmp_path / "requeued"
    assert (asked.read_text() if asked.exists() else None) == (
        "requeue 12_1\n" if is_requeued else None
    )


def test_the_record_names_the_cluster(tmp_path: Path, commands: Path) -> None:
    """Where one login node serves several, squeue is asked about the one that took the array."""
    stand_in(commands, "sbatch", 'echo "12;north"')
    stand_in(commands, "squeue", 'echo "0|$*|None"')
    folder = sweep_folder(tmp_path)
    array = slurm.submit(SLURM, folder, [], 1, needs_gpu=False)
    assert json.loads((folder / "slurm.json").read_text())["cluster"] == "north"
    assert "--clusters=north" in slurm_queue.list_states(array)[0].state
