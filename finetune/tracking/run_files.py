"""Integrity of a run's files: sha256 digests in `digests.json`, and checks of their structure.

A run of an older release has no digests; only the structure of its files is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.files import (
    Check,
    Damaged,
    allow,
    describe_fault,
    digest,
    file_digest,
    parse_lines,
    read_json,
    read_yaml,
    require_file,
    write_atomic,
)
from finetune.tracking.score_files import parse_scores

DIGESTS = "digests.json"
WEIGHTS = ("adapter", "model")  # folders with weights
# Sections of every config.yaml; a truncated one lacks some.
SECTIONS = ("model", "peft", "lora", "optimizer", "data", "training", "evaluation")
ITEMS = ".items.jsonl"  # ends the name of a file of questions' outcomes
LONG_TEXTS = (ITEMS, "tokenizer.json")  # need not be parsed where they have the recorded digest
LARGE_FILE = 64 * 2**20  # bytes; above, a check that is not thorough compares size and time


@dataclass(frozen=True)
class FileEntry:
    """The recorded digest, size and time of a file."""

    sha256: str
    size: int  # bytes
    mtime_ns: int

    @classmethod
    def of(cls, file: Path) -> FileEntry:
        stat = file.stat()
        return cls(file_digest(file), stat.st_size, stat.st_mtime_ns)


def read_entries(folder: Path) -> dict[str, FileEntry]:
    """Return the files of a run's folder as they were recorded, by name; none in older runs.

    Raises:
        Damaged: digests.json itself cannot be used.
    """
    stored = read_json(folder / DIGESTS, dict)
    if stored is None:
        return {}
    if stored.get("sha256") != digest(stored.get("files")):
        raise Damaged("it was altered")
    try:
        return {name: FileEntry(**entry) for name, entry in stored["files"].items()}
    except (AttributeError, TypeError):
        raise Damaged("it holds no digests of files") from None


def find_unproven(folder: Path, weights: Iterable[Path]) -> dict[str, str]:
    """Return the weight files without a recorded digest, and why.

    A run of an older release has no digests at all; its weights are accepted.
    """
    names = [file.relative_to(folder).as_posix() for file in weights]
    try:
        entries = read_entries(folder)
    except Damaged as damage:
        problem = f"{DIGESTS} is damaged ({damage}), so these weights cannot be verified"
        return dict.fromkeys(names, problem)
    if not (folder / DIGESTS).exists():
        return {}
    return {name: f"{DIGESTS} has no record of it" for name in names if name not in entries}


def record(folder: Path, *names: str, check: Check = allow) -> None:
    """Record the digests of files, or of all files in folders, as they are now.

    The first record of a run of an older release includes its weights. What `check` raises leaves
    the record as it was.
    """
    if not (folder / DIGESTS).exists():
        names = (*names, *WEIGHTS)
    files = [file for name in names for file in _files_of(folder / name)]
    kept = {n: e for n, e in _entries_or_none(folder).items() if not _is_within(n, names)}
    found = {file.relative_to(folder).as_posix(): FileEntry.of(file) for file in files}
    _write(folder, {**kept, **found}, check)


def forget(folder: Path, *names: str, check: Check = allow) -> None:
    """Remove files from the record before they are replaced."""
    known = _entries_or_none(folder)
    kept = {name: entry for name, entry in known.items() if not _is_within(name, names)}
    if kept != known:
        _write(folder, kept, check)


def forget_missing(folder: Path, check: Check = allow) -> None:
    """Remove missing files from the record."""
    known = _entries_or_none(folder)
    forget(folder, *(name for name in known if not (folder / name).exists()), check=check)


def _entries_or_none(folder: Path) -> dict[str, FileEntry]:
    try:
        return read_entries(folder)
    except Damaged:
        return {}


def _is_within(name: str, names: Iterable[str]) -> bool:
    return any(name == one or name.startswith(f"{one}/") for one in names)


def _files_of(path: Path) -> list[Path]:
    """Return a file, or the files below a folder, without Markdown pages, which may be edited."""
    if not path.is_dir():
        return [path] if path.exists() else []
    return sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".md")


def _write(folder: Path, entries: Mapping[str, FileEntry], check: Check) -> None:
    files = {name: asdict(entry) for name, entry in sorted(entries.items())}
    text = json.dumps({"sha256": digest(files), "files": files}, indent=1)
    write_atomic(folder / DIGESTS, text + "\n", check)


def find_difference(file: Path, entry: FileEntry, *, thorough: bool = True) -> str | None:
    """Return how a file differs from its record; None where it does not.

    Args:
        file: the file to check.
        entry: its record.
        thorough: False trusts a large file of the recorded size and time.
    """
    try:
        require_file(file)
        stat = file.stat()
        if stat.st_size != entry.size:
            return f"it has {stat.st_size} bytes of {entry.size}"
        if not thorough and stat.st_size > LARGE_FILE and stat.st_mtime_ns == entry.mtime_ns:
            return None
        return None if file_digest(file) == entry.sha256 else "it was altered since it was written"
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return describe_fault(error)


def find_misfit(file: Path, name: str) -> str | None:
    """Return why a file's structure is wrong, whatever its digest; None where it is right."""
    try:
        require_file(file)
        if name.endswith(".safetensors"):
            return _find_safetensors_misfit(file)
        if name.endswith(ITEMS):
            raw = file.read_bytes()
            if not raw.endswith(b"\n"):
                return "its end is missing"
            lines = parse_lines(raw, is_item)
            return f"{len(lines.damaged)} lines are damaged" if lines.damaged else None
        if name == "samples.json":
            return _find_samples_misfit(read_json(file, list) or [])
        if name == "config.yaml":
            return _find_config_misfit(read_yaml(file, dict) or {})
        if name == "overrides.yaml":
            given = read_yaml(file, list) or []
            return None if all(isinstance(one, str) for one in given) else "it holds no overrides"
        if name.endswith(".json"):
            return find_json_misfit(name, read_json(file, dict) or {})
    except Damaged as damage:
        return str(damage)
    except OSError as error:
        return describe_fault(error)
    return None


