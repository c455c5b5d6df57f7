"""Send a folder as an artifact; on a file system of the run's, its weights are not stored twice.

A weight file of a run is written under another name, renamed, and never changed, so a hard link is
as good as a copy: it outlives the removal of the run's folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from finetune.files import temporary_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

LINKED = (".safetensors",)  # the ends of the names of files that are linked


def send_folder(client: MlflowClient, run_id: str, local: Path, target: str) -> None:
    """Send a folder's files as artifacts below `target`, weights as links where possible."""
    place = _local_place(client, run_id)
    linked = {path for path in local.rglob("*") if place is not None and _is_linked(path)}
    for path in linked.copy():
        assert place is not None
        if not _link(path, place / target / path.relative_to(local)):
            linked.discard(path)
    if not linked:
        client.log_artifacts(run_id, str(local), target)
        return
    for path in sorted(path for path in local.rglob("*") if path.is_file() and path not in linked):
        below = path.relative_to(local).parent
        client.log_artifact(run_id, str(path), (Path(target) / below).as_posix())


def _local_place(client: MlflowClient, run_id: str) -> Path | None:
    """Return the folder of a run's artifacts; None where they are not files of this machine."""
    parts = urlsplit(str(client.get_run(run_id).info.artifact_uri))
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        return None
    return Path(url2pathname(parts.path))


def _is_linked(path: Path) -> bool:
    return path.suffix in LINKED and path.is_file() and not path.is_symlink()


def _link(source: Path, target: Path) -> bool:
    """Put a hard link in place, atomically; return whether the file systems allow it."""
    try:
        if target.exists() and target.samefile(source):
            return True  # a rename over a link to the same file would leave both names
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(target)
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        return False
    return True
