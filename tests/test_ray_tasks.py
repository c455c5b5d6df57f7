"""Tests of workers that are tasks of a Ray cluster; those with a cluster are slow."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.config.schema import Config
from finetune.problems import Refused
from finetune.sweeps import ray_join, ray_tasks
from finetune.sweeps.ray_join import JoinLost, find_last_line, join_sweep
from finetune.sweeps.ray_messages import Ended, Failed, Join, Joined, Node, Share
from finetune.sweeps.tied_process import start_tied


def build_config(**workers: object) -> Config:
    config = Config()
    config.workers.launch = "ray"
    for name, value in workers.items():
        setattr(config.workers, name, value)
    return config


def test_ray_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is the extra that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = ray_tasks.find_problems(build_config())
    assert problem.startswith("workers.launch is ray, but")
    assert problem.endswith("pip install 'finetune[ray]'")


@pytest.mark.parametrize("source", ["setting", "variable"])
def test_an_address_of_rays_client_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client has no view of nodes, and needs another extra of Ray's."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
    config = build_config(address="ray://head:10001" if source == "setting" else None)
    if source == "variable":
        monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    (problem,) = ray_tasks.find_problems(config)
    assert "workers.address=auto" in problem


@pytest.mark.parametrize(
    ("typed", "workers"),
    [
        ("workers=ray", {}),
        ("+workers=ray", {}),
        ("workers.num=4", {"num": 4}),
        ("workers.threads=8", {"threads": 8}),
        ("workers.address=auto", {"address": "auto"}),
    ],
)
def test_settings_that_start_tasks_are_not_passed_to_them(
    typed: str, workers: dict[str, object]
) -> None:
    """A joining command has one worker with the task's CPUs."""
    again = [typed, "lora.r=4,8", "--multirun", "workers.gpus_per_worker=2"]
    config = build_config(gpus_per_worker=2, **workers).workers
    join = ray_tasks.build_join(again, config, Path("multirun_reports/a"), Share(2, 3, 2))
    assert typed not in join.arguments
    needed = ["lora.r=4,8", "--multirun", "workers.gpus_per_worker=2", "workers=local"]
    needed += ["workers.num=1", "workers.threads=3", "workers.join=true"]
    assert {*needed} <= {*join.arguments}
    keys = [one.partition("=")[0] for one in join.arguments]
    assert len(keys) == len({*keys})
    assert join.logs == str(Path.cwd() / "multirun_reports/a")


def test_the_time_limit_is_kept_by_the_sweep() -> None:
    """All tasks stop together, and none is taken for one that its machine stopped."""
    config = build_config(stop_after="3h").workers
    join = ray_tasks.build_join(["workers.stop_after=3h"], config, Path("a"), Share(1, 1, 0))
    assert [a for a in join.arguments if "stop_after" in a] == ["workers.stop_after=null"]


def test_variables_of_the_settings_reach_the_tasks() -> None:
    """The rest of a node's environment is the node's."""
    environment = {"FINETUNE_CACHE": "/c", "HF_TOKEN": "t", "DATA": "/d", "PATH": "/bin", "X": "1"}
    found = ray_tasks.select_variables(environment, ["data.path=${oc.env:DATA}/rows.jsonl"])
    assert found == {"FINETUNE_CACHE": "/c", "HF_TOKEN": "t", "DATA": "/d"}


GPU_NODE, CPU_NODE, HEAD = Node(16, 4), Node(8, 0), Node(0, 0)


@pytest.mark.parametrize(
    ("nodes", "workers", "share"),
    [
        ([CPU_NODE], {}, Share(1, 8, 0)),
        ([CPU_NODE, CPU_NODE, HEAD], {}, Share(2, 8, 0)),
        ([CPU_NODE, CPU_NODE], {"num": 4}, Share(4, 4, 0)),
        ([CPU_NODE, CPU_NODE], {"num": 3}, Share(3, 4, 0)),
        ([CPU_NODE], {"threads": 2}, Share(1, 2, 0)),
        ([CPU_NODE], {"num": 20}, Share(20, 1, 0)),
        ([GPU_NODE, CPU_NODE], {}, Share(4, 4, 1)),
        ([GPU_NODE, GPU_NODE], {}, Share(8, 4, 1)),
        ([GPU_NODE, GPU_NODE], {"gpus_per_worker": 2}, Share(4, 8, 2)),
        ([GPU_NODE], {"num": 2}, Share(2, 8, 1)),
    ],
)
def test_tasks_share_the_cluster(
    nodes: list[Node], workers: dict[str, object], share: Share
) -> None:
    """One a GPU, else one a node, with the most CPUs that let all run at once."""
    assert ray_tasks.plan_share(build_config(**workers), nodes, 99) == share


def test_no_more_tasks_than_runs() -> None:
    """A task without a run would start for nothing; the others take its CPUs."""
    assert ray_tasks.plan_share(build_config(), [GPU_NODE, GPU_NODE], 2) == Share(2, 16, 1)


def test_training_on_the_cpu_takes_no_gpu() -> None:
    """`training.device=cpu` leaves the GPUs to others."""
    config = build_config()
    config.training.device = "cpu"
    assert ray_tasks.plan_share(config, [GPU_NODE], 9).num_gpus == 0


