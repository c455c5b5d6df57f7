"""Subcommands of `finetune`, such as `finetune memory lora.r=64`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

# Each is a module with a `main`; the text is its line in the help.
COMMANDS = {
    "memory": "estimate a run's memory without loading weights",
    "preview": "show tokenised rows and their loss mask, without loading weights",
    "report": "rewrite a sweep's report from the files of its runs",
    "runs": "list runs, compare two of them, watch a sweep, or remove runs",
    "cache": "show what is in the cache, or remove parts of it",
    "flips": "print the questions that two models answer differently",
    "rerun": "repeat a run from its folder, and compare the results",
    "chat": "chat with trained models",
    "export": "write a trained model to a folder or to the hub",
    "sync": "send missing events to MLflow",
    "ui": "show sweeps in MLflow's UI on this machine",
}


def find_command(arguments: Sequence[str]) -> str | None:
    """Return the command that the first word names."""
    return arguments[0] if arguments and arguments[0] in COMMANDS else None


def run_command(name: str) -> None:
    """Run a subcommand with the remaining arguments."""
    sys.argv = [f"finetune {name}", *sys.argv[2:]]
    import_module(f"finetune.{name}").main()


def version_line() -> str:
    """Return this project's version, and Hydra's."""
    return f"finetune {version('finetune')} (hydra-core {version('hydra-core')})"


def find_word_problem(word: str, settings: Sequence[str]) -> str:
    """Describe an argument that is no override, with the remedy."""
    if word in COMMANDS:
        return f"{word} is a command; it comes first: finetune {word} ..."
    if word in settings:
        return f"{word} has no value; write {word}=VALUE"
    close = get_close_matches(word, [*COMMANDS, *settings], n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    known = ", ".join(COMMANDS)
    return f"{word} is neither a command nor KEY=VALUE; {hint}Commands: {known}"
