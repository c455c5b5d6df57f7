"""Claims hold between processes and hosts, and a holder that was halted writes nothing more."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout

from finetune.files import put_in_place, write_atomic
from finetune.tracking import claims
from finetune.tracking.claims import ClaimLost, Watch, claimed
from finetune.tracking.events import EventLog, drop_superseded, read_events
from finetune.tracking.run_folder import RunFolder

# Claims a run, writes an event at each line that it reads, and says what became of it.
HOLDER = """
import sys
from pathlib import Path
from finetune.tracking import claims
claims.LEASE_SECONDS, claims.RENEW_SECONDS = 1.0, 0.1
if len(sys.argv) > 2:
    import filelock._identity, socket
    socket.gethostname = lambda: sys.argv[2]
from finetune.tracking.events import EventLog
from finetune.tracking.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
with run.claimed() as claim:
    events = EventLog(run.events, claim)
    print("held", flush=True)
    for step, _ in enumerate(sys.stdin, 1):
        try:
            events.metrics({"train/loss": float(step)}, step)
            print("written", flush=True)
        except claims.ClaimLost:
            print("lost", flush=True)
"""


@pytest.fixture(autouse=True)
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.1)


@contextmanager
def holder(folder: Path, *host: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds a run, on a host of another name if one is given."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *host],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert says(process) == "held"
        yield process
        process.kill()


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write_step(process: subprocess.Popen[str]) -> str:
    """Let a holder write its next event; return what it says of it."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return says(process)


def wait_until(is_so: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_holder_that_was_halted_beyond_its_lease_stops(tmp_path: Path) -> None:
    """Another process takes the run over; the first one, continued, writes nothing more."""
    run = RunFolder(tmp_path)
    with holder(tmp_path) as first:
        assert write_step(first) == "written"
        first.send_signal(signal.SIGSTOP)
        with run.claimed() as claim:
            events = EventLog(run.events, claim)
            events.metrics({"train/loss": 7.0}, 2)
            first.send_signal(signal.SIGCONT)
            assert write_step(first) == "lost"
            assert write_step(first) == "lost"
            events.metrics({"train/loss": 8.0}, 3)
            events.close()
    told = [(e["step"], e["value"]) for e in read_events(run.events)]
    assert told == [(1, 1.0), (2, 7.0), (3, 8.0)]


def test_a_claim_is_kept_for_as_long_as_it_is_renewed(tmp_path: Path) -> None:
    """Longer than a lease, while its holder works."""
    with holder(tmp_path) as process:
        watch, end = Watch(RunFolder(tmp_path).claim), time.monotonic() + 2
        while time.monotonic() < end:
            assert not watch.is_free()
            time.sleep(0.1)
        assert f"process {process.pid}" in str(watch.holder())


def test_the_claim_of_a_dead_process_is_free_at_once_on_its_machine(tmp_path: Path) -> None:
    """Its lease is not waited for."""
    with holder(tmp_path) as process:
        watch = Watch(RunFolder(tmp_path).claim)
        assert not watch.is_free()
        process.kill()
        process.wait()
        assert watch.is_free()


def test_that_of_a_dead_process_on_another_host_is_free_after_its_lease(tmp_path: Path) -> None:
    """Nobody can ask whether the process lives, so its renewals are waited for."""
    with holder(tmp_path, "node7") as process:
        process.kill()
        process.wait()
        watch = Watch(RunFolder(tmp_path).claim)
        assert str(watch.holder()).startswith("node7, process")
        assert not watch.is_free()
        wait_until(watch.is_free)
        assert watch.holder() is None


def test_a_claim_is_refused_or_waited_for(tmp_path: Path) -> None:
    """As its caller asks; waiting is announced once."""
    path, waited = tmp_path / "run" / claims.CLAIM_FILE, []
    with claimed(path), pytest.raises(Timeout), claimed(path, wait=False):
        pass
    assert not path.exists()
    with holder(path.parent) as process:
        assert process.stdin is not None
        process.stdin.close()  # it ends
        with claimed(path, waiting=lambda: waited.append(1)):
            assert path.exists()
    assert waited in ([], [1])


def test_a_holder_on_another_host_is_refused_once_it_shows_that_it_lives(tmp_path: Path) -> None:
    """A dead one does not, so that its claim is taken even by who does not wait for an end."""
    run = RunFolder(tmp_path)
    with holder(tmp_path, "node7") as process:
        for _ in range(2):
            with pytest.raises(Timeout), run.claimed(wait=False):
                pass
        process.kill()
        process.wait()
        with run.claimed(wait=False) as claim:
            claim.check()


def test_a_lost_claim_is_noticed_by_its_holder(tmp_path: Path) -> None:
    """Also where its file is simply gone."""
    with claimed(tmp_path / claims.CLAIM_FILE) as claim:
        claim.check()
        (tmp_path / claims.CLAIM_FILE).unlink()

        def is_lost() -> bool:
            try:
                claim.check()
            except ClaimLost:
                return True
            return False

        wait_until(is_lost)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (["a", "a", "b"], [0, 1, 2]),
        (["a", "b", "a", "b"], [0, 1, 3]),  # the one that was taken over goes on for a while
        ([None, "a", None, "b", "a"], [0, 1, 2, 3]),  # of release 0.1, without claims
        (["a", "b", "c", "b", "a", "c"], [0, 1, 2, 5]),
    ],
)
def test_readers_keep_to_the_newest_claim(written: list[str | None], kept: list[int]) -> None:
    """Read at once, or in two pieces as MLflow's mirror does."""
    events: list[dict[str, Any]] = [
        {"n": n} | ({"claim": claim} if claim else {}) for n, claim in enumerate(written)
    ]
    assert [event["n"] for event in drop_superseded(events, [])] == kept
    for cut in range(len(events)):
        known: list[str] = []
        parts = [*drop_superseded(events[:cut], known), *drop_superseded(events[cut:], known)]
        assert [event["n"] for event in parts] == kept


def test_an_event_has_its_writers_claim_and_is_told_once(tmp_path: Path) -> None:
    """A parameter is not written again by the next holder."""
    run, tokens = RunFolder(tmp_path), []
    for step in (1, 2):
        with run.claimed() as claim:
            tokens.append(claim.token)
            events = EventLog(run.events, claim)
            events.params({"lora.r": "8"})
            events.metrics({"train/loss": 1.0}, step)
            events.close()
    lines = [json.loads(line) for line in run.events.read_text(encoding="utf-8").splitlines()]
    assert [line["event"] for line in lines] == ["param", "metric", "metric"]
    assert [line["claim"] for line in lines] == [tokens[0], tokens[0], tokens[1]]
    assert tokens[0] != tokens[1]


def test_temporary_names_differ_between_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines may have processes of the same number."""
    names: list[str] = []
    monkeypatch.setattr("os.replace", lambda source, _: names.append(Path(source).name))
    for _ in range(2):
        write_atomic(tmp_path / "status.json", "{}")
    assert len(set(names)) == 2


def test_a_folder_whose_files_are_still_open_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS they stay in their folder under another name until they are closed."""
    old, new = tmp_path / "adapter", tmp_path / ".new"
    for folder, text in ((old, "old"), (new, "new")):
        folder.mkdir()
        (folder / "weights").write_text(text, encoding="utf-8")
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: None)
    put_in_place(new, old)
    assert (old / "weights").read_text(encoding="utf-8") == "new"