@pytest.mark.parametrize(
    ("device", "nodes", "workers"),
    [
        ("cuda", [CPU_NODE], {}),
        ("auto", [GPU_NODE], {"gpus_per_worker": 8}),
        ("cpu", [CPU_NODE], {"threads": 16}),
        ("auto", [HEAD], {}),
    ],
)
def test_a_cluster_without_room_for_a_task_is_refused(
    device: str, nodes: list[Node], workers: dict[str, object]
) -> None:
    """Ray would wait for such a node for ever."""
    config = build_config(**workers)
    config.training.device = device
    with pytest.raises(Refused, match="no node of the Ray cluster has"):
        ray_tasks.plan_share(config, nodes, 9)


def test_a_cluster_that_grows_may_have_no_room_yet(caplog: pytest.LogCaptureFixture) -> None:
    """With a typed number of tasks Ray waits for the node, and the log says so."""
    config = build_config(num=4)
    config.training.device = "cuda"
    assert ray_tasks.plan_share(config, [CPU_NODE], 9) == Share(4, 1, 1)
    assert "wait for a node" in caplog.text


@pytest.mark.parametrize(
    ("outcome", "is_stopped", "words"),
    [
        (Joined("n1", 0, ""), False, None),
        (Joined("n1", 1, "a run failed"), False, None),
        (Joined("n1", 2, "the cache cannot be written to"), False, "on n1 was refused"),
        (Joined("n1", 130, "interrupted"), False, "on n1 ended (exit code 130)"),
        (Joined("n1", 75, "stopped"), True, None),
        (Joined("n1", -9, ""), True, "on n1 ended (exit code -9)"),
        (Failed("n1 has no folder /w"), False, "Ray task 3 failed: n1 has no folder /w"),
        (Failed("cancelled"), True, None),
    ],
)
def test_a_task_that_ends_early_is_described(
    outcome: Joined | Failed, is_stopped: bool, words: str | None
) -> None:
    """What was asked for, and what the report tells, is not said again."""
    line = ray_tasks.describe(Ended(3, outcome), is_stopped=is_stopped)
    assert line is None if words is None else words in (line or "")


def test_the_last_line_of_an_output_is_its_reason() -> None:
    """A refusal's lines are a list."""
    lines = [b"finetune: 1 problem, nothing was started\n", b"  - the cache is closed\n", b"\n"]
    assert find_last_line(lines) == "the cache is closed"
    assert find_last_line([]) == ""


def build_join(folder: Path) -> Join:
    return Join(["lora.r=4"], str(folder), str(folder), {})


def run_instead(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let tasks run some Python code in place of the joining command."""

    def start(command: list[str], *rest: object) -> subprocess.Popen[bytes]:
        return start_tied([sys.executable, "-c", code], *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ray_join, "start_tied", start)


def test_a_task_returns_how_its_command_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output is appended to the task's log."""
    (tmp_path / "ray-1.log").write_text("earlier\n", encoding="utf-8")
    run_instead(monkeypatch, "import sys; print('a'); print('b'); sys.exit(1)")
    joined = join_sweep(build_join(tmp_path), 1)
    assert (joined.exit_code, joined.last_line) == (1, "b")
    lines = (tmp_path / "ray-1.log").read_text(encoding="utf-8").splitlines()
    assert [lines[0], *lines[2:]] == ["earlier", "a", "b"]


@pytest.mark.parametrize("end", ["sys.exit(75)", "os.kill(os.getpid(), 9)"])
def test_a_command_that_its_machine_stopped_is_started_again(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray retries a task at this error."""
    run_instead(monkeypatch, f"import os, sys; {end}")
    with pytest.raises(JoinLost):
        join_sweep(build_join(tmp_path), 0)


def test_a_cancelled_task_lets_its_command_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets SIGTERM, and its exit code 75 is no loss then."""
    run_instead(
        monkeypatch,
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)",
    )

    def cancel(seconds: float) -> None:
        if "ready" in (tmp_path / "ray-0.log").read_text(encoding="utf-8"):
            raise KeyboardInterrupt  # as Ray does
        time.sleep(0.05)

    slept = SimpleNamespace(sleep=cancel, strftime=time.strftime)
    monkeypatch.setattr(ray_join, "time", slept)
    joined = join_sweep(build_join(tmp_path), 0)
    assert (joined.exit_code, joined.last_line) == (75, "saved")


def test_a_node_without_the_folder_is_named(tmp_path: Path) -> None:
    """The folders of a sweep are on a file system that all nodes share."""
    with pytest.raises(FileNotFoundError, match="on a shared file system"):
        join_sweep(build_join(tmp_path / "missing"), 0)


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def test_a_command_gets_sigterm_when_its_parent_is_killed(tmp_path: Path) -> None:
    """Also by -9, and also where the parent ignores and blocks stop signals."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w').close(), sys.exit(75)))\n"
        "open('ready', 'w').close()\n"
        "time.sleep(60)"
    )
    parent = (
        "import os, signal, sys, time\n"
        "from finetune.sweeps.tied_process import start_tied\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        f"start_tied([sys.executable, '-c', {code!r}], '.', os.environ, open('log', 'wb'))\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path)
    try:
        wait_until((tmp_path / "ready").exists)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until((tmp_path / "saved").exists)
