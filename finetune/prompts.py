"""Prompt templates: a row's fields in, prompt and response out, as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

# The wording of the Stanford Alpaca release (Taori et al. 2023).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Template:
    """One way of turning a row into text; `optional` fields may be empty or absent."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    render: Callable[[Mapping[str, str]], tuple[str, str]]  # fields -> prompt, response


def render_alpaca(fields: Mapping[str, str]) -> tuple[str, str]:
    """Return the Alpaca prompt, with its input paragraph where there is an input, and response."""
    prompt = ALPACA_WITH_INPUT if fields["input"] else ALPACA_WITHOUT_INPUT
    return prompt.format(**fields), fields["output"]


BY_NAME = {"alpaca": Template(("instruction", "output"), ("input",), render_alpaca)}
