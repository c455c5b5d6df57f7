"""Arithmetic in settings, e.g. `lora.alpha='${mul:2,${lora.r}}'`: add, sub, mul, div."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

Number = int | float

OPERATORS: dict[str, Callable[[Number, Number], Number]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}

RESOLVING = threading.RLock()  # OmegaConf's resolvers are the same for all threads


def register_resolvers() -> None:
    """Register the operators with OmegaConf until this process ends."""
    for name, function in OPERATORS.items():
        OmegaConf.register_new_resolver(name, _on_numbers(name, function), replace=True)


@contextmanager
def arithmetic() -> Iterator[None]:
    """Register the operators with OmegaConf, then restore the caller's of the same names."""
    with resolvers_put_back(list(OPERATORS)):
        register_resolvers()
        yield


@contextmanager
def resolvers_put_back(names: Sequence[str]) -> Iterator[None]:
    """Restore OmegaConf's resolvers of these names, and remove those that did not exist."""
    with RESOLVING:
        kept = {name: BaseContainer._resolvers.get(name) for name in names}
        try:
            yield
        finally:
            for name, resolver in kept.items():
                if resolver is None:
                    BaseContainer._resolvers.pop(name, None)
                else:
                    BaseContainer._resolvers[name] = resolver


def _on_numbers(name: str, function: Callable[[Number, Number], Number]) -> Callable[..., Number]:
    def compute(*values: object) -> Number:
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) < max(2, len(values)):
            kinds = ", ".join(type(value).__name__ for value in values)  # a value may be secret
            raise ValueError(f"{name} takes two or more numbers, not {kinds}")
        result = reduce(function, numbers)
        # An integral result is an int, which settings such as lora.alpha need.
        return int(result) if result == result // 1 else result

    return compute
