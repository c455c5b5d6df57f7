"""The README's commands are right, and its table names every option and setting."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

from finetune.config.overrides import find_override_problems
from finetune.config.paths import conf_dir
from finetune.config.schema import Config, register
from tests.test_methods import render_matrix

register()
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (python -m finetune(?:\.\w+)?(?: .*)?)$", README, re.MULTILINE)
TARGETS = re.findall(r"(?:^    |[`;:] ?|and )make ([a-z-]+)", README, re.MULTILINE)


def test_there_are_commands_to_check() -> None:
    """The patterns above still find what a reader would copy."""
    assert len(COMMANDS) >= 5
    assert {"demo", "test", "test-slow", "lint"} <= set(TARGETS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_accepted(command: str) -> None:
    """Every override in the README passes the check that a typed one passes; commands exist."""
    _, _, module, *words = shlex.split(command.split("#")[0])
    assert find_spec(module) is not None
    if module != "finetune":
        return
    overrides = [word for word in words if word != "--multirun"]
    assert find_override_problems(overrides, multirun="--multirun" in words) == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_make_target_exists(target: str) -> None:
    """Every `make` in the README is a target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_table_names_every_option_and_setting() -> None:
    """A new YAML or field is not forgotten in the README."""
    for section in fields(Config):
        folder = conf_dir() / section.name
        rows = [line for line in README.splitlines() if line.startswith(f"| `{section.name}`")]
        if not rows:
            assert section.name in ("output_dir", "report_dir")
            continue
        for file in folder.glob("*.yaml"):
            assert file.stem in rows[0], f"{section.name}={file.stem}"
        for key in fields(getattr(Config(), section.name)):
            if key.name != "trust_remote_code":
                assert key.name in rows[0], f"{section.name}.{key.name}"


def test_the_table_of_methods_is_that_of_the_tests() -> None:
    """What runs where is what is tested."""
    assert render_matrix() in README


def test_it_is_short() -> None:
    """A README above 200 lines is a manual."""
    assert README.count("\n") < 200
