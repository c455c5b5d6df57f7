"""Home directory, user name, cache folder and write access, any of which may be missing.

A container's user may have no name and no home, and files on a shared disk may belong to others.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from finetune.problems import Refused

ROOM_BYTES = 2**16  # free space that a folder must have
CACHE_PARTS = {
    "models": "model",
    "tokens": "tokenised rows",
    "evaluations": "base scores",
    "speeds": "speeds",
    "finished": "records of finished jobs",
    "javascript": "code of charts",
}
WORKER = "FINETUNE_WORKER"  # environment variable: the name of one of several workers


def cache_dir() -> Path:
    """Return the cache that all runs of a user share: FINETUNE_CACHE, or ~/.cache/finetune.

    Raises:
        Refused: neither FINETUNE_CACHE nor a home directory is set.
    """
    try:
        if "FINETUNE_CACHE" in os.environ:
            return Path(os.environ["FINETUNE_CACHE"]).expanduser().resolve()
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "finetune"
    except RuntimeError:
        raise Refused(
            ["HOME is not set, and the user has no home; set HOME, or FINETUNE_CACHE to a folder"]
        ) from None


def complete_environment() -> None:
    """Set USER and HOME for the libraries where the system has neither.

    Without HOME they would make a folder named `~`; HOME is then the folder of our cache.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # as Python's version has it
        os.environ["USER"] = f"uid-{os.getuid()}"
    if os.path.expanduser("~") == "~" and "FINETUNE_CACHE" in os.environ:
        os.environ["HOME"] = os.path.abspath(os.environ["FINETUNE_CACHE"])


def find_folder_problem(name: str, folder: Path, remedy: str) -> str | None:
    """Return why a folder cannot be written to, or made where it is missing; None if it can."""
    try:
        there = next(path for path in _upwards(folder) if os.path.lexists(path))
        there.mkdir(exist_ok=True)  # raises where it is a file or a broken link
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(ROOM_BYTES))  # a full disk still makes empty files
    except OSError as error:
        return f"{name} cannot be written to ({error.strerror}); {remedy}"
    return None


def _upwards(folder: Path) -> tuple[Path, ...]:
    """Return a folder and all that it is in."""
    absolute = Path(os.path.abspath(folder))
    return (absolute, *absolute.parents)


def find_cache_problem() -> str | None:
    """Return why the cache of base scores and converted models cannot be written to."""
    try:
        folder = cache_dir()
    except Refused as refused:
        return refused.problems[0]
    remedy = "set FINETUNE_CACHE to another folder"
    problem = find_folder_problem(f"the cache {folder}", folder, remedy)
    closed = [name for name in CACHE_PARTS if _is_closed(folder / name)]
    if problem is None and closed:
        part = folder / closed[0]
        return f"the cache {part} cannot be written to (owner: {_owner(part)}); {remedy}"
    return problem


def find_foreign_problem(runs: Iterable[Path]) -> str | None:
    """Return which run folders this user cannot write to, with their owner and the remedy."""
    closed = [run for run in runs if _is_closed(run) or _is_closed(run / "events.jsonl")]
    if not closed:
        return None
    more = f" and {len(closed) - 1} more" if len(closed) > 1 else ""
    return (
        f"{closed[0]}{more} cannot be written to (owner: {_owner(closed[0])}); set "
        f"output_dir to another folder, or let the owner run chmod -R g+w {closed[0].parent}"
    )


def _is_closed(path: Path) -> bool:
    return path.exists() and not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0))


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:
        return f"user {path.stat().st_uid}"
