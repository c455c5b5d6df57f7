"""Fine-tune language models with LoRA, sweep any setting, evaluate honestly.

`import finetune` imports no torch: each public name is loaded on first use, torch with the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.api import (
        Config,
        Refused,
        Results,
        Run,
        base_path,
        check,
        compose,
        load,
        open_run,
        prompt,
        read_results,
        run,
        sweep,
    )

__all__ = [
    "Config",
    "Refused",
    "Results",
    "Run",
    "base_path",
    "check",
    "compose",
    "load",
    "open_run",
    "prompt",
    "read_results",
    "run",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from finetune import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
