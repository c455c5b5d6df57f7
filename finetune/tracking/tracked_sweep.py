"""Find the sweep to show in MLflow, its store, and the addresses of its pages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from finetune.config.schema import TrackingConfig
from finetune.config.store_address import (
    URI_VARIABLE,
    find_address,
    is_server,
    masked,
    needs_typing,
    reveal,
    sqlite_file,
    without_secrets,
)
from finetune.files import Damaged
from finetune.problems import Refused
from finetune.tracking.mirror import Mirror

MIRROR = "mlflow.json"
TRAINING = "workflowType=machine_learning"  # the pages of a model's training, not of prompts


@dataclass(frozen=True)
class TrackedSweep:
    """A store, and the sweep of it to show, if it has one."""

    uri: str  # secrets masked
    mirror: Mirror | None

    def pages(self) -> dict[str, str]:
        """Return the addresses below the UI's root of the sweep's charts and its run, by name."""
        if self.mirror is None or self.mirror.experiment_id is None:
            return {"experiments": "#/experiments"}
        experiment = f"#/experiments/{quote(self.mirror.experiment_id, safe='')}"
        runs = f"{experiment}/runs?{TRAINING}"
        found = {"charts": self.mirror.view or runs}
        if self.mirror.run_id is not None:
            found["sweep"] = f"{experiment}/runs/{quote(self.mirror.run_id, safe='')}?{TRAINING}"
        return found


def find_tracked(
    name: str, reports: Path, environment: Mapping[str, str] = os.environ
) -> TrackedSweep:
    """Return the sweep of this name, or the last one in the store in force, with its store.

    MLFLOW_TRACKING_URI sets the store; without it the last sweep's is in force.

    Raises:
        Refused: there is no such sweep, its file is damaged, or the store cannot be served.
    """
    typed = environment.get(URI_VARIABLE)
    if name:
        mirror: Mirror | None = _load_named(name, reports)
    else:
        address = find_address(TrackingConfig(), environment).uri
        known = (one for one in _newest_first(reports) if not typed or one.uri == address)
        mirror = next(known, None)
    if mirror is None and not typed:
        raise Refused(
            [
                f"no sweep in {reports} is tracked by MLflow; start one, or set {URI_VARIABLE} to "
                "the store to show"
            ]
        )
    uri = mirror.uri if mirror is not None else address
    if problem := _find_problem(uri, environment):
        raise Refused([without_secrets(problem)])
    return TrackedSweep(uri, mirror)


def _load_named(name: str, reports: Path) -> Mirror:
    """Read the mirror of a sweep, by its folder's path or name."""
    for folder in (Path(name), reports / name):
        if (folder / MIRROR).is_file():
            try:
                return Mirror.load(folder / MIRROR)
            except Damaged as damage:
                raise Refused(
                    [
                        f"{folder / MIRROR} is damaged: {damage}; the sweep's command recreates it "
                        "and sends all events"
                    ]
                ) from None
    raise Refused([f"no sweep {name} is tracked by MLflow: {reports / name / MIRROR} is missing"])


def _newest_first(reports: Path) -> Iterator[Mirror]:
    """Yield the mirrors of all sweeps, the one that was written last first."""
    for path in sorted(reports.glob(f"*/{MIRROR}"), key=_written, reverse=True):
        try:
            yield Mirror.load(path)
        except (Damaged, OSError):  # its sweep's command says so
            continue


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _find_problem(uri: str, environment: Mapping[str, str]) -> str | None:
    """Return why a store cannot be shown, with the remedy."""
    if is_server(uri):
        return None
    file = sqlite_file(uri)
    if file is not None and not file.is_file():
        return f"{uri}: {file} is missing; repeat the command of the sweep to send its runs again"
    if file is None and needs_typing(uri, environment):
        return f"the store {masked(uri)} is served only if {URI_VARIABLE} is set to it"
    try:
        reveal(uri, environment)
    except ValueError as error:
        return str(error)
    return None