def _find_config_misfit(settings: Mapping[str, Any]) -> str | None:
    absent = [name for name in SECTIONS if not isinstance(settings.get(name), dict)]
    return f"it lacks {', '.join(absent)}" if absent else None


def find_json_misfit(name: str, value: Mapping[str, Any]) -> str | None:
    """Return how a run's JSON file lacks the structure that its readers rely on.

    Raises:
        Damaged: a file of scores has none.
    """
    if name.startswith("evaluation/") and name.count("/") == 1:
        parse_scores(value)
    if name == "training.json" and not all(_is_plain(one) for one in value.values()):
        return "it holds other values than numbers and texts"
    if name == "environment.json" and not isinstance(value.get("versions", {}), dict):
        return "it holds no versions"
    return None


def is_item(line: Mapping[str, Any]) -> bool:
    """Return whether a line is a question's outcomes; a metric's may be more than a number."""
    sides = [line[side] for side in ("tuned", "base") if side in line]
    named = isinstance(line.get("hash"), str) and isinstance(line.get("prompt"), str)
    return named and all(isinstance(one, dict) for one in sides)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float | str)


def _find_samples_misfit(samples: list[Any]) -> str | None:
    good = all(
        isinstance(one, dict)
        and all(isinstance(one.get(name), str) for name in ("prompt", "base", "tuned"))
        and isinstance(one.get("row", ""), str)  # not in those of release 0.1
        for one in samples
    )
    return None if good else "it holds no samples"


def _find_safetensors_misfit(file: Path) -> str | None:
    """Check that a file's header fits its length, as safetensors lays it out."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size
        if not 0 < length <= size - 8:
            return "it is no safetensors file"
        try:
            header = json.loads(opened.read(length))
            ends = [one["data_offsets"][1] for key, one in header.items() if key != "__metadata__"]
            end = max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header cannot be read"
    return None if size == 8 + length + end else f"it has {size} bytes of {8 + length + end}"
