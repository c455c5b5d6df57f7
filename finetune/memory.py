"""Estimate a run's memory by parts, without loading weights: `python -m finetune.memory`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace

from hydra.errors import HydraException
from rich.table import Table

from finetune.config.overrides import compose_job
from finetune.config.schema import Config
from finetune.models.quantization import as_loaded
from finetune.models.shape import Shape, find_shape, load_config
from finetune.pipeline.card_table import describe_remedies, find_fits, render_fits
from finetune.pipeline.memory_estimate import GIB, DeviceMemory, Estimate, estimate, find_problem
from finetune.problems import Refused, first_line
from finetune.reporting.tables import add_row, build_table, print_table
from finetune.streams import keep_streams


def main() -> None:
    """Print the estimate of the composed run; exit code 0 where it fits, 1 where it does not."""
    keep_streams()
    parser = argparse.ArgumentParser(
        prog="python -m finetune.memory",
        description="Estimate a run's memory by parts, without loading weights. Batches are taken "
        "to be full: training.batch_size rows of training.max_length tokens.",
        epilog="example: python -m finetune.memory experiment=mistral_alpaca_arc",
    )
    parser.add_argument("overrides", nargs="*", help="as for python -m finetune, one value each")
    parser.add_argument(
        "--gib", type=float, help="memory to fit into, the GPU's with training.device=cuda "
        "(default: the free memory, or 16 where there is no GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--cards", action="store_true",
        help="a table of the usual GPUs: whether the run fits, its dtype there, and remedies",
    )  # fmt: skip
    args = parser.parse_args()
    if args.cards and args.gib is not None:
        parser.error("--cards takes each card's memory; leave out --gib")
    try:
        config = compose_job(args.overrides)
        shape, device = find_shape(config.model), DeviceMemory.find(config, args.gib)
        config = replace(config, model=as_loaded(config.model, load_config(config.model)))
    except Refused as refused:
        print("\n".join(refused.problems), file=sys.stderr)
        sys.exit(2)
    except (FileNotFoundError, ValueError, HydraException) as error:
        print(first_line(error), file=sys.stderr)
        sys.exit(2)
    if args.cards:
        print_cards(config, shape)
        return
    tokens = config.training.most_tokens()
    print_table(render(estimate(config, shape, device), device))
    problem = find_problem(config, shape, device, tokens)
    print(f"\n{problem}" if problem else "\nit fits")
    sys.exit(1 if problem else 0)


def print_cards(config: Config, shape: Shape) -> None:
    """Print whether a run fits each of the usual GPUs, and the remedies."""
    fits = find_fits(config, shape)
    print_table(render_fits(fits))
    for line in describe_remedies(fits):
        print(f"\n{line}")


def render(need: Estimate, device: DeviceMemory) -> Table:
    """Return the table of parts, their peak, and the free memory."""
    table = build_table("part", "GiB", right=("GiB",))
    for name, value in asdict(need).items():
        add_row(table, name, f"{value / GIB:.2f}")
    add_row(table, "peak", f"{need.total / GIB:.2f}")
    add_row(table, f"free on the {device.kind}", f"{device.free / GIB:.2f}")
    return table


if __name__ == "__main__":
    main()
