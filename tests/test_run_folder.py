"""A run's files: whole or absent, each step once, one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from finetune.files import digest, distinct_slug, slug, write_atomic
from finetune.tracking.events import EventLog, read_events
from finetune.tracking.run_folder import RunFolder, Status


def test_a_digest_depends_on_content_alone() -> None:
    """The order of keys does not matter, a value does."""
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


@pytest.mark.parametrize("text", ["../../etc/passwd", "a/b", "..", "x" * 400, "", "Ä b"])
def test_a_slug_stays_one_name_inside_its_folder(text: str) -> None:
    """No name leaves its folder or breaks the file system."""
    name = slug(text)
    assert name not in ("", ".", "..")
    assert "/" not in name
    assert len(name) <= 80


def test_the_status_is_read_back(tmp_path: Path) -> None:
    """What was written is read; a run that never started has none."""
    run = RunFolder(tmp_path)
    assert run.status() is None
    run.write_status(Status("failed", "why", 1.0, 2.0))
    assert run.status() == Status("failed", "why", 1.0, 2.0)


def test_a_resumed_log_has_each_step_and_parameter_once(tmp_path: Path) -> None:
    """Steps that were recorded before a kill are not recorded again; a torn line is cut off."""
    path = tmp_path / "events.jsonl"
    first = EventLog(path)
    first.params({"lora.r": "4"})
    for step in (1, 2, 3):
        first.metrics({"train/loss": step / 2}, step)
    first.close()
    with path.open("a") as file:
        file.write('{"event": "metric", "key": "train/lo')
    second = EventLog(path)
    second.params({"lora.r": "4"})
    for step in (2, 3, 4):
        second.metrics({"train/loss": step / 2, "train/nan": float("nan")}, step)
    second.close()
    events = list(read_events(path))
    assert [e["step"] for e in events if e["event"] == "metric"] == [1, 2, 3, 4]
    assert [e["key"] for e in events if e["event"] == "param"] == ["lora.r"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_scores_of_another_evaluation_come_behind_the_first(tmp_path: Path) -> None:
    """The same scores are told once, others are told too: the last ones count."""
    for scores in ({"a/acc": 0.5}, {"a/acc": 0.5}, {"a/acc": 0.75, "b/acc": 1.0}, {"a/acc": 0.75}):
        log = EventLog(tmp_path / "events.jsonl")
        log.scores(scores)
        log.close()
    told = [(e["key"], e["value"], e["step"]) for e in read_events(tmp_path / "events.jsonl")]
    assert told == [("a/acc", 0.5, 0), ("a/acc", 0.75, 0), ("b/acc", 1.0, 0)]


def test_two_threads_write_one_file_whole(tmp_path: Path) -> None:
    """Each has a temporary name of its own; the last one to rename wins."""
    path = tmp_path / "file"
    failures: list[Exception] = []

    def write(text: str) -> None:
        try:
            for _ in range(200):
                write_atomic(path, text)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(letter * 5000,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert path.read_text() in ("a" * 5000, "b" * 5000)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_run_is_held_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    """The second process waits; a killed holder's lock is free."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from finetune.tracking.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).claimed():\n    print('held', flush=True)\n"
        "    time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    started = time.monotonic()
    threading.Timer(1, holder.kill).start()
    with RunFolder(tmp_path).claimed():
        assert time.monotonic() - started > 0.5
    holder.wait()
    holder.stdout.close()


NAMES = [
    "Два", "Три", "四", "五", "é", "e", "È", "", "run", "My Sweep", "my-sweep", "my sweep",
    "a/b", "a-b", "x" * 80, "x" * 81, "x" * 82, "x" * 200, "..", ".",
]  # fmt: skip


def test_two_names_never_share_a_folder() -> None:
    """Any script, case and length; a name that is a folder's already stays as it is."""
    names = [distinct_slug(text) for text in NAMES]
    assert len(set(names)) == len(NAMES)
    assert max(map(len, names)) <= 80
    assert [distinct_slug(name) for name in ("my-sweep", "a_b.c", "tiny-demo-0a1b2c3d")] == [
        "my-sweep", "a_b.c", "tiny-demo-0a1b2c3d",
    ]  # fmt: skip


def test_a_metrics_values_are_read_from_the_events(tmp_path: Path) -> None:
    """In the order of their steps, without those of other metrics or damaged lines."""
    run = RunFolder(tmp_path / "run")
    assert run.metric("train/loss") == []
    events = EventLog(run.events)
    events.metrics({"train/loss": 2.0, "train/lr": 0.1}, 1)
    events.metrics({"train/loss": 1.5}, 2)
    events.tag("train/loss", "a tag of the same name")
    events.close()
    with run.events.open("a") as file:
        file.write('{"event": "metric", "key": "train/loss"}\n')
    assert [(loss.step, loss.value) for loss in run.metric("train/loss")] == [(1, 2.0), (2, 1.5)]
