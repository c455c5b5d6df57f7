"""Atomic checkpoints of a training, verified before they are resumed from.

A checkpoint is written into a temporary folder, with the size and sha256 of each of its files;
synced, renamed, and only then marked as complete. One that does not verify is skipped.

It names the claim under which it was written. A process that was halted until another one took the
run over cannot put one in place: its successor has removed the temporary folder; what it may still
mark complete ranks below the checkpoints of newer claims.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from finetune.files import (
    file_digest,
    put_in_place,
    read_bytes,
    remove_folder,
    temporary_path,
    write_atomic,
)
from finetune.tracking.claims import Claim, ClaimLost

log = logging.getLogger("finetune")

MANIFEST = "manifest.json"
MARKER = "complete"


@dataclass(frozen=True)
class Checkpoint:
    """A training's state after `step` optimizer steps that took `seconds` in all."""

    path: Path
    step: int
    seconds: float


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint as it was written."""

    size: int  # bytes
    sha256: str


def write_checkpoint(
    folder: Path,
    step: int,
    seconds: float,
    fill: Callable[[Path], None],
    *,
    keep: int,
    best: int | None = None,
    claim: Claim | None = None,
) -> None:
    """Write one checkpoint, and drop all but the newest `keep` and the best one.

    A valid checkpoint of this step and claim is left as it is. Those of later steps are removed:
    they do not verify, or training would have resumed from them.

    Args:
        folder: the run's checkpoints.
        step: optimizer steps done.
        seconds: training time so far.
        fill: writes the state's files into a folder.
        keep: how many checkpoints to keep.
        best: the step whose checkpoint holds the best adapter so far, this one or an earlier one.
        claim: under which the run is written; None where nobody else can.

    Raises:
        ClaimLost: another process has taken the run over; it keeps its checkpoints.
        OSError: it cannot be written (disk full, say); the message has path and bytes.
    """
    final = _path(folder, step)
    if find_problem(final) is None and (claim is None or _claim_of(final) == claim.token):
        return
    _check(claim)
    temporary = temporary_path(final)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        manifest = {
            "step": step,
            "seconds": seconds,
            "best": best,
            "claim": None if claim is None else claim.token,
            "files": {name: asdict(entry) for name, entry in _entries(temporary).items()},
        }
        write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        _sync(temporary)
        _check(claim)
        put_in_place(temporary, final)
        _sync_folder(folder)
        write_atomic(final / MARKER, file_digest(final / MANIFEST) + "\n", partial(_check, claim))
    except ClaimLost:
        remove_folder(temporary)
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # the two libraries' own errors
        written = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
        remove_folder(temporary)
        _check(claim)  # a successor removes what is not in place
        free = shutil.disk_usage(folder).free
        why = str(error).splitlines()[0]
        raise OSError(
            f"cannot write the checkpoint {final} after {written} bytes ({why}); "
            f"{free} bytes are free there"
        ) from None
    spared = None if best is None else _path(folder, best)
    for old in _find_superseded(final, keep):
        if old != spared:
            _check(claim)
            remove_folder(old)


def _find_superseded(final: Path, keep: int) -> list[Path]:
    """Return the checkpoints of later steps than one just written, and those beyond `keep`."""
    found = _newest_first(final.parent)
    newest = found.index(final)
    return [*found[:newest], *found[newest + keep :]]


def _check(claim: Claim | None) -> None:
    if claim is not None:
        claim.check()


def find_newest(folder: Path, claims: Sequence[str] = ()) -> Checkpoint | None:
    """Return the newest checkpoint that verifies; name those that do not in the log.

    Args:
        folder: the run's checkpoints.
        claims: under which the run was written, the newest last; a checkpoint of a newer claim
            comes before one of a later step.
    """

    def rank(path: Path) -> int:
        try:
            claim = _claim_of(path)
        except (OSError, ValueError):
            return len(claims)  # it is damaged, which is said first
        return claims.index(claim) if claim in claims else -1

    for path in sorted(_newest_first(folder), key=rank, reverse=True):  # a stable order
        problem = find_problem(path)
        if problem is None:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            return Checkpoint(path, manifest["step"], manifest["seconds"])
        log.warning("skipping the damaged checkpoint %s: %s", path, problem)
    return None


def find_step(folder: Path, step: int) -> Path:
    """Return a step's checkpoint.

    Raises:
        OSError: it is damaged.
    """
    path = _path(folder, step)
    problem = find_problem(path)
    if problem is not None:
        raise OSError(
            f"the adapter of step {step} cannot be loaded: its checkpoint {path} is damaged "
            f"({problem}); start the command again to resume from an intact checkpoint"
        )
    return path


def find_problem(path: Path) -> str | None:
    """Return what is wrong with a checkpoint; None where every byte is as it was written.

    The checkpoint of the best adapter so far must be valid too.
    """
    try:
        if not _is_marked(path):
            return f"{MANIFEST} is not the one that was marked complete"
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            file = path / name
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes of {entry['size']}"
            if file_digest(file) != entry["sha256"]:
                return f"{name} was altered"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error}"
    best = manifest["best"]
    if best is None or best == manifest["step"]:
        return None
    problem = find_problem(_path(path.parent, best))
    return f"the checkpoint of its best step {best}: {problem}" if problem else None


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint that was completed, without verifying its files."""
    for path in _newest_first(folder):
        with suppress(OSError):
            if _is_marked(path):
                return int(path.name.removeprefix("step-"))
    return None


def _claim_of(path: Path) -> str | None:
    """Return the token of the claim under which a checkpoint was written; None for older ones.

    Raises:
        OSError, ValueError: it is damaged.
    """
    manifest = json.loads(read_bytes(path / MANIFEST))
    claim = manifest.get("claim") if isinstance(manifest, dict) else None
    return claim if isinstance(claim, str) else None


def _is_marked(path: Path) -> bool:
    return read_bytes(path / MARKER).strip() == file_digest(path / MANIFEST).encode()


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _entries(folder: Path) -> dict[str, FileEntry]:
    return {
        str(file.relative_to(folder)): FileEntry(file.stat().st_size, file_digest(file))
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _sync(folder: Path) -> None:
    """Flush (fsync) all files of a folder, and their names, to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        else:
            _sync_folder(file)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
