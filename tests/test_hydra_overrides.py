"""What may be typed of Hydra's own config: a list, and nothing that runs code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from finetune.config.overrides import find_override_problems
from finetune.config.schema import register

register()


@pytest.mark.parametrize(
    "typed",
    [
        "hydra.mode=MULTIRUN",
        "hydra.verbose=true",
        "hydra.verbose=[finetune,hydra]",
        "hydra/job_logging=disabled",
        "hydra/sweeper=finetune",
        "+hydra.sweeper.params.lora.r='4,8'",
        "+hydra.sweeper.params={lora.r: '4,8'}",
        "hydra.searchpath=[pkg://hydra]",
    ],
)
def test_what_runs_no_code_may_be_typed(typed: str) -> None:
    """Where Hydra writes, what it prints, a grid."""
    assert find_override_problems([typed], multirun=False) == []


@pytest.mark.parametrize(
    "typed",
    [
        "+hydra.callbacks.x={_target_: os.system}",
        "hydra.callbacks={x: {_target_: os.system}}",
        "+hydra={callbacks: {x: {_target_: os.system}}}",
        "hydra={job: {env_set: {LD_PRELOAD: evil.so}}}",
        "+hydra.job={env_set: {LD_PRELOAD: evil.so}}",
        "hydra.job.env_set.LD_PRELOAD=evil.so",
        "++hydra.job.env_set={LD_PRELOAD: evil.so}",
        "hydra.job.env_copy=[HF_TOKEN]",
        "hydra.launcher._target_=os.system",
        "+hydra.launcher.x={_target_: os.system}",
        "+hydra.launcher.x=[{_target_: os.system}]",
        "hydra.launcher={_target_: os.system}",
        "hydra.sweeper._target_=os.system",
        "hydra.job_logging.handlers={x: {class: os.system}}",
        "+hydra.job_logging.handlers.file.filename=x",
        "hydra/job_logging=evil",
        "hydra/launcher=evil",
        "hydra/launcher=joblib,evil",
        "hydra/callbacks=evil",
        "+hydra/callbacks=evil",
        "hydra/sweeper=basic",
        "hydra/env=evil",
        "~hydra.job_logging",
        "~hydra",
        "hydra.run={dir: x}",
        "hydra.verbose={a: b}",
        "model@hydra.job.env_set=tiny",
        "+model@hydra.job=tiny",
        "lora@=dora",
        "+lora={_target_: os.system}",
        "+hydra.sweeper.params={hydra.job.env_set.A: b}",
        "+hydra.sweeper.params.hydra.callbacks.x=b",
        "hydra.sweeper.params=x",
        "hydra.searchpath=[pkg://no_such_package_here]",
        "hydra.searchpath=[structured://x]",
        "hydra.searchpath=['${oc.env:HOME}']",
        "hydra.searchpath=[/no/such/folder]",
        "hydra.searchpath=a,b",
        "hydra.searchpath=null",
    ],
)
def test_all_else_of_hydra_is_refused(typed: str) -> None:
    """Also where a dictionary hides the key."""
    assert find_override_problems([typed], multirun=True) != []


def test_a_package_is_searched_only_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder is importable too, and nothing in it was installed."""
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (problem,) = find_override_problems(["hydra.searchpath=[pkg://strange.conf]"], multirun=False)
    assert "the package strange is not installed; name its folder instead" in problem


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_searched_folder_is_looked_at_however_it_is_typed(tmp_path: Path, sign: str) -> None:
    """With a sign, as a URL, as text, alone or in a list; its options are known."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("trust_remote_code: true\n", encoding="utf-8")
    for value in (f"[{tmp_path}]", f"['file://{tmp_path}']", f"{tmp_path}", f"'{tmp_path}'"):
        (problem,) = find_override_problems([f"{sign}hydra.searchpath={value}"], multirun=False)
        assert "trust_remote_code" in problem
    (tmp_path / "model" / "mine.yaml").write_text("path: x\n", encoding="utf-8")
    typed = [f"hydra.searchpath=[{tmp_path}]", "model=mine"]
    assert find_override_problems(typed, multirun=False) == []
    (problem,) = find_override_problems([typed[0], "model=../x"], multirun=False)
    assert "there is no such option" in problem
