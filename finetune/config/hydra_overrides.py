"""Allow-list of Hydra's own keys: none that runs code or sets environment variables."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from hydra.core.override_parser.types import Override, QuotedString

from finetune.config.foreign_values import find_grid_problems, is_option
from finetune.config.grammar import find_override
from finetune.config.hydra_launchers import find_launcher_problem

KEYS = (
    "hydra.mode", "hydra.verbose", "hydra.searchpath", "hydra.sweep.dir", "hydra.sweep.subdir",
    "hydra.job.name",
)  # fmt: skip
# Hydra would make folders that stay empty, or change into them; each with what to set instead.
FOLDERS = {
    "hydra.run.dir": "set output_dir=FOLDER",
    "hydra.output_subdir": "config.yaml is in the run's folder",
    "hydra.job.chdir": "change into the folder before the command",
}
LOGGING = ("default", "disabled", "none", "stdout")  # what Hydra brings along
GROUPS: Mapping[str, tuple[str, ...]] = {
    "hydra/sweeper": ("finetune",),
    "hydra/job_logging": LOGGING,
    "hydra/hydra_logging": LOGGING,
}
GRID = "hydra.sweeper.params"
MODES = ("RUN", "MULTIRUN")
SEARCHPATH = "hydra.searchpath"
KNOWN = f"{', '.join([*KEYS, *GROUPS])} and {GRID}"


def is_hydra(override: Override) -> bool:
    """Return whether an override changes Hydra's own config."""
    return override.key_or_group.replace("/", ".").partition(".")[0] == "hydra"


def find_hydra_problems(override: Override) -> Iterator[str]:
    """Yield why an override may not be typed: of Hydra's own config, or into another package."""
    typed, key = override.input_line, override.key_or_group
    if override.package is not None:
        yield f"{typed}: an option cannot be moved into another package; leave out @..."
    elif not is_hydra(override):
        return
    elif override.is_delete():
        yield f"{typed}: deletes a part of Hydra's config; leave it out"
    elif (problem := find_launcher_problem(key, override._value)) is not None:
        yield f"{typed}: {problem}"
    elif key in GROUPS:
        yield from _problems_of_group(override)
    elif key == SEARCHPATH:
        yield from _problems_of_searchpath(override)
    elif key == GRID or key.startswith(f"{GRID}."):
        yield from _problems_of_grid(override)
    elif key in FOLDERS:
        yield f"{typed}: a run's folder is named by its identity; {FOLDERS[key]}"
    elif key not in KEYS:
        yield (
            f"{typed}: {key} can run code or change the process's environment; of Hydra's own "
            f"settings these can be typed: {KNOWN}"
        )
    elif key == "hydra.mode" and str(override.value()) not in MODES:
        yield f"{typed}: hydra.mode is RUN or MULTIRUN; write hydra.mode=MULTIRUN for a sweep"
    elif isinstance(override._value, Mapping):
        yield f"{typed}: {key} is a single value"


def _problems_of_group(override: Override) -> Iterator[str]:
    known = GROUPS[override.key_or_group]
    if str(override._value) not in known:
        yield f"{override.input_line}: {override.key_or_group} is one of {', '.join(known)}"


def _problems_of_grid(override: Override) -> Iterator[str]:
    below = override.key_or_group.removeprefix(GRID).removeprefix(".")
    value = override._value
    lines = {below: value} if below else value
    if not isinstance(lines, Mapping):
        yield f"{override.input_line}: {GRID} is a mapping of settings to values"
        return
    for key, values in lines.items():
        plain = values.text if isinstance(values, QuotedString) else values
        yield from (f"{GRID}: {problem}" for problem in find_grid_problems(key, plain))


def _problems_of_searchpath(override: Override) -> Iterator[str]:
    typed = override.input_line
    for place in _places(override):
        if "${" in place or ("://" in place and not place.startswith(("file://", "pkg://"))):
            yield f"{typed}: {place} is not a folder; name it as it is, or as file://FOLDER"
        elif place.startswith("pkg://"):
            name = place.removeprefix("pkg://").replace("/", ".").partition(".")[0]
            if not is_installed(name):
                yield f"{typed}: the package {name} is not installed; name its folder instead"
        elif not Path(place.removeprefix("file://")).is_dir():
            yield f"{typed}: there is no folder {place}"


def is_installed(package: str) -> bool:
    """Return whether a package is in site-packages, without importing it."""
    places = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    places |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    return is_option(package) and PathFinder.find_spec(package, sorted(places)) is not None


def searched_folders(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the folders of `hydra.searchpath`; packages are installed, and trusted as such."""
    for argument in arguments:
        override = find_override(argument)
        if override is not None and override.key_or_group == SEARCHPATH:
            for place in _places(override):
                if not place.startswith("pkg://"):
                    yield Path(place.removeprefix("file://"))


def _places(override: Override) -> list[str]:
    value = override._value
    places = value if isinstance(value, list) else [value]
    return [place.text if isinstance(place, QuotedString) else str(place) for place in places]
