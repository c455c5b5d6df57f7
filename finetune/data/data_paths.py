"""Files that a data path names: a file, a folder, a glob, or a data set saved by `datasets`.

The files of a folder's splits are found as `datasets` finds them on the hub.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from finetune.data.file_formats import find_format, known_endings
from finetune.files import digest, known_digest

SAVED = ("dataset_dict.json", "state.json")  # of DatasetDict and Dataset.save_to_disk
NO_FILE = "the folder holds no data file; rows are read from {}"
CARD = "README.md"  # of a hub data set, which may name the files of its parts


@dataclass(frozen=True)
class LocalData:
    """Where rows are on this machine; `files` are in the order that they are read in."""

    path: Path
    files: list[Path]
    is_saved: bool = False  # by datasets, which reads it
    is_card: bool = False  # described by the card of a hub data set, which `datasets` reads

    @property
    def digest(self) -> str:
        """Return a digest of the content; a single file's does not depend on its place."""
        if len(self.files) == 1 and not (self.is_saved or self.is_card):
            return known_digest(self.files[0])
        return digest([known_digest(file) for file in self.files])


def split_name(split: str) -> str:
    """Return the name in a split such as train[:10%]."""
    return split.partition("[")[0].strip()


def find_local(path: Path, split: str) -> LocalData | None:
    """Find the files of a path; None where there is nothing on this machine.

    Args:
        path: of the setting, resolved.
        split: of a folder that has several.

    Raises:
        ValueError: no file of it is of a format that is read.
    """
    if path.is_file():
        if find_format(path) is None:
            raise ValueError(
                f"its format is not read; rows are read from {known_endings()}, and from folders "
                "of them"
            )
        return LocalData(path, [path])
    if path.is_dir():
        return _find_in_folder(path, split)
    if glob.has_magic(str(path)):
        return _find_by_glob(path)
    return None


def _find_by_glob(path: Path) -> LocalData:
    matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files = [one for one in matches if one.is_file() and find_format(one)]
    if not files:
        raise ValueError(
            f"the glob matches no file to read ({len(matches)} of any kind); rows are read from "
            f"{known_endings()}"
        )
    return LocalData(path, files)


def _find_in_folder(folder: Path, split: str) -> LocalData:
    if any((folder / name).is_file() for name in SAVED):
        return _find_saved(folder, split)
    if _names_files(folder / CARD):
        files = sorted(one for one in folder.rglob("*") if one.is_file() and find_format(one))
        return LocalData(folder, files, is_card=True)
    return LocalData(folder, _find_split_files(folder, split))


def _find_saved(folder: Path, split: str) -> LocalData:
    names = folder / SAVED[0]
    part = folder
    if names.is_file():
        splits = json.loads(names.read_text(encoding="utf-8"))["splits"]
        if split_name(split) not in splits:
            raise ValueError(
                f"data.split is {split}, but the saved data set has {', '.join(splits)}; set "
                "data.split to one of them"
            )
        part = folder / split_name(split)
    files = sorted(part.glob("*.arrow"))
    if not files:
        raise ValueError(f"the saved data set {part} has no .arrow file; save it again")
    return LocalData(part, [*files, part / "state.json"], is_saved=True)


def _names_files(card: Path) -> bool:
    """Return whether the card of a hub data set names the files of its parts."""
    if not card.is_file():
        return False
    from huggingface_hub import DatasetCard

    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return False
    return bool(DatasetCard(text, ignore_metadata_errors=True).data.get("configs"))


def _find_split_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, by their names or their folders'; all of them without any."""
    from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns

    try:
        patterns = {str(name): found for name, found in get_data_patterns(str(folder)).items()}
    except EmptyDatasetError:
        raise ValueError(NO_FILE.format(known_endings())) from None
    if split_name(split) not in patterns:
        raise ValueError(
            f"data.split is {split}, but the files of the folder are of {', '.join(patterns)}; set "
            "data.split to one of them"
        )
    names = DataFilesList.from_patterns(patterns[split_name(split)], base_path=str(folder))
    files = [Path(name) for name in names if find_format(Path(name))]
    kinds = Counter(find_format(file) for file in files)
    if len(kinds) > 1:  # a licence or notes beside the data
        files = [file for file in files if find_format(file) != ".txt"]
    if not files:
        raise ValueError(NO_FILE.format(known_endings()))
    return files
