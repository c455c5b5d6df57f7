"""The commands beside a run, by the first word."""

from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from finetune import __main__, commands
from finetune.commands import COMMANDS, find_word_problem


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_the_rest_of_the_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`finetune memory ...` is `python -m finetune.memory ...`."""
    seen: list[list[str]] = []
    module = SimpleNamespace(main=lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(commands, "import_module", {f"finetune.{name}": module}.get)
    monkeypatch.setattr(sys, "argv", ["finetune", name, "a=b", "--help"])
    __main__.main()
    assert seen == [[f"finetune {name}", "a=b", "--help"]]


def test_every_command_is_a_module_with_a_main() -> None:
    """The light ones are imported here."""
    assert all(callable(import_module(f"finetune.{name}").main) for name in ("report", "runs"))


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Also as `finetune help`."""
    for typed in (["--help"], ["help"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["finetune", *typed])
            with pytest.raises(SystemExit) as end:
                __main__.main()
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert all(f"finetune {name}" in text for name in COMMANDS)


def test_the_version_is_this_projects(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra's own stands beside it."""
    monkeypatch.setattr(sys, "argv", ["finetune", "--version"])
    __main__.main()
    assert capsys.readouterr().out.startswith("finetune 0.")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("memroy", "did you mean 'memory'?"),
        ("runs", "it comes first: finetune runs"),
        ("lora.r", "write lora.r=VALUE"),
        ("lora", "write lora=VALUE"),
        ("zzz", "Commands: memory, preview, report"),
    ],
)
def test_a_word_alone_is_answered(word: str, expected: str) -> None:
    """A misspelt command, a late one, or a setting without its value."""
    assert expected in find_word_problem(word, ["lora", "lora.r"])
