"""The README's commands and links are right, and it is short."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from finetune.config.overrides import find_override_problems
from finetune.config.schema import register

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


def test_it_is_short() -> None:
    """A README above 150 lines is a manual, which is docs/."""
    assert README.count("\n") <= 150


def test_its_links_lead_somewhere() -> None:
    """Each page and picture is in the repository."""
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(links) > 20
    assert all((ROOT / link).is_file() for link in links)
