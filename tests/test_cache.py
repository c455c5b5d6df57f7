"""`finetune.cache` shows what the cache has, and removes parts of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from finetune import cache
from finetune.home import CACHE_PARTS
from finetune.tracking.claims import claimed

FILES = {
    "models/tiny-0123/model.safetensors": 3000,
    "models/large-4567/model.safetensors": 5_000_000,
    "models/large-4567.claim.old": 0,
    "tokens/aa.arrow": 200,
    "tokens/.aa.host-1.tmp": 100,
    "evaluations/task-1.json": 50,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, size in FILES.items():
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cache", *arguments])
    try:
        cache.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_cache_is_shown_with_sizes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each model, and the other parts; what killed processes left counts too."""
    assert call(monkeypatch) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines[1:-1]] == [
        ["models/large-4567", "5", "MB"],
        ["models/tiny-0123", "3", "kB"],
        ["tokens", "300", "B"],
        ["evaluations", "50", "B"],
    ]
    assert " ".join(lines[-1]) == f"5 MB in {folder}"


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["tokens"], 4),
        (["models/tiny-0123", "evaluations"], 4),
        (["models"], 3),
        (["models/large-4567"], 4),
        (["all"], 0),
        (["javascript"], 6),
    ],
)
def test_parts_are_removed(
    folder: Path, names: list[str], left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what belongs to them, and nothing else; one that is not there is no fault."""
    assert call(monkeypatch, "--remove", *names, "--yes") == 0
    assert len(files(folder)) == left


def test_nothing_is_removed_without_a_yes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that is not known, and one that a process writes, are refused; no is the default."""
    assert call(monkeypatch, "--remove", "all") == 2
    assert call(monkeypatch, "--remove", "token", "--yes") == 2
    with claimed(folder / "tokens" / "aa.claim"):
        assert call(monkeypatch, "--remove", "all", "--yes") == 2
    err = capsys.readouterr().err
    assert "add --yes" in err
    assert "did you mean 'tokens'?" in err
    assert "is writing to the cache" in err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "")
    assert call(monkeypatch, "--remove", "all") == 0
    assert files(folder) == set(FILES)


def test_an_empty_cache_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is not made."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "none"))
    assert call(monkeypatch) == 0
    assert "is empty" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_every_part_that_is_written_is_listed() -> None:
    """A cache folder that the command does not know could never be removed by it."""
    package = Path(cache.__file__).parent
    texts = [p.read_text(encoding="utf-8") for p in package.rglob("*.py")]
    used = {
        line.split('cache_dir() / "')[1].split('"')[0]
        for text in texts
        for line in text.splitlines()
        if 'cache_dir() / "' in line
    }
    assert used <= set(CACHE_PARTS)
    assert {"models", "tokens", "finished"} <= set(CACHE_PARTS)
