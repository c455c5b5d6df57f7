"""What is left of a sweep as units of work, and which one an idle worker takes next.

It knows no process and no clock: the conductor asks it, and tells it how units ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

# Score a base; train a group of runs; score a run that is trained.
Kind = Literal["base", "train", "evaluate"]
Places = Sequence[int]


@dataclass(frozen=True)
class Unit:
    """Work that one worker does in one go."""

    kind: Kind
    places: tuple[int, ...]  # of the sweep's points; for a base, those that are compared with it
    retries: int = 0  # times that a worker was lost with it


@dataclass(frozen=True)
class Work:
    """What a sweep has to do, by the places of its points."""

    groups: Sequence[Sequence[int]]  # to be trained, those of a group in one step
    trained: Sequence[int] = ()  # to be scored only
    bases: Mapping[int, str] = field(default_factory=dict)  # place -> the base's scores it lacks
    models: Mapping[int, str] = field(default_factory=dict)  # place -> the base that it needs
    lengths: Mapping[int, float] = field(default_factory=dict)  # place -> steps left, about


class Schedule:
    """Units of work that wait, are at work or are over.

    A run is trained without waiting for its base's scores, and scored once they are there. Results
    come before new trainings, and a worker keeps to the base that it has loaded where it can.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._missing: dict[str, tuple[int, ...]] = {}  # bases without scores -> their points
        for place, base in work.bases.items():
            self._missing[base] = (*self._missing.get(base, ()), place)
        self._waiting = [Unit("base", places) for places in self._missing.values()]
        self._waiting += [Unit("evaluate", (place,)) for place in work.trained]
        self._waiting += [Unit("train", tuple(places)) for places in work.groups]
        self._at_work: list[Unit] = []
        self.is_closed = False

    @property
    def is_over(self) -> bool:
        return not self._waiting and not self._at_work

    @property
    def waiting(self) -> list[Unit]:
        """The units that no worker has taken, in no order."""
        return list(self._waiting)

    def take(self, model: str | None, find_free: Callable[[Unit], Places]) -> Unit | None:
        """Return the unit that a worker is to do next; None where it has to wait, or all is over.

        Args:
            model: the base that the worker has loaded.
            find_free: returns those of a unit's places that no other process works on; a group is
                cut where it works on a part of it.
        """
        for unit in sorted(self._waiting, key=lambda unit: self._rank(unit, model)):
            if self._can_begin(unit) and (free := tuple(find_free(unit))):
                self._waiting.remove(unit)
                rest = tuple(place for place in unit.places if place not in free)
                if rest:
                    self._waiting.append(replace(unit, places=rest))
                self._at_work.append(replace(unit, places=free))
                return self._at_work[-1]
        return None

    def _rank(self, unit: Unit, model: str | None) -> tuple[int, bool, float, tuple[int, ...]]:
        kinds: tuple[Kind, ...] = ("base", "evaluate", "train")
        other = model is not None and self._model(unit) != model
        # The longest first, so that no long one begins when the other workers are almost done.
        length = max(self._work.lengths.get(place, 0.0) for place in unit.places)
        return kinds.index(unit.kind), other, -length, unit.places

    def _model(self, unit: Unit) -> str | None:
        return self._work.models.get(unit.places[0])

    def _can_begin(self, unit: Unit) -> bool:
        """Return whether what a unit reads is there: a score is compared with its base's."""
        base = self._work.bases.get(unit.places[0])
        return unit.kind != "evaluate" or base not in self._missing

    def model_of(self, unit: Unit) -> str | None:
        """Return the base that a worker has loaded once it has done a unit."""
        return self._model(unit)

    def end(self, unit: Unit, trained: Collection[int] = (), held: Collection[int] = ()) -> None:
        """Take note that a unit is over.

        Args:
            unit: that was taken; a base whose scoring failed is over too, and its points' own
                scoring tries it again.
            trained: the places of its runs that now wait for their scores.
            held: the places of its runs that another process works on; they wait for its end.
        """
        self._at_work.remove(unit)
        if unit.kind == "base":
            self._missing.pop(self._work.bases[unit.places[0]], None)
        if not self.is_closed:
            self._waiting += [Unit("evaluate", (place,)) for place in trained]
            self._waiting += [replace(unit, places=tuple(held))] if held else []

    def give_back(self, unit: Unit, parts: Sequence[Places] | None = None) -> None:
        """Let a unit wait again whose worker was lost, or whose run another process holds.

        Args:
            unit: that was taken.
            parts: its places, where they are to go on as several units.
        """
        whole = [unit.places] if parts is None else parts
        self._return(unit, [replace(unit, places=tuple(places)) for places in whole])

    def retry(self, unit: Unit) -> None:
        """Let a unit wait again whose worker was lost, and count that."""
        self._return(unit, [replace(unit, retries=unit.retries + 1)])

    def _return(self, unit: Unit, parts: Sequence[Unit]) -> None:
        self._at_work.remove(unit)
        if not self.is_closed:
            self._waiting += parts

    def close(self) -> None:
        """Let nothing more begin; what is at work ends."""
        self.is_closed = True
        self._waiting.clear()
