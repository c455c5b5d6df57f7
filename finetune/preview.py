"""Show tokenised rows, tokens in the loss marked: `python -m finetune.preview ...`."""

from __future__ import annotations

import argparse
import sys

from finetune.problems import Refused
from finetune.streams import keep_streams

NUM_ROWS = 3
WIDTH_OF_A_FILE = 100  # of a rule between rows, where the output is no terminal


def main() -> None:
    """Print the preview; exit code 0, or 2 where settings, model or rows are refused."""
    keep_streams()
    parser = argparse.ArgumentParser(
        prog="python -m finetune.preview",
        description="Show tokenised rows, without loading weights: learned tokens (in the loss) on "
        "green, or in brackets without a terminal; how many rows are used, cut and left out, and "
        "why; and the rows' lengths.",
        epilog="example: python -m finetune.preview data=local data.path=rows.jsonl --rows 5",
    )
    parser.add_argument("overrides", nargs="*", help="as for python -m finetune, one value each")
    parser.add_argument(
        "--rows", type=_count, metavar="N", help=f"rows to show (default: {NUM_ROWS}; "
        "with --json: all)",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print JSON lines: row (its number in the data, from "
        "1), text, input_ids, labels (-100: masked) and tokens; the counts go to standard error",
    )  # fmt: skip
    args = parser.parse_intermixed_args()
    try:
        _show(args)
    except Refused as refused:
        print("\n".join(refused.problems), file=sys.stderr)
        sys.exit(2)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows, from 1 on")
    return int(text)


def _show(args: argparse.Namespace) -> None:
    from finetune.logs import quieten_libraries

    quieten_libraries()
    from hydra.errors import HydraException
    from rich.console import Console

    from finetune.pipeline.row_preview import load_preview, print_preview, write_json
    from finetune.problems import first_line

    try:
        preview = load_preview(args.overrides)
    except (OSError, ValueError, HydraException) as error:
        raise error if isinstance(error, Refused) else Refused([first_line(error)]) from None
    if args.json:
        write_json(preview, args.rows)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH_OF_A_FILE)
    print_preview(preview, args.rows or NUM_ROWS, console)


if __name__ == "__main__":
    main()
