"""How scores were computed: by shared prefixes or by lm-eval's HFLM, and what was checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 1.5}  # nats a request

# What a model of an unsuited architecture may raise in the forward pass of a tree.
MODEL_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Scoring:
    """The path that requests were answered by, and the results of the check before."""

    path: str = "none"  # shared (prefixes), plain (lm-eval's HFLM), none without requests
    reason: str | None = None  # why the path is plain
    compared: int = 0  # requests that both paths answered in the check
    # By dtype, the largest difference between the two paths over these, in nats.
    differences: Mapping[str, float] = field(default_factory=dict)
    ties: int = 0  # of these, generated texts that differ where two tokens were as likely
    sampled: int = 0  # questions answered in both dtypes, where evaluation.dtype lowers it
    flipped: int = 0  # of these, answers that changed
    forwarded_tokens: int = 0  # by the shared path, the check's included
    seconds: float = 0.0  # of these, the check took check_seconds
    check_seconds: float = 0.0

    def joined(self, other: Scoring) -> Scoring:
        """Return both, where a group has log-likelihoods and generated texts."""
        if "none" in (self.path, other.path):
            return other if self.path == "none" else self
        return Scoring(
            path=self.path if self.path == other.path else "plain",
            reason=self.reason or other.reason,
            compared=self.compared + other.compared,
            differences={**other.differences, **self.differences},
            ties=self.ties + other.ties,
            sampled=self.sampled + other.sampled,
            flipped=self.flipped + other.flipped,
            forwarded_tokens=self.forwarded_tokens + other.forwarded_tokens,
            seconds=self.seconds + other.seconds,
            check_seconds=self.check_seconds + other.check_seconds,
        )
