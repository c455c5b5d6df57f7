"""Foreign configs run nothing, names stay in their folder, secrets stay out of every file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from finetune.config.overrides import find_override_problems
from finetune.config.schema import register
from tests.conftest import TINY, Command

register()
MARK = "hf_MadeUpTokenOfThisTest123"
FOREIGN = {
    "target": (
        "lora/evil.yaml",
        "_target_: os.system\ncommand: touch ran\n",
        "lora._target_ is not a setting",
    ),
    "callback": (
        "experiment/evil.yaml",
        "# @package _global_\nhydra:\n  callbacks:\n    x:\n      _target_: os.system\n",
        "hydra.callbacks can change what Hydra runs",
    ),
    "environment": (
        "experiment/evil.yaml",
        "# @package _global_\nhydra:\n  job:\n    env_set:\n      LD_PRELOAD: evil.so\n",
        "hydra.job can change what Hydra runs",
    ),
    "bomb": (
        "lora/evil.yaml",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
            for before, name in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "has YAML aliases",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_config_is_refused_at_once(tmp_path: Path, finetune: Command, name: str) -> None:
    """Whether it is chosen or only lies there: nothing of it is run or unfolded."""
    file, content, problem = FOREIGN[name]
    path = tmp_path / "foreign" / file
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    started = time.monotonic()
    done = finetune("--config-dir", str(tmp_path / "foreign"), f"{path.parent.name}=evil")
    assert done.returncode == 2
    assert problem in done.stderr
    assert time.monotonic() - started < 10
    assert not (tmp_path / "ran").exists()


def test_a_searched_folder_is_as_foreign(tmp_path: Path) -> None:
    """`hydra.searchpath` is looked through as `--config-dir` is; a folder must be there."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "evil.yaml").write_text("_target_: os.system\n", encoding="utf-8")
    for place in (str(tmp_path), f"file://{tmp_path}"):
        (problem,) = find_override_problems([f"hydra.searchpath=[{place}]"], multirun=False)
        assert "lora._target_ is not a setting" in problem
    (problem,) = find_override_problems([], multirun=False, config_dir=str(tmp_path / "none"))
    assert "there is no such folder" in problem


@pytest.mark.slow
def test_a_secret_stays_out_of_every_file(
    tmp_path: Path, finetune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of the environment, also one that a setting refers to, is nowhere on disk."""
    monkeypatch.setenv("HF_TOKEN", MARK)
    settings = [argument for argument in TINY if argument != "tracking=none"]
    done = finetune(*settings, "data.revision=${oc.env:HF_TOKEN}")
    assert done.returncode == 0, done.stderr
    assert MARK not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in files)
    assert any(path.name == "report.html" for path in files)
    assert [path for path in files if MARK.encode() in path.read_bytes()] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../../outside", "{parent}/outside"])
def test_a_sweeps_name_stays_in_its_folder(tmp_path: Path, finetune: Command, name: str) -> None:
    """A name is a name, whatever it looks like."""
    named = f"sweep.name={name.format(parent=tmp_path.parent)}"
    done = finetune(*TINY, named, "evaluation=none", "training.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("multirun_reports/*outside-*/results.csv"))) == 1
    assert [path for path in tmp_path.parent.iterdir() if "outside" in path.name] == []
