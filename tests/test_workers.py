"""Several workers, killed, joined and stopped: their adapters are one worker's, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from finetune.tracking.run_folder import RunFolder
from tests.sweep_commands import (
    FOUR_RUNS,
    THREE_RUNS,
    are_training,
    assert_same_adapters,
    finish,
    run,
    start,
    states,
    trained_steps,
    wait_for,
)
from tests.sweep_commands import reference as reference


def workers_of(command: subprocess.Popen[str]) -> list[int]:
    """Return the processes of a sweep's workers."""
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, line in lines.items() if b"spawn_main" in line]


@pytest.mark.slow
def test_two_workers_train_what_one_does(tmp_path: Path, reference: dict[str, str]) -> None:
    """Each run once, its worker recorded; a repeated command finds all finished."""
    printed = run(tmp_path, THREE_RUNS, "workers.num=2")
    assert_same_adapters(tmp_path, reference, 3)
    runs = list(tmp_path.glob("outputs/*"))
    assert [states(one) for one in runs] == [["running", "finished"]] * 3
    names = {json.loads((one / "environment.json").read_text())["worker"] for one in runs}
    assert names == {"CPU 0", "CPU 1"}
    assert "CPU 1: " in printed
    assert printed.count(" finished in ") == 3
    assert run(tmp_path, THREE_RUNS, "workers.num=2").count("finished already") == 3
    assert [states(one) for one in runs] == [["running", "finished"]] * 3


@pytest.mark.slow
def test_a_killed_worker_is_replaced(tmp_path: Path, reference: dict[str, str]) -> None:
    """Its run goes on from its checkpoint, once; the other worker notices nothing."""
    sweep = start(tmp_path, THREE_RUNS, "workers.num=2")
    wait_for(lambda: are_training(tmp_path, 1, beyond=24))
    os.kill(workers_of(sweep)[0], signal.SIGKILL)
    printed = finish(sweep)
    assert "killed by SIGKILL (out of memory?); it is tried once more" in printed
    assert_same_adapters(tmp_path, reference, 3)


@pytest.mark.slow
def test_a_killed_conductor_leaves_no_worker_and_loses_nothing(
    tmp_path: Path, reference: dict[str, str]
) -> None:
    """The same command goes on from the checkpoints."""
    sweep = start(tmp_path, THREE_RUNS, "workers.num=2")
    wait_for(lambda: are_training(tmp_path, 2, beyond=24))
    workers = workers_of(sweep)
    assert len(workers) == 2
    sweep.kill()
    sweep.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)
    assert "resumed at step" in run(tmp_path, THREE_RUNS, "workers.num=2")
    assert_same_adapters(tmp_path, reference, 3)


@pytest.mark.slow
def test_a_second_command_joins_and_leaves(tmp_path: Path, reference: dict[str, str]) -> None:
    """It takes runs that nobody has, and its end by Ctrl-C costs the sweep nothing."""
    command = (FOUR_RUNS, "workers.num=1")
    sweep = start(tmp_path, *command)
    wait_for(lambda: are_training(tmp_path, 1, beyond=0))
    leaving, staying = (start(tmp_path, *command, "workers.join=true") for _ in range(2))
    wait_for(lambda: are_training(tmp_path, 3, beyond=0))
    time.sleep(0.3)
    leaving.send_signal(signal.SIGINT)
    assert "the sweep goes on without this process" in finish(leaving, 130)
    assert "joined sweep" in finish(staying)
    finish(sweep)
    assert_same_adapters(tmp_path, reference, 4)
    runs = list(tmp_path.glob("outputs/*"))
    assert [states(one)[-1] for one in runs] == ["finished"] * 4
    holders = [
        {json.loads(line)["claim"] for line in (one / "events.jsonl").read_text().splitlines()}
        for one in runs
    ]
    assert len(set().union(*holders)) >= 4


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_from_its_checkpoints(
    tmp_path: Path, reference: dict[str, str]
) -> None:
    """By the machine, and by `workers.stop_after`: both runs at work have saved; exit code 75."""
    sweep = start(tmp_path, THREE_RUNS, "workers.num=2")
    wait_for(lambda: are_training(tmp_path, 2, beyond=2))
    sweep.send_signal(signal.SIGUSR1)
    assert "stopped by SIGUSR1; the same command resumes" in finish(sweep, 75)
    begun = [RunFolder(tmp_path / "outputs" / name) for name in trained_steps(tmp_path)]
    ended = [states(one.path)[-1] for one in begun]
    assert "interrupted" in ended
    assert set(ended) <= {"interrupted", "finished"}
    assert all(one.is_trained or list(one.checkpoints.glob("step-*")) for one in begun)
    assert run(tmp_path, THREE_RUNS, "workers.num=2", "workers.stop_after=12s", expected=75)
    run(tmp_path, THREE_RUNS, "workers.num=2")
    assert_same_adapters(tmp_path, reference, 3)


def test_a_sweep_that_was_not_begun_is_not_joined(tmp_path: Path) -> None:
    """There is nothing to join, and it is said before anything runs."""
    printed = run(tmp_path, THREE_RUNS, "workers.join=true", expected=2)
    assert "begun without it" in printed
    assert not list(tmp_path.glob("outputs/*"))
