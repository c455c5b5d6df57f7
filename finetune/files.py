"""Files from disk, written atomically and checked as they are read.

A file is damaged if its content is not what was written: not UTF-8, not JSON, JSON of another
shape, or another digest than the recorded one. The process that holds the lock of the folder
renames a damaged file to NAME.damaged, so that it is written again.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml

log = logging.getLogger("finetune")

LFS_POINTER, LFS_POINTER_BYTES = b"version https://git-lfs", 1024  # the beginning; a bound
ASIDE = ".damaged"  # suffix of a damaged file that is kept
WRITING, REPLACED = ".tmp", ".old"  # suffixes of what is not in place yet, or no longer

# The same values; libyaml, which most builds of PyYAML have, reads ten times as fast.
YAML_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

T = TypeVar("T")
Check = Callable[[], object]  # what it raises prevents a rename


class Damaged(ValueError):
    """A file whose content is not what was written; the message says why, without a path."""


def digest(value: Any) -> str:
    """Return the sha256 (hex) of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(path: Path) -> str:
    """Return a file's sha256, read once per process for as long as size and time stay the same."""
    state = path.stat()
    return _digest_of(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest_of(path: Path, size: int, modified_ns: int) -> str:
    return file_digest(path)


def require_file(path: Path) -> None:
    """Raise OSError where no regular file is, through links: to open a pipe would wait forever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a file", str(path))


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; raises OSError where there is none."""
    require_file(path)
    return path.open("rb")


def read_bytes(path: Path) -> bytes:
    """Return a regular file's bytes; raises OSError where there is none."""
    require_file(path)
    return path.read_bytes()


def keep_regular(path: Path) -> None:
    """Rename a folder, pipe or broken link at a path where a file is to be written."""
    if os.path.lexists(path) and not path.is_file():
        set_aside(path, "it is not a file")


def is_obstructed(folder: Path) -> bool:
    """Return whether a folder's path is something else, such as a file or a loop of links."""
    return os.path.lexists(folder) and not folder.is_dir()


def resolved(path: Path) -> Path:
    """Return a path without its links; pathlib's `resolve` raises on a loop of links."""
    return Path(os.path.realpath(path))


def temporary_path(path: Path, suffix: str = WRITING) -> Path:
    """Return a hidden path beside a file or folder that no process of any host returns again."""
    host = slug(socket.gethostname())[:20]
    return path.with_name(f".{path.name}.{host}-{secrets.token_hex(8)}{suffix}")


def allow() -> None:
    """Allow a rename, where no other process can have taken over."""


def write_atomic(path: Path, text: str, check: Check = allow) -> None:
    """Write a file atomically: temporary name, fsync, check, rename."""
    temporary = temporary_path(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with _put_under(check):
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def _put_under(check: Check) -> Iterator[None]:
    """Check before a rename, and again where the temporary name is gone: somebody removed it."""
    check()
    try:
        yield
    except FileNotFoundError:
        check()
        raise


def read_text(path: Path) -> str | None:
    """Return a file's text; None where there is no such file.

    Raises:
        Damaged: it cannot be read, or is no text.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise Damaged(f"its byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise Damaged(describe_fault(error)) from None


def describe_fault(error: OSError) -> str:
    """Return why a file cannot be read."""
    is_other = error.errno == errno.EINVAL or isinstance(error, IsADirectoryError)
    return "it is not a file" if is_other else f"it cannot be read: {error.strerror}"


def read_json(path: Path, kind: type[T]) -> T | None:
    """Return the JSON value in a file; None where there is no such file.

    Raises:
        Damaged: it is no JSON, or not of this kind.
    """
    text = read_text(path)
    return None if text is None else parse_json(text, kind)


def parse_json(text: str, kind: type[T]) -> T:
    """Return a text's JSON value; raises Damaged where it is not of this kind."""
    if not text.strip():
        raise Damaged("it is empty")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is not JSON: {error}") from None
    return _checked(value, kind)


def read_yaml(path: Path, kind: type[T]) -> T | None:
    """Return the YAML value in a file, interpolations unresolved; None without the file.

    Raises:
        Damaged: it is no YAML, or not of this kind.
    """
    text = read_text(path)
    if text is None:
        return None
    if not text.strip():
        raise Damaged("it is empty")
    try:
        value = yaml.load(text, Loader=YAML_LOADER)  # noqa: S506  # a safe one
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Damaged(f"it is not YAML: {' '.join(str(error).split())}") from None
    return _checked(value, kind)


def _checked(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise Damaged(f"it holds {type(value).__name__}, not {kind.__name__}")
    return value


@dataclass(frozen=True)
class JsonLines:
    """The objects of a JSON Lines file, and the positions of its damaged lines."""

    values: list[dict[str, Any]]
    damaged: list[tuple[int, int]]  # first byte and length, without the line's end


def parse_lines(raw: bytes, is_valid: Callable[[dict[str, Any]], bool]) -> JsonLines:
    """Parse JSON lines; blank lines and an incomplete last line are skipped, not damaged."""
    lines, start = JsonLines([], []), 0
    while (end := raw.find(b"\n", start)) >= 0:
        line = raw[start:end]
        if line.strip():
            try:
                value = json.loads(line.decode())
                if not isinstance(value, dict) or not is_valid(value):
                    raise Damaged("it lacks fields")
                lines.values.append(value)
            except (ValueError, RecursionError):
                lines.damaged.append((start, len(line)))
        start = end + 1
    return lines


def refuse_lfs_pointer(path: Path) -> None:
    """Raise ValueError where a file is a pointer of Git LFS, which a clone without LFS leaves."""
    if path.stat().st_size < LFS_POINTER_BYTES and read_bytes(path).startswith(LFS_POINTER):
        raise ValueError(
            f"{path.name} is a Git LFS pointer, not the file itself; `git lfs pull` in its "
            "repository fetches the file"
        )


def set_aside(path: Path, why: str) -> None:
    """Rename a damaged file or folder to NAME.damaged, replacing an earlier one, and log it."""
    aside = path.with_name(path.name + ASIDE)
    remove(aside)
    os.replace(path, aside)
    log.warning("%s is damaged: %s; kept as %s", path, why, aside.name)


def slug(text: str) -> str:
    """Return `text` as a name for one file or folder: lower case, digits, `-`, `_`, `.` inside."""
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-.")[:80] or "run"


def distinct_slug(text: str) -> str:
    """Return a slug unique to this text: with a digest where the slug drops characters."""
    name = slug(text)
    return name if name == text else f"{name[:71].rstrip('-.')}-{digest(text)[:8]}"


def _open_like(around: Path, folder: Path) -> None:
    """Give a new folder the permissions of the folder around it.

    Temporary folders, and files by safetensors, are made for their owner only.
    """
    rights = stat.S_IMODE(around.stat().st_mode) & 0o2777
    for path in (folder, *folder.rglob("*")):
        path.chmod(rights | 0o700 if path.is_dir() else rights & 0o666 | 0o600)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Replace a folder by another one; the old one is renamed before it is removed.

    On NFS a file that somebody reads outlives its removal, and would keep its folder there. Where
    the new one cannot be renamed (another process has removed it), the old one is put back.
    """
    aside = temporary_path(folder, REPLACED)
    with suppress(FileNotFoundError):
        os.replace(folder, aside)
    try:
        os.replace(temporary, folder)
    except OSError:
        with suppress(OSError):
            os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder: renamed first, so that its name is free even where a file stays.

    On NFS a file that somebody reads stays in its folder as `.nfs*`. A name that begins with a dot
    is a temporary one already.
    """
    aside = folder
    if not folder.name.startswith("."):
        aside = temporary_path(folder, REPLACED)
        try:
            os.replace(folder, aside)
        except OSError:  # it is not there, or another process removes it
            return
    shutil.rmtree(aside, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what is not in place, of a process that was killed or has lost its claim.

    Args:
        folder: where files and folders are written.
        name: of the only one whose temporary ones to remove; none for all.
    """
    begins = f".{glob.escape(name)}." if name else "."
    for suffix in (WRITING, REPLACED):
        for leftover in folder.glob(f"{begins}*{suffix}"):
            with suppress(OSError):
                remove(leftover)


@contextmanager
def replaced(folder: Path, check: Check = allow) -> Iterator[Path]:
    """Yield a temporary folder to fill, which then replaces `folder` atomically after a check."""
    temporary = temporary_path(folder)
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        _open_like(folder.parent, temporary)
        with _put_under(check):
            if is_obstructed(folder):
                set_aside(folder, "it is not a folder")
            put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def folder_size(folder: Path) -> int:
    """Return the bytes of the files in a folder, links not followed; of a file its own."""
    if not folder.is_dir() or folder.is_symlink():
        return folder.lstat().st_size
    sizes = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it was removed meanwhile
                sizes += os.lstat(os.path.join(place, name)).st_size
    return sizes
