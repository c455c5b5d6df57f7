"""Sweeps on a real Ray cluster: a node killed in mid-training, and the command stopped."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from finetune.tracking.run_folder import RunFolder
from finetune.training.checkpoints import newest_step
from tests.conftest import ROOT
from tests.sweep_commands import (
    TWO_RUNS,
    are_training,
    assert_same_adapters,
    finish,
    processes_in,
    resumed_at,
    run,
    start,
    wait_for,
)
from tests.sweep_commands import reference as reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="the extra [ray] is not installed"
    ),
]
RAY = (TWO_RUNS, "workers=ray")


@pytest.fixture
def nodes() -> Iterator[subprocess.Popen[str]]:
    """Yield the process of a cluster of two nodes."""
    cluster = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_nodes"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    yield cluster
    cluster.communicate(timeout=100)


def test_a_lost_node_loses_nothing(
    tmp_path: Path, reference: dict[str, str], nodes: subprocess.Popen[str]
) -> None:
    """Its run goes on from a checkpoint on the other one; the adapters are the local sweep's."""
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    address = nodes.stdout.readline().strip()
    sweep = start(tmp_path, *RAY, f"workers.address={address}")
    wait_for(lambda: are_training(tmp_path, 2, beyond=40))
    nodes.stdin.write("kill\n")
    nodes.stdin.flush()
    assert nodes.stdout.readline() == "killed\n"
    printed = finish(sweep)
    assert printed.count(": finished") == 2
    assert_same_adapters(tmp_path, reference, 2)
    steps = [resumed_at(one) for one in tmp_path.glob("outputs/*")]
    assert sorted(len(of_run) for of_run in steps) == [0, 1]
    assert processes_in(tmp_path) == []


def test_the_tasks_end_with_the_command(tmp_path: Path, reference: dict[str, str]) -> None:
    """Checkpoints written, no process left; the same command goes on from them, each time."""
    for number, code, step in (
        (signal.SIGINT, 130, 20),
        (signal.SIGTERM, 75, 60),
        (signal.SIGKILL, -9, 100),
    ):
        sweep = start(tmp_path, *RAY, "workers.num=2")
        wait_for(partial(are_training, tmp_path, 1, beyond=step))
        sweep.send_signal(number)
        finish(sweep, code)
        wait_for(lambda: processes_in(tmp_path) == [], 60)
        runs = [RunFolder(path.parent) for path in tmp_path.glob("outputs/*/events.jsonl")]
        newest = [newest_step(one.checkpoints) or 0 for one in runs]
        assert max(newest) > step - 20  # a step is written every 20, and at a stop
    run(tmp_path, *RAY, "workers.num=2")
    assert_same_adapters(tmp_path, reference, 2)
