"""Temporarily patch an attribute or mapping entry of a library, until a block ends.

For libraries that have no setting for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def substituted(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of an object or module; an object's class keeps its attribute."""
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
    """Add or replace entries of a mapping in place, until the block ends."""
    before = dict(entries)
    entries.update(more)
    try:
        yield
    finally:
        entries.clear()
        entries.update(before)
