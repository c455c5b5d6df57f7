"""Estimate a run's memory by parts, without loading weights: `python -m finetune.memory`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hydra.errors import HydraException

from finetune.config.rules import find_problems
from finetune.logs import quieten_libraries
from finetune.pipeline.jobs import Job
from finetune.problems import Refused, first_line
from finetune.streams import keep_streams
from finetune.sweeps.grid import compose_grid


def main() -> None:
    """Print the estimate of composed runs; exit code 0 where all fit, 1 where one does not."""
    keep_streams()
    args = parse_arguments()
    try:
        jobs = find_jobs(args.overrides, is_one=args.cards)
        quieten_libraries()
        from finetune.pipeline import memory_tables

        points = [memory_tables.build_point(job, args.gib) for job in jobs]
    except Refused as refused:
        print("\n".join(refused.problems), file=sys.stderr)
        sys.exit(2)
    except (FileNotFoundError, ValueError, HydraException) as error:
        print(first_line(error), file=sys.stderr)
        sys.exit(2)
    if args.cards:
        memory_tables.print_cards(points[0])
    else:
        sys.exit(memory_tables.print_points(points))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.memory",
        description="Estimate a run's memory by parts, or the peak of each run of a grid, without "
        "loading weights. Batches are taken to be full: training.batch_size rows of "
        "training.max_length tokens.",
        epilog="example: python -m finetune.memory experiment=mistral_alpaca_arc "
        "training.batch_size=2,4,8",
    )
    parser.add_argument(
        "overrides", nargs="*", help="as for python -m finetune; several values make a grid"
    )
    parser.add_argument(
        "--gib", type=float, help="memory to fit into, the GPU's with training.device=cuda "
        "(default: the free memory; where there is no GPU, 16 are assumed)",
    )  # fmt: skip
    parser.add_argument(
        "--cards", action="store_true",
        help="a table of the usual GPUs: whether the run fits, its dtype there, and remedies",
    )  # fmt: skip
    args = parser.parse_args()
    if args.cards and args.gib is not None:
        parser.error("--cards takes each card's memory; leave out --gib")
    return args


def find_jobs(overrides: Sequence[str], *, is_one: bool) -> list[Job]:
    """Return the jobs of a grid, or of a single run.

    Raises:
        Refused: they have problems, or are several where one is needed.
    """
    jobs = compose_grid(overrides, None, is_sweep=True).jobs
    problems = dict.fromkeys(one for job in jobs for one in find_problems(job.config))
    if problems:
        raise Refused(list(problems))
    if is_one and len(jobs) > 1:
        raise Refused(["--cards is for one run; give each setting one value"])
    return jobs


if __name__ == "__main__":
    main()
