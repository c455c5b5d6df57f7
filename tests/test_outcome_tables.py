"""Outcomes as arrays: what the lines say, read once, and made anew where the lines are others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.reporting.outcome_tables import read_table, read_tables
from finetune.tracking.run_folder import RunFolder

LINES: list[dict[str, Any]] = [
    {"hash": "a", "prompt": "p", "task": "one", "base": {"acc": 1.0}, "tuned": {"acc": 0.0}},
    {"hash": "a", "prompt": "p", "task": "two", "base": {"acc": 0.1}, "tuned": {"mcc": [1, "ä"]}},
    {"hash": "b", "prompt": "p", "base": {"acc": 0.0, "n": 2}, "tuned": {"acc": float("nan")}},
    {"hash": "b", "prompt": "p", "tuned": {"acc": 1.0, "mcc": [0, "ö"]}},
]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return write(RunFolder(tmp_path / "run"), LINES)


def write(run: RunFolder, lines: list[dict[str, Any]]) -> RunFolder:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    run.write_text("evaluation/task.items.jsonl", text)
    return run


def forbid_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        pytest.fail("the lines are read")

    monkeypatch.setattr(RunFolder, "read_items", fail)
    monkeypatch.setattr("finetune.tracking.run_files.parse_lines", fail)


def test_arrays_hold_what_the_lines_say(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, pairs, missing outcomes, and a question that is asked twice; also read again."""
    first = read_table(run, "task")
    forbid_lines(monkeypatch)
    for table in (first, read_table(run, "task")):
        assert table.questions == ["a:p:one", "a:p:two", "b:p", "b:p'"]
        assert table.members == {"a:p:one": "one", "a:p:two": "two"}
        assert table.outcomes("base", "acc") == {"a:p:one": 1.0, "a:p:two": 0.1, "b:p": 0.0}
        tuned = table.outcomes("tuned", "acc")
        assert (tuned["a:p:one"], tuned["b:p'"], len(tuned)) == (0.0, 1.0, 3)
        assert np.isnan(tuned["b:p"])
        assert table.outcomes("tuned", "mcc") == {"a:p:two": [1, "ä"], "b:p'": [0, "ö"]}
        assert table.outcomes("base", "n") == {"b:p": 2}
        assert table.outcomes("base", "mcc") == table.outcomes("other", "acc") == {}


def test_other_lines_are_read_anew(run: RunFolder) -> None:
    """Also where size and time stay the same: the arrays name the digest of the file."""
    assert read_table(run, "task").outcomes("base", "acc")["a:p:one"] == 1.0
    write(run, [{**LINES[0], "base": {"acc": 0.5}}])
    assert read_table(run, "task").outcomes("base", "acc") == {"a:p:one": 0.5}


def test_damaged_arrays_are_made_anew(run: RunFolder) -> None:
    """Cut short, of another shape or no arrays at all."""
    before = read_table(run, "task")
    kept = run.path / ".outcomes" / "task.npz"
    whole = kept.read_bytes()
    middle = len(whole) // 2
    altered = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (b"", whole[:200], altered, b"text"):
        kept.write_bytes(content)
        table = read_table(run, "task")
        assert table.questions == before.questions
        assert np.array_equal(table.numbers, before.numbers, equal_nan=True)
        assert kept.read_bytes() != content


def test_damaged_lines_are_no_outcomes(run: RunFolder) -> None:
    """Whatever the arrays say that were made of the file before."""
    read_table(run, "task")
    path = run.evaluation / "task.items.jsonl"
    path.write_bytes(path.read_bytes().replace(b"1.0", b"0.0"))
    assert read_table(run, "task").questions == []
    path.unlink()
    assert read_table(run, "task").questions == []


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be another user's."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr("numpy.savez", refuse)
    assert len(read_table(run, "task").questions) == 4
    assert list((run.path / ".outcomes").iterdir()) == []


def test_runs_with_equal_questions_share_their_names(run: RunFolder, tmp_path: Path) -> None:
    """Of a grid on 14,000 questions they stand in memory once."""
    other = write(RunFolder(tmp_path / "other"), [*LINES[:3], {**LINES[3], "tuned": {"acc": 0.0}}])
    third = write(RunFolder(tmp_path / "third"), LINES[:2])
    read_tables([run, other, third], "task")
    one, two, three = read_tables([run, other, third], "task").values()
    assert one.questions is two.questions
    assert len(three.questions) == 2
    assert two.outcomes("tuned", "acc")["b:p'"] == 0.0
