"""Arithmetic in settings, e.g. `lora.alpha='${mul:2,${lora.r}}'`: add, sub, mul, div."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce

from omegaconf import OmegaConf

Number = int | float

OPERATORS: dict[str, Callable[[Number, Number], Number]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}


def register_resolvers() -> None:
    """Register the operators with OmegaConf."""
    for name, function in OPERATORS.items():
        OmegaConf.register_new_resolver(name, _on_numbers(name, function), replace=True)


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
