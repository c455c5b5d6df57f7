"""A worker that was halted beyond its lease writes nothing over its successor's work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.files import file_digest
from finetune.pipeline import run_jobs
from finetune.tracking import claims
from finetune.tracking.claims import Watch
from finetune.tracking.events import read_events
from finetune.tracking.run_folder import RunFolder
from tests.conftest import ROOT
from tests.takeover import LEASE_SECONDS, RENAMES, RENEW_SECONDS, build_job

MOMENTS = [
    *[("lora", moment) for moment in ("event", "checked event", *RENAMES) if moment != "model"],
    *[("dora", moment) for moment in ("event", "checkpoint", "weights")],
    ("full", "model"),
]


@pytest.fixture(autouse=True)
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LEASE_SECONDS", LEASE_SECONDS)
    monkeypatch.setattr(claims, "RENEW_SECONDS", RENEW_SECONDS)


def only_run(folder: Path) -> RunFolder:
    (status,) = folder.glob("*/status.json")
    return RunFolder(status.parent)


def content(run: RunFolder) -> dict[str, str]:
    """Return the digests of a run's files, without its log, which says what became of whom."""
    files = (path for path in run.path.rglob("*") if path.is_file() and path != run.log)
    return {str(path.relative_to(run.path)): file_digest(path) for path in files}


def history(run: RunFolder) -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in run.metric("train/loss")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """Return a run of each method that nobody disturbed."""
    runs = {}
    for method in dict(MOMENTS):
        folder = tmp_path_factory.mktemp(method)
        assert run_jobs.run([build_job(folder, method)]) == ["finished"]
        runs[method] = only_run(folder)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("method", "moment"), MOMENTS)
def test_a_halted_worker_leaves_its_successors_run_as_it_is(
    tmp_path: Path, undisturbed: dict[str, RunFolder], method: str, moment: str
) -> None:
    """It is halted in mid-training or at a rename, another process finishes, then it goes on."""
    first = subprocess.Popen(
        [sys.executable, "-m", "tests.takeover", str(tmp_path), method, moment], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _, status = os.waitpid(first.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), first.communicate()
        run = only_run(tmp_path)
        job, watch = build_job(tmp_path, method), Watch(run.claim)
        assert run_jobs.run([job]) == ["held"]
        while not watch.is_free():  # as the sweep that hands out runs looks at them
            time.sleep(0.1)
        assert run_jobs.run([job]) == ["finished"]
        assert not run.claim.exists()
        before, events = content(run), list(read_events(run.events))
        assert not [name for name in before if Path(name).name.startswith(".claim")]
        first.send_signal(signal.SIGCONT)
        out, err = first.communicate(timeout=60)
    finally:
        first.kill()
    assert out.split() == ["held"], err
    if moment != "end":  # at which its own record had been closed
        assert "another process has taken over" in run.log.read_text(encoding="utf-8")
    after = content(run)
    if moment == "checked event":  # nothing can stop this one line; readers leave it out
        before.pop("events.jsonl")
        after.pop("events.jsonl")
    assert after == before
    assert list(read_events(run.events)) == events
    assert run.find_damage() == {}
    whole = undisturbed[method]
    assert history(run) == history(whole)
    assert [path.name for path in run.weights()] == [path.name for path in whole.weights()]
    for ours, theirs in zip(run.weights(), whole.weights(), strict=True):
        assert file_digest(ours) == file_digest(theirs)
    assert run.read_items("demo_science") == whole.read_items("demo_science")
