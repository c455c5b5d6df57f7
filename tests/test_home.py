"""What a machine may lack: git, a home, a user name, room, rights to what others have made."""

from __future__ import annotations

import errno
import getpass
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from filelock import SoftFileLease

from finetune import home, report, sync
from finetune.config.schema import Config, ModelConfig
from finetune.evaluation import forecast
from finetune.files import replaced
from finetune.home import cache_dir
from finetune.models import base_model
from finetune.pipeline import identity
from finetune.problems import Refused
from finetune.sweeps.run_sweep import _claimed_folder, _folder_problems
from finetune.tracking.run_folder import RunFolder


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away a user's entry in the password file and all that names a user."""

    def not_found(_: object) -> NoReturn:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", not_found)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "FINETUNE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def no_program(*_: object, **__: object) -> NoReturn:
    raise FileNotFoundError("git")


def no_right(*_: object, **__: object) -> NoReturn:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def refusing(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], 128, "", "fatal: detected dubious ownership")


@pytest.mark.parametrize("git", [no_program, no_right, refusing], ids=lambda git: git.__name__)
def test_an_environment_is_described_without_git(
    monkeypatch: pytest.MonkeyPatch, git: Callable[..., Any]
) -> None:
    """The commit is unknown then, and all else is told."""
    monkeypatch.setattr(subprocess, "run", git)
    described = identity.describe_environment("cpu")
    assert described["git_commit"] is None
    assert described["versions"]["torch"]


@pytest.mark.parametrize("worker", ["GPU 0", None])
def test_an_environment_names_host_and_worker(
    monkeypatch: pytest.MonkeyPatch, worker: str | None
) -> None:
    """The worker is named by the sweep; a process of another kind has none."""
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    monkeypatch.delenv("FINETUNE_WORKER", raising=False)
    if worker is not None:
        monkeypatch.setenv("FINETUNE_WORKER", worker)
    described = identity.describe_environment("cpu")
    assert (described["host"], described["worker"]) == ("node7", worker)


def test_a_user_without_name_or_home_gets_both(
    nameless: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a container's uid: the libraries find a name, and a home beside the cache."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    home.complete_environment()
    assert getpass.getuser() == f"uid-{os.getuid()}"
    assert Path.home() == tmp_path
    assert home.find_cache_problem() is None


def test_a_folder_is_checked_and_not_made(tmp_path: Path) -> None:
    """A dry run, and a command that is refused, leave nothing behind."""
    config = Config(output_dir=str(tmp_path / "a" / "b"), report_dir=str(tmp_path / "c"))
    assert _folder_problems(config) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "c").symlink_to(tmp_path / "nothing")
    (problem,) = _folder_problems(config)
    assert problem.startswith(f"report_dir={tmp_path / 'c'} cannot be written to")


def test_without_a_place_for_the_cache_the_remedy_is_said(nameless: None) -> None:
    """Neither HOME nor FINETUNE_CACHE."""
    home.complete_environment()
    problem = home.find_cache_problem()
    assert problem is not None
    assert "set HOME, or FINETUNE_CACHE" in problem
    with pytest.raises(Refused):
        cache_dir()


def test_what_a_user_has_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is changed on an ordinary machine."""
    monkeypatch.setenv("USER", "someone")
    monkeypatch.delenv("LOGNAME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    home.complete_environment()
    assert (os.environ["USER"], os.environ["HOME"]) == ("someone", "/home/someone")


class Full:
    """Stands for a file on a full disk, which can be made and not be filled."""

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, _: bytes) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", ["a file in its way", "a full disk"])
@pytest.mark.parametrize("place", ["cache", "output_dir", "report_dir"])
def test_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    """One line with the key to change, before anything is started."""
    config = Config(output_dir=str(tmp_path / "o"), report_dir=str(tmp_path / "r"))
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "folder" if kind == "a file in its way" else tmp_path / "folder"
    if place == "cache":
        monkeypatch.setenv("FINETUNE_CACHE", str(folder))
    else:
        setattr(config, place, str(folder))
    if kind == "a full disk":
        folder.mkdir()
        real = tempfile.TemporaryFile
        monkeypatch.setattr(
            tempfile, "TemporaryFile", lambda dir: Full() if dir == folder else real(dir=dir)
        )
    found = [*_folder_problems(config), home.find_cache_problem()]
    (problem,) = (one for one in found if one is not None)
    assert str(folder) in problem
    assert "cannot be written to" in problem
    assert ("set FINETUNE_CACHE" if place == "cache" else f"{place}=") in problem


def test_another_users_runs_are_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose they are, how many, and what to do is one line."""
    runs = [RunFolder(tmp_path / name) for name in ("mine", "theirs", "theirs-too")]
    for run in runs[:2]:
        run.path.mkdir()
    runs[2].path.mkdir()
    runs[2].events.touch()
    closed = {runs[1].path, runs[2].events}
    monkeypatch.setattr(os, "access", lambda path, _: path not in closed)
    problem = home.find_foreign_problem([run.path for run in [*runs, RunFolder(tmp_path / "new")]])
    assert problem is not None
    assert f"{runs[1].path} and 1 more cannot be written to" in problem
    assert "set output_dir" in problem
    assert home.find_foreign_problem([runs[0].path]) is None


def test_a_closed_part_of_the_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared cache whose folder of scores is another user's."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    (tmp_path / "evaluations").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "evaluations")
    problem = home.find_cache_problem()
    assert problem is not None
    assert f"{tmp_path / 'evaluations'} cannot be written to" in problem


@pytest.mark.parametrize(("rights", "file"), [(0o755, 0o644), (0o775, 0o664), (0o700, 0o600)])
def test_what_is_kept_is_as_open_as_the_folder_around(
    tmp_path: Path, rights: int, file: int
) -> None:
    """Adapters and converted models are read by others where the folder around is."""
    tmp_path.chmod(rights)
    with replaced(tmp_path / "adapter") as temporary:
        (temporary / "adapter_model.safetensors").touch(0o600)
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == rights
    (kept,) = (tmp_path / "adapter").iterdir()
    assert kept.stat().st_mode & 0o777 == file


def test_a_cached_model_of_another_user_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is claimed where the model is there already."""
    tiny = ModelConfig(path="random://tiny")
    source = base_model.find_model(tiny)
    monkeypatch.setattr(base_model, "claimed", no_right)
    assert base_model.find_model(tiny) == source


def test_a_speed_that_cannot_be_kept_costs_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache filled up after the check."""
    monkeypatch.setattr(forecast, "write_atomic", no_right)
    monkeypatch.setattr(forecast, "_measure", lambda _: ("characters", lambda: 1))
    forecast.Speeds(tmp_path / "speeds.json").record(None, 1.0)  # type: ignore[arg-type]


def test_commands_say_what_they_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Report, sync and a sweep in a folder of another user: one line each."""
    (tmp_path / "mlflow.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(report, "write_report", no_right)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code == 2
    monkeypatch.setattr(sync, "claimed", no_right)
    assert not sync._sync(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(str(tmp_path) in line and "cannot be written to" in line for line in lines)
    monkeypatch.setattr(SoftFileLease, "acquire", no_right)
    with pytest.raises(Refused, match="cannot be written to"), _claimed_folder(tmp_path):
        pass
