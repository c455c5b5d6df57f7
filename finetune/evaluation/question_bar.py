"""The progress bar of scoring: questions whose requests are all answered, tokens a second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.models import huggingface
from tqdm import tqdm

from finetune.substitution import substituted


@contextmanager
def named_alike() -> Iterator[None]:
    """Let the bars of lm-eval's HFLM have the name of ours; they count requests."""
    bar = huggingface.tqdm

    def named(*arguments: Any, **settings: Any) -> Any:
        return bar(*arguments, **{**settings, "desc": "score", "unit": "request"})

    with substituted(huggingface, "tqdm", named):
        yield


class QuestionBar:
    """One bar: questions answered, tokens a second, time left."""

    def __init__(self, contexts: Iterable[Hashable], *, shown: bool) -> None:
        """Begin with the context of each request, those of one question being equal."""
        self._left = Counter(contexts)  # requests a question still waits for
        hidden = {} if shown else {"disable": True}  # False would outdo TQDM_DISABLE
        self._bar = tqdm(
            total=len(self._left), desc="score", unit="question", smoothing=0.1, **hidden
        )
        self._started = time.monotonic()
        self.num_tokens = 0

    def __enter__(self) -> QuestionBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, answered: Iterable[Hashable], num_tokens: int) -> None:
        """Count the requests that one batch answered, by their contexts."""
        self.num_tokens += num_tokens
        counted = Counter(answered)
        self._left -= counted
        speed = self.num_tokens / (time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
        self._bar.update(sum(context not in self._left for context in counted))
