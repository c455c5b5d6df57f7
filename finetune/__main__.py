"""The command: check what was typed, let Hydra compose it, hand it to the sweep."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from finetune import distributed, signals
from finetune.config import Refused, conf_dir, register
from finetune.home import complete_environment
from finetune.overrides import find_override_problems, first_line
from finetune.store_address import without_secrets
from finetune.streams import keep_streams


def main() -> None:
    """Run `python -m finetune`; under a launcher, the first process does and the others follow.

    Exit codes: 0 all runs finished, 1 a run failed or diverged or the results could not be
    written, 2 refused before the start, 75 stopped by a signal of the machine (SIGTERM, SIGHUP),
    to be run again, 130 interrupted by a person (Ctrl-C).
    """
    keep_streams()
    complete_environment()
    if not distributed.is_main():
        from finetune.worker import follow

        distributed.leave(follow())
    with signals.stops_raised(), distributed.leading():
        try:
            command()
        except KeyboardInterrupt:
            sys.exit(signals.end_stopped(signals.first_stop()))


def command() -> None:
    """Check what was typed and let Hydra compose and run it."""
    register()
    args = get_args_parser().parse_args()
    problems = find_override_problems(
        args.overrides, multirun=args.multirun, config_dir=args.config_dir
    )
    if args.config_path:
        problems.append("--config-path would leave finetune's own conf out; use --config-dir")
    if args.config_name not in (None, "config"):
        problems.append("--config-name would leave finetune's own config out; use experiment=NAME")
    if args.experimental_rerun:
        problems.append(
            "--experimental-rerun loads a pickle, which can run code; use python -m finetune.rerun"
        )
    if problems and not args.shell_completion:
        refuse(problems)
    # Hydra would print its errors itself and exit with 1: a refusal is a 2 here.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run)()
    except Refused as refused:
        refuse(refused.problems)
    except (HydraException, OmegaConfBaseException) as error:
        refuse([first_line(error)])


def run(composed: DictConfig) -> None:
    """Run a single job as a sweep of one."""
    from finetune.planning import build_job
    from finetune.sweep import run_sweep

    try:
        job = build_job(composed, swept=[])
        code = run_sweep([job], job.overrides)
    except Refused as refused:  # here, since Hydra would put a line of its own before it
        refuse(refused.problems)
    raise SystemExit(code)


def refuse(problems: list[str]) -> NoReturn:
    """Print every problem and end with exit code 2."""
    heading = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"finetune: {heading}, nothing was started", file=sys.stderr)
    for problem in problems:
        print(f"  - {without_secrets(problem)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
