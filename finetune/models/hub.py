"""The Hugging Face hub: whether it can be reached, a repository's commit, the offline cache.

It is asked once in a process; each library would otherwise retry several times for every job.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from finetune.models.compatibility import HTTPError, InvalidURL

FIRST_ANSWER_SECONDS = 3.0
TIMEOUT_SECONDS = 10.0
FIRST_SERVER_FAULT = 500  # of HTTP statuses; a proxy answers so for a hub that it cannot reach


@lru_cache(maxsize=1)
def is_reached() -> bool:
    """Check once in a process that the hub answers; if not, continue as with HF_HUB_OFFLINE=1."""
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=FIRST_ANSWER_SECONDS)
        found = int(answer.status_code) < FIRST_SERVER_FAULT
    except (HTTPError, InvalidURL, OfflineModeIsEnabled):
        found = False
    if not found:
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
    return found


def hub_commit(path: str, revision: str | None, *, repo_type: str, key: str) -> str:
    """Return the commit of a hub repository, from the hub or else from the local hub cache.

    Raises:
        FileNotFoundError: neither has it, or the hub refuses it.
    """
    if not is_reached():
        return _cached_commit(path, revision, repo_type=repo_type, key=key)
    try:
        return _ask_commit(path, revision, repo_type)
    except GatedRepoError:
        raise FileNotFoundError(
            f"{key}={path}: the hub asks for a licence to be accepted first; do so on its page "
            "and set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{key}={path} is neither a local folder nor on the hub{at}; for a private repository "
            "set HF_TOKEN"
        ) from None
    except (HTTPError, OfflineModeIsEnabled):
        return _cached_commit(path, revision, repo_type=repo_type, key=key)


@lru_cache(maxsize=256)
def _ask_commit(path: str, revision: str | None, repo_type: str) -> str:
    """Ask the hub once in a process, so that all jobs of a plan are at one commit."""
    info = HfApi().repo_info(path, revision=revision, repo_type=repo_type, timeout=TIMEOUT_SECONDS)
    assert info.sha is not None
    return str(info.sha)


def cached_folder(path: str, revision: str | None, *, repo_type: str) -> Path | None:
    """Return the folder of the hub cache that holds a repository's files at a commit, if any."""
    try:
        folder = snapshot_download(
            path, revision=revision, repo_type=repo_type, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def _cached_commit(path: str, revision: str | None, *, repo_type: str, key: str) -> str:
    folder = cached_folder(path, revision, repo_type=repo_type)
    if folder is None:
        raise FileNotFoundError(
            f"{key}={path} is not on this machine: there is no such folder, the hub cache "
            f"{constants.HF_HUB_CACHE} does not hold it, and the hub cannot be reached (see "
            "HF_ENDPOINT, HF_HUB_OFFLINE); name a local folder or file"
        )
    return folder.name
