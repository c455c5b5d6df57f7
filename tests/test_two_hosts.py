"""Two hosts over one folder: processes with host names and process numbers of their own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest

from finetune.tracking import claims
from finetune.tracking.claims import Watch
from finetune.tracking.events import drop_superseded, read_lines
from finetune.tracking.run_folder import RunFolder
from tests.conftest import ROOT

PID = 29_983  # on each host; the number of no process here
UNSHARE = ("unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")

BEGIN = """
import os, socket, sys
from pathlib import Path
from finetune.tracking import claims
claims.LEASE_SECONDS, claims.RENEW_SECONDS, claims.POLL_SECONDS = 1.0, 0.1, 0.01
from finetune.files import write_atomic
from finetune.tracking.events import EventLog
from finetune.tracking.run_folder import RunFolder, Status
run = RunFolder(Path(sys.argv[1]))
print(os.getpid(), socket.gethostname(), flush=True)
"""
HOLD = """
with run.claimed() as claim:
    print("held", flush=True)
    sys.stdin.read()
"""
# Holds the run again and again, and writes ten events each time.
WRITE = """
for turn in range(5):
    with run.claimed() as claim:
        events = EventLog(run.events, claim)
        first = 1 + len([line for line in run.events.read_text().splitlines()])
        for step in range(first, first + 10):
            events.metrics({"train/loss": 1.0}, step)
        events.close()
"""
# Writes one file, beside a process of the same number that writes it too.
REPLACE = """
for turn in range(200):
    write_atomic(run.path / "status.json", f"{socket.gethostname()} {turn}" * 1000)
"""


@lru_cache(maxsize=1)
def unshare_problem() -> str | None:
    try:
        done = subprocess.run([*UNSHARE, "hostname", "x"], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return done.stderr if done.returncode else None


@contextmanager
def on_host(name: str, script: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a script on a host of this name, where its process number is PID."""
    if unshare_problem() is not None:
        pytest.skip(f"no namespaces here: {unshare_problem()}")
    python = shlex.join([sys.executable, "-c", BEGIN + script, str(folder)])
    number = f"echo {PID - 1} > /proc/sys/kernel/ns_last_pid"
    process = subprocess.Popen(
        [*UNSHARE, "sh", "-c", f"hostname {name}; {number}; {python}; exit $?"], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().split() == [str(PID), name]
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.1)


# Also two containers of one name.
@pytest.mark.parametrize("name", ["node7", os.uname().nodename])
def test_a_claim_of_another_host_is_respected_until_its_lease_ends(
    tmp_path: Path, name: str
) -> None:
    """Its number is of nobody here, and yet it lives; once dead, its lease is waited for."""
    with on_host(name, HOLD, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert not Path(f"/proc/{PID}").exists()
        watch, end = Watch(RunFolder(tmp_path).claim), time.monotonic() + 2.5
        while time.monotonic() < end:  # beyond two leases
            assert not watch.is_free()
            assert not watch.look().is_lost
            time.sleep(0.1)
        assert str(watch.holder()).startswith(f"{name}?pidns-")
        assert str(watch.holder()).endswith(f", process {PID}")
        process.kill()
        process.wait()
        assert not watch.is_free()
        killed = time.monotonic()
        while not watch.is_free():
            assert time.monotonic() - killed < 10
            time.sleep(0.05)
        assert time.monotonic() - killed > 0.5


def test_an_event_log_has_one_writer_at_a_time(tmp_path: Path) -> None:
    """Of two hosts that take turns: each claim's lines stand together, and none is lost."""
    run = RunFolder(tmp_path)
    with on_host("node1", WRITE, tmp_path) as one, on_host("node2", WRITE, tmp_path) as other:
        for process in (one, other):
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
    lines = read_lines(run.events)
    assert not lines.damaged
    assert [event["step"] for event in lines.values] == list(range(1, 101))
    writers = [event["claim"] for event in lines.values]
    assert len(set(writers)) == 10
    assert all(len(set(writers[start : start + 10])) == 1 for start in range(0, 100, 10))
    assert len(list(drop_superseded(json.loads(json.dumps(lines.values)), []))) == 100


def test_temporary_names_of_two_hosts_do_not_collide(tmp_path: Path) -> None:
    """Of processes of the same number that write the same file at once."""
    with on_host("node1", REPLACE, tmp_path) as one, on_host("node2", REPLACE, tmp_path) as other:
        for process in (one, other):
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
    (written,) = tmp_path.iterdir()
    assert written.read_text(encoding="utf-8") in {f"node{n} 199" * 1000 for n in (1, 2)}
