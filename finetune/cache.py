"""Show the cache that all runs share, or remove parts of it: `python -m finetune.cache`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.table import Table

from finetune.confirmation import confirm, require_answer
from finetune.escaping import for_terminal
from finetune.files import ASIDE, REPLACED, WRITING, folder_size, remove
from finetune.home import CACHE_PARTS, cache_dir
from finetune.problems import Refused, nearest
from finetune.reporting.tables import add_row, build_table, print_table, show_size
from finetune.streams import keep_streams
from finetune.tracking.claims import CLAIM_FILE, Watch

EVERYTHING = "all"
# A model is an entry of its own to remove; of the other parts only all entries together.
LISTED = "models"
SCRAPS = (CLAIM_FILE, ".lock", WRITING, REPLACED, ASIDE)  # ends of what belongs to an entry


@dataclass(frozen=True)
class Item:
    """What can be removed at once: all entries of a part, or a model."""

    name: str  # as typed for --remove
    paths: list[Path]
    holds: str

    @property
    def size(self) -> int:
        sizes = 0
        for path in self.paths:
            with suppress(OSError):  # it was removed meanwhile
                sizes += folder_size(path)
        return sizes

    @property
    def changed(self) -> float | None:
        times = []
        for path in self.paths:
            with suppress(OSError):
                times.append(path.lstat().st_mtime)
        return max(times, default=None)


def main() -> None:
    """Print the parts of the cache, or remove some; exit code 2 where that is refused."""
    keep_streams()
    parser = argparse.ArgumentParser(
        prog="python -m finetune.cache",
        description="Show what is in the cache that all runs of a user share (FINETUNE_CACHE, or "
        "~/.cache/finetune), with sizes, or remove parts of it. What is removed is computed again "
        "when a run needs it; no result is in the cache alone.",
        epilog="example: python -m finetune.cache --remove tokens evaluations",
    )
    parser.add_argument(
        "--remove", nargs="+", metavar="PART", default=[],
        help=f"names of the list, or {EVERYTHING}; asks first",
    )  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="with --remove: do not ask")
    args = parser.parse_args()
    try:
        folder = cache_dir()
        items = find_items(folder)
        if args.remove:
            sys.exit(remove_items(choose(items, args.remove), is_confirmed=args.yes))
        show(items, folder)
    except Refused as refused:
        print(for_terminal("\n".join(refused.problems)), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # at the question: nothing was removed
        sys.exit(130)


def find_items(folder: Path) -> list[Item]:
    """Return what the cache has, each model by itself and the other parts as a whole."""
    items = []
    for part, holds in CACHE_PARTS.items():
        paths = sorted(folder.glob(f"{part}/*"))  # hidden ones too
        if part == LISTED:
            entries = [path for path in paths if not _is_scrap(path)]
            items += [
                Item(f"{part}/{one.name}", [p for p in paths if _belongs(p, one)], holds)
                for one in entries
            ]
        elif paths:
            items.append(Item(part, paths, holds))
    return items


def _is_scrap(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith(SCRAPS)


def _belongs(path: Path, entry: Path) -> bool:
    """Return whether a path is an entry, or what a process has left beside it."""
    return path == entry or path.name.lstrip(".").startswith(f"{entry.name}.")


def show(items: Sequence[Item], folder: Path) -> None:
    """Print the table of the cache."""
    if not items:
        print(for_terminal(f"{folder} is empty"))
        return
    print_table(render(items))
    total = show_size(sum(item.size for item in items))
    print(for_terminal(f"{total} in {folder}"))


def render(items: Sequence[Item]) -> Table:
    """Return the table of what can be removed."""
    table = build_table("part", "size", "changed", "holds", right=("size",))
    table.columns[0].no_wrap = True  # it is typed for --remove
    for item in items:
        changed = item.changed
        when = datetime.fromtimestamp(changed).strftime("%Y-%m-%d") if changed else ""
        add_row(table, item.name, show_size(item.size), when, item.holds)
    return table


def choose(items: Sequence[Item], names: Sequence[str]) -> list[Item]:
    """Return the items of some names; `models` is all of them.

    Raises:
        Refused: the cache has no such part.
    """
    if EVERYTHING in names:
        return list(items)
    chosen: dict[str, Item] = {}
    for name in names:
        found = [one for one in items if name in (one.name, one.name.partition("/")[0])]
        if not found and name not in CACHE_PARTS:
            known = [*(one.name for one in items), EVERYTHING]
            raise Refused([f"the cache has no {name}; {nearest(name, known)}"])
        chosen |= {one.name: one for one in found}
    return list(chosen.values())


def remove_items(items: Sequence[Item], *, is_confirmed: bool) -> int:
    """Remove parts of the cache after asking; return the exit code: 1 where some are left.

    Raises:
        Refused: a process is writing one of them, or nobody can be asked.
    """
    if not items:
        print("the cache has none of it")
        return 0
    require_answer(is_confirmed=is_confirmed)
    if holders := [found for item in items for found in _find_holders(item)]:
        raise Refused([f"{holders[0]} is writing to the cache; wait for its end"])
    print_table(render(items))
    total = show_size(sum(item.size for item in items))
    if not confirm(f"remove {total} from the cache", is_confirmed=is_confirmed):
        print("nothing was removed")
        return 0
    left = [path for item in items for path in item.paths if not _is_removed(path)]
    for path in left:
        print(for_terminal(f"{path} cannot be removed; check its permissions"), file=sys.stderr)
    print(f"removed {total}" if not left else "the rest was removed")
    return int(bool(left))


def _find_holders(item: Item) -> list[str]:
    """Return the processes that write an item now."""
    claims = [Watch(path) for path in item.paths if path.name.endswith(CLAIM_FILE)]
    return [claim.holder() or "another process" for claim in claims if not claim.is_free()]


def _is_removed(path: Path) -> bool:
    with suppress(OSError):
        remove(path)
    return not path.is_symlink() and not path.exists()


if __name__ == "__main__":
    main()
