from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Return the names that model cards of release 0.1 import from this package."""
    if name not in ("ModelConfig", "find_model"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from finetune.models import base_model

    return getattr(base_model, name)
