"""Parse the command line with Hydra's parser: flags and overrides in any order."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from finetune.config.grammar import key_of, rewrite, without_null
from finetune.problems import Refused

MODES = {"RUN": False, "MULTIRUN": True}


def read_command_line(
    arguments: Sequence[str],
) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Return the flags and overrides, these in Hydra's grammar, and Hydra's parser.

    Raises:
        Refused: a flag is unknown, has a wrong value, or excludes another.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise Refused([_remedy(message, parser)])

    # argparse would print its usage, and takes overrides before or after the flags only.
    setattr(parser, "error", refuse)  # noqa: B010  # a method is no attribute to assign for mypy
    args = parser.parse_intermixed_args(arguments)
    if args.shell_completion:
        return args, parser
    problems = [*_find_flag_problems(args), *find_settings_typed_twice(args.overrides)]
    if problems:
        raise Refused(problems)
    if args.hydra_help:  # Hydra would apply what is typed to its own config, which has none of it
        args.overrides = []
    args.overrides = without_null([rewrite(argument) for argument in args.overrides])
    return args, parser


def is_multirun(args: argparse.Namespace) -> bool:
    """Return whether --multirun or hydra.mode asks for a sweep."""
    return bool(args.multirun) or is_typed_multirun(args)


def is_typed_multirun(args: argparse.Namespace) -> bool:
    """Return whether hydra.mode asks for a sweep."""
    typed = [a.partition("=")[2].strip("'\"") for a in args.overrides if _sets_mode(a)]
    return bool(typed) and MODES.get(typed[-1].upper(), False)


def _sets_mode(argument: str) -> bool:
    return argument.lstrip("+").startswith("hydra.mode=")


def _find_flag_problems(args: argparse.Namespace) -> list[str]:
    modes = {
        "--run": args.run, "--multirun": args.multirun, "--cfg": args.cfg, "--info": args.info,
    }  # fmt: skip
    typed = [name for name, value in modes.items() if value]
    problems = []
    if args.multirun and any(_sets_mode(a) for a in args.overrides) and not is_typed_multirun(args):
        problems.append("hydra.mode=RUN and --multirun exclude each other; use one of them")
    if len(typed) > 1:
        problems.append(f"{' and '.join(typed)} exclude each other; use one of them")
    for name in ("resolve", "package"):
        if getattr(args, name) and not args.cfg and not args.help:
            problems.append(f"--{name} needs --cfg; add --cfg job")
    if args.config_path:
        problems.append("--config-path would replace finetune's conf/; use --config-dir")
    if args.config_name not in (None, "config"):
        problems.append("--config-name would replace finetune's config.yaml; use experiment=NAME")
    if args.experimental_rerun:
        problems.append(
            "--experimental-rerun loads a pickle, which can run code; use finetune rerun FOLDER"
        )
    return problems


def find_settings_typed_twice(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the settings of which Hydra would take the last value and drop the others silently."""
    typed: dict[str, list[str]] = {}
    for argument in arguments:
        if "=" in argument and not argument.startswith("~"):
            typed.setdefault(key_of(argument).strip(), []).append(argument)
    for key, same in typed.items():
        if len(same) > 1:
            yield f"{key} is set more than once, by {' and '.join(same)}; keep one of them"


def _remedy(message: str, parser: argparse.ArgumentParser) -> str:
    """Return argparse's message with what to type instead."""
    unknown = message.removeprefix("unrecognized arguments: ")
    if unknown == message:
        return f"{message}; see --help and --hydra-help"
    flag = unknown.split(" ")[0]
    flags = sorted(option for action in parser._actions for option in action.option_strings)
    close = get_close_matches(flag.partition("=")[0], flags, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{flag} is not an option; {hint}Settings are typed as KEY=VALUE; see --hydra-help"
