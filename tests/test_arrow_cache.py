"""The Arrow cache: tables are made once, by one process, and read only where they are undamaged."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest

from finetune.data.arrow_cache import ArrowCache

SCHEMA = pyarrow.schema([("n", pyarrow.int64())])


class Maker:
    """Makes a table of numbers, and counts how often."""

    def __init__(self, count: int = 1000) -> None:
        self.count, self.times = count, 0

    def __call__(self) -> Iterator[pyarrow.RecordBatch]:
        self.times += 1
        for start in range(0, self.count, 100):
            yield pyarrow.record_batch([list(range(start, start + 100))], schema=SCHEMA)


def test_a_table_is_made_once_for_its_key(tmp_path: Path) -> None:
    """Another key has another table, and nothing but tables and locks is left."""
    cache, make = ArrowCache(tmp_path / "cache"), Maker()
    tables = [cache.table({"a": 1}, SCHEMA, make) for _ in range(3)]
    assert [table["n"].to_pylist() for table in tables] == [list(range(1000))] * 3
    assert make.times == 1
    cache.table({"a": 2}, SCHEMA, make)
    assert make.times == 2
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".arrow"}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "folder"])
def test_a_damaged_table_is_made_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With one line in the log; what was written is read again, never what is there now."""
    cache, make = ArrowCache(tmp_path), Maker()
    cache.table({}, SCHEMA, make)
    (path,) = tmp_path.glob("*.arrow")
    raw = path.read_bytes()
    changed = {"flip": raw[:500] + bytes([raw[500] ^ 1]) + raw[501:], "cut": raw[:700]}
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(changed.get(damage, b""))
    with caplog.at_level(logging.WARNING, "finetune"):
        table = cache.table({}, SCHEMA, make)
    assert table["n"].to_pylist() == list(range(1000))
    assert make.times == 2
    (said,) = caplog.messages
    assert "is damaged" in said
    cache.table({}, SCHEMA, make)
    assert make.times == 2


def test_the_tables_used_longest_ago_are_evicted(tmp_path: Path) -> None:
    """Beyond the bound; the new one stays, and so does what was used since."""
    one = ArrowCache(tmp_path).table({"n": 0}, SCHEMA, Maker())
    (path,) = tmp_path.glob("*.arrow")
    cache = ArrowCache(tmp_path, most_bytes=int(2.5 * path.stat().st_size))
    makers = {number: Maker() for number in range(3)}
    for number in (0, 1, 0, 2):
        cache.table({"n": number}, SCHEMA, makers[number])
        time.sleep(0.01)
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    assert one["n"].to_pylist() == list(range(1000))  # also where it were evicted
    for number in (0, 2, 1):
        cache.table({"n": number}, SCHEMA, makers[number])
    assert {number: make.times for number, make in makers.items()} == {0: 0, 1: 2, 2: 1}


def test_what_making_a_table_raises_leaves_nothing(tmp_path: Path) -> None:
    """Such as a malformed line, which is told as it is."""

    def make() -> Iterator[pyarrow.RecordBatch]:
        yield from Maker()()
        raise OSError("line 7 is malformed")

    with pytest.raises(OSError, match="line 7"):
        ArrowCache(tmp_path).table({}, SCHEMA, make)
    assert list(tmp_path.iterdir()) == []


def test_without_a_writable_folder_the_table_is_made_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache is never the reason that a run fails; the remedy is said."""
    (tmp_path / "file").write_text("no folder")
    table = ArrowCache(tmp_path / "file").table({}, SCHEMA, Maker())
    assert table["n"].to_pylist() == list(range(1000))
    assert "set FINETUNE_CACHE" in caplog.text


SLOW = """
import sys, time, pyarrow
from pathlib import Path
from finetune.data.arrow_cache import ArrowCache
SCHEMA = pyarrow.schema([("n", pyarrow.int64())])
def make():
    with open(sys.argv[2], "a") as file:
        file.write("made\\n")
    for n in range(10):
        time.sleep(float(sys.argv[3]))
        yield pyarrow.record_batch([[n]], schema=SCHEMA)
print(ArrowCache(Path(sys.argv[1])).table({}, SCHEMA, make)["n"].to_pylist())
"""


def start(folder: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(folder / "cache"), str(folder / "made"), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_makes_the_table(tmp_path: Path) -> None:
    """The other one waits, and reads it."""
    both = [start(tmp_path, 0.05), start(tmp_path, 0.05)]
    assert [one.communicate(timeout=60)[0].strip() for one in both] == [str(list(range(10)))] * 2
    assert (tmp_path / "made").read_text() == "made\n"


def test_a_process_killed_while_it_writes_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The next one makes the table, and removes what was begun."""
    killed = start(tmp_path, 0.2)
    while not list((tmp_path / "cache").glob("*.writing")):
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    cache = ArrowCache(tmp_path / "cache")
    assert not list(cache.folder.glob("*.arrow"))
    make = Maker()
    assert cache.table({}, SCHEMA, make)["n"].to_pylist() == list(range(1000))
    assert make.times == 1
    assert not list(cache.folder.glob("*.writing"))
