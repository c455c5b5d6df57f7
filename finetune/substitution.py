"""Put something else in the place of a library's attribute or entry, until a block ends.

For libraries that have no setting for what a block needs of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def substituted(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object or module that has it; an object's class keeps its own."""
    is_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def updated(entries: MutableMapping[str, Any], more: Mapping[str, Any]) -> Iterator[None]:
    """Add to a mapping, or replace in it; it is the same object, for whoever has it."""
    before = dict(entries)
    entries.update(more)
    try:
        yield
    finally:
        entries.clear()
        entries.update(before)
