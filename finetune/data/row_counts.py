"""Counts of the rows of a source or mix: used, cut, split, left out and why."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from finetune.data.token_rows import Integers

# Of a mix, these counts are the sums of its sources'.
SUMMED = ("read", "drawn", "truncated", "tokens", "lost_tokens", "split", "pieces", "missing")


@dataclass
class RowCounts:
    """Counts of rows by outcome; `dropped` maps reasons to rows, `first` to the first row's number.

    Of a mix they are sums, and `sources` has each source's own counts.
    """

    read: int = 0
    drawn: int = 0
    truncated: int = 0
    tokens: int = 0  # of the rows used, before they are cut
    lost_tokens: int = 0  # that were cut off
    split: int = 0  # long texts, each trained on as several pieces
    pieces: int = 0  # of these texts
    validation: int = 0  # of the rows used, those to validate on
    heldout: int = 0  # of the rows used, those that only evaluation=heldout asks
    missing: int = 0  # rows that were asked for beyond those that there are
    sequences: int | None = None  # that the rows to train on were packed into
    fullness: float | None = None  # of these sequences: their tokens over the places for them
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)  # of what, in how many rows drawn
    sources: dict[str, RowCounts] = field(default_factory=dict)
    shape: str = ""  # of the rows, where they do not have the template's own columns
    unused: list[str] = field(default_factory=list)  # columns that no field takes
    absent: list[str] = field(default_factory=list)  # columns of optional fields, in no row

    @classmethod
    def total(cls, sources: dict[str, RowCounts]) -> RowCounts:
        """Return the counts of a mix: the sums of its sources'."""
        total = cls(sources=sources)
        for own in sources.values():
            for name in SUMMED:
                setattr(total, name, getattr(total, name) + getattr(own, name))
            for reason, count in own.dropped.items():
                total.dropped[reason] = total.dropped.get(reason, 0) + count
            for note, count in own.notes.items():
                total.note(note, count)
        return total

    def note(self, note: str, count: int) -> None:
        self.notes[note] = self.notes.get(note, 0) + count

    def count_all(self, tokens: Integers, kept: Integers, pieces: Integers) -> None:
        """Count rows that are used, by their tokens, those kept, and their pieces."""
        self.drawn += len(tokens)
        self.tokens += int(tokens.sum())
        self.truncated += int((kept < tokens).sum())
        self.lost_tokens += int(np.maximum(0, tokens - kept).sum())
        self.split += int((pieces > 1).sum())
        self.pieces += int(pieces[pieces > 1].sum())

    def drop(self, reason: str, number: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first.setdefault(reason, number)

    def summary(self) -> str:
        """Say in one line how many rows were read, drawn, cut and left out, and why."""
        reasons = [
            f"{count} dropped ({reason}; first: row {self.first[reason]})"
            for reason, count in self.dropped.items()
            if reason in self.first
        ]
        cut = [self._cut()] if self.truncated else []
        if self.split:
            cut.append(f"{self.split} split into {self.pieces} pieces")
        missing = [f"{self.missing} fewer than data.num_examples asks for"] if self.missing else []
        packed = [] if self.fullness is None else [self._packed()]
        read = f"read as {self.shape}: {self.read} rows" if self.shape else f"{self.read} rows read"
        used = [read, f"{self.drawn} used"]
        if self.validation or self.heldout:
            used.append(f"{self.drawn - self.validation - self.heldout} train")
        if self.validation:
            used.append(f"{self.validation} validation")
        if self.heldout:
            used.append(f"{self.heldout} held out for evaluation")
        noted = [f"{note} (rows: {count})" for note, count in self.notes.items()]
        own = ", ".join([*used, *cut, *missing, *reasons, *noted, *packed, *self._columns()])
        return "; ".join([own, *(f"{name}: {c.summary()}" for name, c in self.sources.items())])

    def _cut(self) -> str:
        return (
            f"{self.truncated} truncated ({self.lost_tokens / self.tokens:.1%} of all tokens lost)"
        )

    def _columns(self) -> list[str]:
        """Name columns that no field uses, and columns of settings that no row has."""
        unused = [f"columns not used: {', '.join(self.unused)}"] if self.unused else []
        absent = [f"no row has the column {', '.join(self.absent)}"] if self.absent else []
        return unused + absent

    def _packed(self) -> str:
        return f"packed into {self.sequences} sequences, {self.fullness:.1%} full"
