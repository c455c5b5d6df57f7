"""The options that several benchmarks share; no torch, which not all their processes need."""

from __future__ import annotations

import argparse
from pathlib import Path


def build_parser(
    description: str, *, quick: str, data: str, default: Path
) -> argparse.ArgumentParser:
    """Return a parser of --quick, --data, --device and --tokenizer.

    Args:
        description: the benchmark's docstring, whose first line is shown.
        quick: what is left out.
        data: what the folder holds.
        default: the folder where none is named.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--data", type=Path, default=default, help=data)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--tokenizer", type=Path, help="of the model on CUDA, a folder (default: the demo's)"
    )
    return parser
