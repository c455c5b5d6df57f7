"""An Arrow cache: tables that are costly to make, by the digest of what they are made from.

A table is written once, under a lock, to a temporary name, and renamed to one that holds the sha256
of its bytes: what is read is what was written, and a table that is not is made anew. Tables are
memory-mapped; the ones used longest ago are evicted where the cache outgrows its bound.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
from filelock import Timeout

from finetune.files import describe_fault, digest, file_digest, remove, temporary_path
from finetune.tracking.claims import CLAIM_FILE, claimed

log = logging.getLogger("finetune")

MOST_BYTES = 8 * 2**30
NAME_LENGTH = 32  # hexadecimal digits of the key's digest
ENDING, WRITING = ".arrow", ".writing"

Batches = Iterator[pyarrow.RecordBatch]


class Unwritable(Exception):
    """The cache cannot be written to; the message says why."""


@dataclass(frozen=True)
class ArrowCache:
    """A folder of tables that all processes of a user share."""

    folder: Path
    most_bytes: int = MOST_BYTES

    def table(
        self, key: Mapping[str, Any], schema: pyarrow.Schema, make: Callable[[], Batches]
    ) -> pyarrow.Table:
        """Return the table of a key, made by the first process that asks for it.

        Args:
            key: a JSON value that stands for all that the table is made from.
            schema: of the table.
            make: yields its batches; what it raises is raised here, and nothing is kept.
        """
        name = digest(key)[:NAME_LENGTH]
        found = self._find(name)
        if found is not None:
            return found
        try:
            with self._locked(name):
                found = self._find(name)  # which another process made meanwhile
                if found is None:
                    self._remove_leftovers(name)
                    path = self._write(name, schema, make)
                    self._evict(path)
                    found = _open(path)
            return found
        except Unwritable as fault:
            log.warning(
                "the cache %s cannot be written to (%s), and the rows are tokenised in memory; "
                "set FINETUNE_CACHE to another folder",
                self.folder, fault,
            )  # fmt: skip
            return pyarrow.Table.from_batches(make(), schema)

    def _find(self, name: str) -> pyarrow.Table | None:
        """Return the table of a name; one that does not hold what was written is removed."""
        for path in self.folder.glob(f"{name}-*{ENDING}"):
            try:
                if file_digest(path) == path.stem.rpartition("-")[2]:
                    os.utime(path)
                    return _open(path)
                fault = "its bytes are not those that were written"
            except FileNotFoundError:  # evicted meanwhile
                continue
            except OSError as error:
                fault = describe_fault(error)
            log.warning("%s is damaged: %s; its rows are tokenised again", path, fault)
            _remove(path)
        return None

    def _locked(self, name: str) -> AbstractContextManager[Any]:
        """Return the acquired lock of a table; log that it waits where another process holds it."""
        try:
            stack = ExitStack()
            stack.enter_context(claimed(self.folder / f"{name}{CLAIM_FILE}", waiting=_tell_waiting))
            return stack
        except OSError as error:
            raise Unwritable(error.strerror or str(error)) from None

    def _write(self, name: str, schema: pyarrow.Schema, make: Callable[[], Batches]) -> Path:
        """Write a table atomically; an error of `make` is raised unchanged."""
        temporary = temporary_path(self.folder / name, WRITING)
        try:
            with _writing():
                file = temporary.open("wb")
                writer = pyarrow.ipc.new_file(file, schema)
            with file:
                for batch in make():
                    with _writing():
                        writer.write_batch(batch)
                with _writing():
                    writer.close()
                    file.flush()
                    os.fsync(file.fileno())
            with _writing():
                path = self.folder / f"{name}-{file_digest(temporary)}{ENDING}"
                os.replace(temporary, path)
        finally:
            _remove(temporary)
        return path

    def _remove_leftovers(self, name: str) -> None:
        """Remove what a process that was killed had begun to write; the caller holds the lock."""
        for path in self.folder.glob(f"*{name}.*{WRITING}"):
            _remove(path)

    def _evict(self, kept: Path) -> None:
        """Remove the tables used longest ago until the others fit, and those half written."""
        sizes = {}
        for path in self.folder.glob(f"*{ENDING}"):
            try:
                state = path.stat()
            except OSError:
                continue
            sizes[path] = (state.st_mtime_ns, state.st_size)
        total = sum(size for _, size in sizes.values())
        for path, (_, size) in sorted(sizes.items(), key=lambda item: item[1]):
            if total > self.most_bytes and path != kept:
                _remove(path)
                total -= size
        for path in self.folder.glob(f"*{WRITING}"):
            name = path.name.lstrip(".").partition(".")[0]
            try:
                with claimed(self.folder / f"{name}{CLAIM_FILE}", wait=False):
                    self._remove_leftovers(name)
            except (Timeout, OSError):
                continue


@contextmanager
def _writing() -> Iterator[None]:
    """Raise an error of the disk as Unwritable, to tell it from one of making a table."""
    try:
        yield
    except OSError as error:
        raise Unwritable(error.strerror or str(error)) from None


def _tell_waiting() -> None:
    log.info("another process tokenises the same rows; waiting for it")


def _open(path: Path) -> pyarrow.Table:
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()


def _remove(path: Path) -> None:
    with suppress(OSError):
        remove(path)
