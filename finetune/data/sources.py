"""Rows of files and hub data sets: found, identified by their content, and read.

A path is a file, a folder, a glob, a data set saved by `datasets`, or a hub id. What a row must
hold is known to its template; which rows are taken is `data`'s matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

from finetune.config.inputs import DataSource
from finetune.config.paths import local_path
from finetune.config.schema import SourceConfig
from finetune.data import data_paths
from finetune.data.data_paths import LocalData
from finetune.data.file_formats import find_format, iterate_file, refuse_unknown_split
from finetune.data.json_rows import Row
from finetune.data.text_lines import DEFAULT_ENCODING
from finetune.files import digest
from finetune.models.hub import cached_folder, hub_commit

__all__ = ["Row", "RowStream", "find_source", "read_file", "read_rows"]


def find_source(key: str, settings: SourceConfig) -> DataSource:
    """Find a data source, and the digest or commit that identifies its content.

    Raises:
        FileNotFoundError: there is no such file or hub data set.
        ValueError: the file's format is not read.
    """
    given = settings.path
    path = local_path(given)
    try:
        local = data_paths.find_local(path, settings.split or "")
    except ValueError as error:
        raise ValueError(f"{key}={given}: {error}") from None
    if local is not None:
        return DataSource(key, str(path), _content_digest(local, settings), settings)
    is_hub_id = given.count("/") == 1 and not given.startswith((".", "/", "~"))
    if find_format(path) is not None or not is_hub_id:
        raise FileNotFoundError(f"{key}={given}: there is no file {path.absolute()}")
    commit = hub_commit(given, settings.revision, repo_type="dataset", key=key)
    return DataSource(key, given, f"hub:{given}@{commit}", settings, commit)


def _content_digest(local: LocalData, settings: SourceConfig) -> str:
    """Return the digest of the rows: of the bytes, and of an encoding other than UTF-8."""
    if settings.encoding in (None, DEFAULT_ENCODING):
        return local.digest
    return digest([local.digest, settings.encoding])


def read_rows(source: DataSource) -> list[Row]:
    """Read all rows.

    Raises:
        ValueError: a malformed line (with its number), or no row at all.
    """
    return list(RowStream(source))


class RowStream(Sequence[Row]):
    """The rows of a source, read anew at each pass and never held: a file may outgrow the memory.

    Iteration raises what `read_rows` does. The length takes a pass, and so does a place.
    """

    def __init__(self, source: DataSource) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Row]:
        is_empty = True
        for row in self._rows():
            is_empty = False
            yield row
        if is_empty:
            split = self.source.settings.split or ""
            part = f" in data.split={split}" if "[" in split else ""
            raise ValueError(f"{self.source} holds no rows{part}")

    def _rows(self) -> Iterator[Row]:
        if self.source.revision is not None:
            return iter(self._loaded)
        split = self.source.settings.split or ""
        return _sliced(self._local_rows, split, str(self.source))

    def _local_rows(self) -> Iterator[Row]:
        """Yield the rows of files; `datasets` reads a folder that it wrote or that has a card."""
        source, local = self.source, self._local
        if local.is_saved or local.is_card:
            yield from self._loaded
            return
        encoding = source.settings.encoding or DEFAULT_ENCODING
        split = data_paths.split_name(source.settings.split or "")
        # A folder's files are those of the split, and rows to validate on have no such setting.
        is_chosen = local.path.is_dir() or source.key == "data.validation_path"
        for file in local.files:
            name = str(source) if len(local.files) == 1 else f"{source}: {file}"
            with _named(name):
                if not is_chosen:
                    refuse_unknown_split(file, encoding=encoding, split=split)
                yield from iterate_file(file, encoding=encoding, split=split)

    @cached_property
    def _local(self) -> LocalData:
        location, split = Path(self.source.location), self.source.settings.split or ""
        local = data_paths.find_local(location, split)
        if local is None:
            raise ValueError(f"{self.source}: there is no file {location.absolute()} any more")
        return local

    @cached_property
    def _loaded(self) -> Any:
        if self.source.revision is not None:
            return _load_hub(self.source)
        if self._local.is_card:
            split = data_paths.split_name(self.source.settings.split or "")
            return _load_dataset(self.source, str(self._local.path), split)
        from datasets import load_from_disk

        return load_from_disk(str(self._local.path))

    @cached_property
    def _length(self) -> int:
        return sum(1 for _ in self)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | Sequence[Row]:
        if isinstance(place, slice):
            start, stop, step = place.start or 0, place.stop, place.step or 1
            if stop is None or min(start, stop) < 0 or step < 0:
                start, stop, step = place.indices(len(self))
            return list(islice(self, start, stop, step))
        wanted = place if place >= 0 else len(self) + place
        for row in islice(self, wanted, None) if wanted >= 0 else ():
            return row
        raise IndexError(f"{self.source} has no row {place}")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the source in the errors of its file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _sliced(read: Callable[[], Iterator[Row]], split: str, name: str) -> Iterator[Row]:
    """Yield the rows of a split such as train[:10%]; of a name without a slice, all rows."""
    if "[" not in split:
        return read()
    from datasets import ReadInstruction

    total = sum(1 for _ in read())
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({data_paths.split_name(split): total})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{name}: data.split={split}: {error}") from None
    return (row for part in parts for row in islice(read(), part.from_, part.to))


def read_file(path: Path, *, name: str) -> list[Row]:
    """Read the rows of a file; `name` begins what its errors say."""
    with _named(name):
        return list(iterate_file(path))


def _load_hub(source: DataSource) -> Any:
    """Load a hub data set; from its files in the hub cache where the hub cannot be reached."""
    split = source.settings.split or ""
    try:
        return _load_dataset(source, source.location, split, revision=source.revision)
    except ConnectionError:
        folder = cached_folder(source.location, source.revision, repo_type="dataset")
        if folder is None:
            raise ValueError(
                f"{source} is in the hub cache without its files, and the hub cannot be reached; "
                "name a local folder or file"
            ) from None
        return _load_dataset(source, str(folder), split)


def _load_dataset(source: DataSource, location: str, split: str, **revision: Any) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(location, source.settings.subset, split=split, **revision)
    except (ValueError, DatasetGenerationError) as error:
        # Such as an unknown split; without the example in code.
        message = " ".join(str(error).partition("\nExample")[0].split())
        remedy = "; set data.subset=NAME" if message.startswith("Config name is missing") else ""
        raise ValueError(f"{source}: {message}{remedy}") from None
