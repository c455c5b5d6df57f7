"""The commands beside a run, by their first word: `finetune memory lora.r=64`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

# Each is a module with a `main`; the text stands in the help.
COMMANDS = {
    "memory": "estimate a run's memory without loading a weight",
    "preview": "show rows as the model gets them, without loading a weight",
    "report": "write a sweep's report again",
    "runs": "list runs, or compare two of them",
    "rerun": "run again what a run's folder says, and compare",
    "chat": "talk to a trained model",
    "export": "write a trained model to a folder or to the hub",
    "sync": "send to MLflow what it is missing",
}


def find_command(arguments: Sequence[str]) -> str | None:
    """Return the command that the first word names."""
    return arguments[0] if arguments and arguments[0] in COMMANDS else None


def run_command(name: str) -> None:
    """Run a command on the rest of the words typed."""
    sys.argv = [f"finetune {name}", *sys.argv[2:]]
    import_module(f"finetune.{name}").main()


def version_line() -> str:
    """Return this project's version, and Hydra's."""
    return f"finetune {version('finetune')} (hydra-core {version('hydra-core')})"


def find_word_problem(word: str, settings: Sequence[str]) -> str:
    """Say what is wrong with a word that is no override; a setting has a value."""
    if word in COMMANDS:
        return f"{word} is a command; it comes first: finetune {word} ..."
    if word in settings:
        return f"{word} has no value; write {word}=VALUE"
    close = get_close_matches(word, [*COMMANDS, *settings], n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    known = ", ".join(COMMANDS)
    return f"{word} is neither a command nor KEY=VALUE; {hint}Commands: {known}"
