"""Command line entry point: check the overrides, let Hydra compose them, run the sweep."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from hydra import version
from hydra._internal.utils import _run_hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from finetune import distributed, signals
from finetune.commands import find_command, run_command, version_line
from finetune.config.command_line import is_multirun, read_command_line
from finetune.config.composition import COMPOSING_ERRORS, config_dir_of, explain, find_grid_problems
from finetune.config.overrides import find_override_problems
from finetune.config.paths import conf_dir
from finetune.config.schema import register
from finetune.config.store_address import without_secrets
from finetune.escaping import for_terminal, keep_logs_plain
from finetune.home import complete_environment
from finetune.problems import Refused
from finetune.streams import keep_streams


def main() -> None:
    """Run `finetune` or `python -m finetune`; under a launcher the other ranks follow rank 0.

    Exit codes: 0 all runs finished, 1 a run failed or diverged or the results could not be
    written, 2 refused before the start, 75 stopped by the machine (SIGTERM, SIGUSR1, SIGUSR2,
    `workers.stop_after`; the same command resumes), 130 interrupted by a person (Ctrl-C).
    """
    keep_streams()
    complete_environment()
    name = find_command(sys.argv[1:])
    if name is not None:
        run_command(name)
        return
    if not distributed.is_main():
        from finetune.sweeps.worker_process import follow

        distributed.exit_now(follow())
    # A closed terminal (SIGHUP) stops nothing; a launcher sends it to ranks that it will kill.
    with signals.stops_raised(at_hangup=distributed.is_launched()), distributed.leading():
        try:
            command()
        except KeyboardInterrupt:
            sys.exit(signals.end_stopped(signals.first_stop()))


def command() -> None:
    """Check the overrides and let Hydra compose and run them."""
    if sys.argv[1:] == ["--version"]:
        print(version_line())
        return
    register()
    keep_logs_plain()
    typed = ["--help"] if sys.argv[1:] == ["help"] else sys.argv[1:]
    try:
        args, parser = read_command_line(typed)
        if not args.shell_completion:
            refuse_any(
                find_override_problems(
                    args.overrides, multirun=is_multirun(args), config_dir=args.config_dir
                )
            )
        compose_and_run(args, parser)
    except Refused as refused:
        refuse(refused.problems)


def compose_and_run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Let Hydra compose the config and run it, or print what the flags ask for.

    Raises:
        Refused: the settings cannot be composed.
    """
    # Hydra would print its errors itself and exit with 1: a refusal is a 2 here.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    version.setbase("1.3")
    try:
        _run_hydra(args, parser, run, config_path=str(conf_dir()), config_name="config")
    except Refused:
        raise
    except COMPOSING_ERRORS as error:
        raise Refused(explain(error, args.overrides, args.config_dir)) from None


def run(composed: DictConfig) -> None:
    """Run a single job as a sweep of one."""
    from finetune.sweeps.planning import announce, build_job

    try:
        refuse_any(find_grid_problems(HydraConfig.get()))
        job = build_job(composed, swept=[])
        announce(1)
        from finetune.sweeps.run_sweep import run_sweep

        code = run_sweep([job], job.overrides, sys.argv[1:])
    except Refused as refused:  # here, since Hydra would put a line of its own before it
        refuse(refused.problems)
    except OmegaConfBaseException as error:
        hydra = HydraConfig.get()
        refuse(explain(error, list(hydra.overrides.task), config_dir_of(hydra)))
    raise SystemExit(code)


def refuse_any(problems: list[str]) -> None:
    if problems:
        refuse(problems)


def refuse(problems: list[str]) -> NoReturn:
    """Print every problem and end with exit code 2."""
    heading = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"finetune: {heading}, nothing was started", file=sys.stderr)
    for problem in problems:
        line = " ".join(without_secrets(problem).split())
        print(f"  - {for_terminal(line)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
