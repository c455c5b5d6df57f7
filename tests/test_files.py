"""Files are put in place atomically, between hosts too, and beside files that stay."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.data import arrow_cache
from finetune.files import (
    put_in_place,
    remove_folder,
    remove_leftovers,
    replaced,
    set_aside,
    temporary_path,
    write_atomic,
)
from finetune.tracking.run_folder import RunFolder, Status


class Lost(RuntimeError):
    """Stands for the loss of a claim."""


def lose() -> None:
    raise Lost


def filled(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_text(text, encoding="utf-8")
    return folder


def replace_folder(folder: Path, check: Callable[[], object] = lambda: None) -> None:
    with replaced(folder, check) as temporary:
        (temporary / "weights").write_text("new", encoding="utf-8")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no file named `weights` be removed, as NFS keeps `.nfs*` of one that somebody reads."""
    unlink = os.unlink

    def refuse(path: Any, **settings: Any) -> None:
        if os.path.basename(path) == "weights":
            raise OSError(16, "Device or resource busy")
        unlink(path, **settings)

    monkeypatch.setattr(os, "unlink", refuse)


def test_temporary_names_carry_host_and_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of one number on two hosts write beside each other; a name stays short."""
    names = set()
    for host in ("node1", "node2", "A node " + "x" * 200):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        names |= {temporary_path(tmp_path / "status.json").name for _ in range(2)}
    assert len(names) == 6
    assert all(name.startswith(".status.json.") and len(name) < 60 for name in names)
    assert sum(".node1-" in name for name in names) == 2


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("how", ["remove", "set aside", "replace", "put in place", "cache"])
def test_a_folder_with_a_file_that_stays_is_out_of_the_way(tmp_path: Path, how: str) -> None:
    """Its name is free at once, or holds what was to be there."""
    folder = filled(tmp_path / "adapter", "old")
    if how == "remove":
        remove_folder(folder)
    elif how == "set aside":
        filled(tmp_path / "adapter.damaged", "older")
        set_aside(folder, "it was altered")
        assert (tmp_path / "adapter.damaged" / "weights").read_text(encoding="utf-8") == "old"
    elif how == "replace":
        replace_folder(folder)
    elif how == "put in place":
        put_in_place(filled(tmp_path / ".new", "new"), folder)
    else:
        arrow_cache._remove(folder)
    if how in ("replace", "put in place"):
        assert (folder / "weights").read_text(encoding="utf-8") == "new"
    else:
        assert not folder.exists()
    remove_leftovers(tmp_path)  # what stays is left where it is
    assert all(path.name.startswith((".", "adapter")) for path in tmp_path.iterdir())


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_what_a_check_refuses_is_not_put_in_place(tmp_path: Path, is_folder: bool) -> None:
    """The old content stays, and nothing temporary."""
    path = tmp_path / "adapter"
    if is_folder:
        filled(path, "old")
        with pytest.raises(Lost):
            replace_folder(path, lose)
        path /= "weights"
    else:
        path.write_text("old", encoding="utf-8")
        with pytest.raises(Lost):
            write_atomic(path, "new", lose)
    assert path.read_text(encoding="utf-8") == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_a_removed_temporary_name_replaces_nothing(tmp_path: Path, is_folder: bool) -> None:
    """A successor removes it after the check; the error is then that the claim is lost."""
    path, looks = tmp_path / "adapter", []

    def check() -> None:
        looks.append(1)
        if len(looks) > 1:
            raise Lost
        remove_leftovers(tmp_path)

    if is_folder:
        filled(path, "old")
        with pytest.raises(Lost):
            replace_folder(path, check)
        path /= "weights"
    else:
        path.write_text("old", encoding="utf-8")
        with pytest.raises(Lost):
            write_atomic(path, "new", check)
    assert path.read_text(encoding="utf-8") == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["adapter"]


def test_whoever_claims_a_run_removes_what_is_not_in_place(tmp_path: Path) -> None:
    """Files and folders of a process that was killed or halted; nothing else."""
    run = RunFolder(tmp_path / "run")
    run.evaluation.mkdir(parents=True)
    run.write_status(Status("running"))
    kept = [run.path / "status.json", run.path / ".outcomes", filled(run.adapter, "old")]
    (run.path / ".outcomes").mkdir()
    leftovers = [temporary_path(path) for path in (*kept, run.evaluation / "arc_easy.json")]
    leftovers[0].write_text("{}", encoding="utf-8")
    leftovers[3].write_text("{}", encoding="utf-8")
    filled(leftovers[2], "half")
    with run.claimed():
        assert not any(path.exists() for path in leftovers)
        assert all(path.exists() for path in kept)
    assert not list(run.evaluation.iterdir())
