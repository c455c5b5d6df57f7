"""lm-eval's Jinja templates, rendered in a sandbox, each compiled once.

lm-eval renders them unrestricted, where a template of somebody's task file could run code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import lm_eval.api.task
import lm_eval.utils
from jinja2 import BaseLoader
from jinja2.sandbox import SandboxedEnvironment

from finetune.substitution import substituted

MOST_TEMPLATES = 256


@contextmanager
def sandboxed() -> Iterator[None]:
    """Let lm-eval render in a sandbox, and compile a template once instead of once a question."""
    stock = lm_eval.utils.env
    env = SandboxedEnvironment(
        loader=BaseLoader(),
        undefined=stock.undefined,
        keep_trailing_newline=stock.keep_trailing_newline,
    )
    env.filters.update(stock.filters)
    compiled: Any = lru_cache(maxsize=MOST_TEMPLATES)(env.from_string)
    with (
        substituted(env, "from_string", compiled),
        substituted(lm_eval.utils, "env", env),
    ):
        yield


@contextmanager
def quick_and_quiet() -> Iterator[None]:
    """Render as in `sandboxed`, without lm-eval's bar for it."""
    bar = lm_eval.api.task.tqdm
    with sandboxed(), substituted(lm_eval.api.task, "tqdm", partial(bar, disable=True)):
        yield
