"""Names of runs as people type them: a folder, its name, or the beginning of its identity."""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from finetune.config.schema import Config

IDENTITY = re.compile(r"-([0-9a-f]{12})$")
SHORTEST_ID = 6  # characters


def find_run(text: str, outputs: Path | None = None) -> Path:
    """Return the folder of a run, for a parser's `type`.

    Args:
        text: its path, its name, or the beginning of the identity at the end of its name.
        outputs: where runs are; None: the default.

    Raises:
        ArgumentTypeError: several runs have identities that begin so.
    """
    outputs = Path(Config.output_dir) if outputs is None else outputs
    path = Path(text)
    if os.path.lexists(path) or path.name != text:
        return path
    if os.path.lexists(outputs / text):
        return outputs / text
    found = [one for one in sorted(outputs.glob("*")) if _begins(one.name, text)]
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise ArgumentTypeError(f"{text} begins the identity of {names}; type more of it")
    return found[0] if found else path


def _begins(name: str, text: str) -> bool:
    identity = IDENTITY.search(name)
    return bool(text) and identity is not None and identity[1].startswith(text)


def shorten_names(names: Sequence[str]) -> list[str]:
    """Return the shortest ids that tell runs apart; a name without an identity stays."""
    found = [IDENTITY.search(name) for name in names]
    identities = {one[1] for one in found if one is not None}
    length = next(
        size for size in range(SHORTEST_ID, 13)
        if len({one[:size] for one in identities}) == len(identities)
    )  # fmt: skip
    pairs = zip(names, found, strict=True)
    return [name if one is None else one[1][:length] for name, one in pairs]
