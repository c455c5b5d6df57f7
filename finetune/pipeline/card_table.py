"""A run's memory estimate on each of the usual cards: `python -m finetune.memory --cards`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.table import Table

from finetune.config.schema import Config
from finetune.models.cards import CARDS, Card, find_card_problems
from finetune.models.shape import Shape
from finetune.pipeline.memory_estimate import GIB, DeviceMemory, estimate, find_remedy
from finetune.reporting.tables import add_row, build_table


@dataclass(frozen=True)
class Fit:
    """A run's estimate on one card, and what to change where it cannot run there."""

    card: Card
    dtype: str
    peak: float  # bytes
    unsupported: tuple[str, ...]  # settings, with the remedy
    remedy: str | None = None  # where its memory is too small

    def verdict(self) -> str:
        """Return whether it runs there."""
        if self.unsupported:
            return "unsupported"
        return "no" if self.remedy else "yes"


def find_fits(config: Config, shape: Shape) -> list[Fit]:
    """Estimate a run on every card, its micro-batches full."""
    return [_find_fit(config, shape, card) for card in CARDS]


def _find_fit(config: Config, shape: Shape, card: Card) -> Fit:
    dtype = card.dtype(config)
    device = DeviceMemory("cuda", 4 if dtype == "fp32" else 2, card.gib * GIB)
    peak = estimate(config, shape, device).total
    fit = Fit(card, dtype, peak, tuple(find_card_problems(config, card)))
    if peak <= device.free:
        return fit
    change = find_remedy(config, shape, device, config.training.most_tokens())
    return replace(fit, remedy=f"set {change}" if change else "use a smaller model")


def render_fits(fits: list[Fit]) -> Table:
    """Return the table of cards; peak and memory in GiB."""
    table = build_table(
        "card", "GiB", "peak GiB", "fits", "computes in", "torch built for",
        right=("GiB", "peak GiB"),
    )  # fmt: skip
    for fit in fits:
        add_row(
            table, fit.card.name, f"{fit.card.gib:.1f}", f"{fit.peak / GIB:.1f}",
            fit.verdict(), fit.dtype, fit.card.build,
        )  # fmt: skip
    return table


def describe_remedies(fits: list[Fit]) -> Iterator[str]:
    """Yield a line for each remedy, with the cards that it is for."""
    cards: dict[str, list[str]] = {}
    for fit in fits:
        for remedy in (*fit.unsupported, *filter(None, [fit.remedy])):
            cards.setdefault(remedy, []).append(fit.card.name)
    for remedy, names in cards.items():
        yield f"{', '.join(names)}: {remedy}"
