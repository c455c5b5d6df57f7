"""The LoRA update of a layer for several adapters at once, each on its own tokens.

Axes: token = place in the row, in, out = the layer's widths, r = an adapter's rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """One run's tokens in a layer, and how its matrices apply to them."""

    tokens: slice
    scaling: float
    dropout: float
    seed: int  # of the dropped inputs: of this run, micro-batch and layer

    def dtype(self, matrix: torch.Tensor) -> torch.dtype:
        """Return the dtype of the products: autocast's, or else the matrices' own."""
        kind = matrix.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else matrix.dtype

    def dropped(self, values: torch.Tensor) -> torch.Tensor:
        """Return values [token, in] after dropout; the same places each time it is asked."""
        if self.dropout == 0:
            return values
        draw = torch.Generator(values.device).manual_seed(self.seed)
        kept = torch.empty_like(values).bernoulli_(1 - self.dropout, generator=draw)
        return values * kept.div_(1 - self.dropout)


class GroupedLora(torch.autograd.Function):
    """Add each part's `scaling * dropout(input) A^T B^T` to a layer's output, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        parts: Sequence[Part],
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        """Return the output [1, token, out].

        Args:
            ctx: autograd's.
            output: of the frozen layer, [1, token, out].
            inputs: of the layer, [1, token, in].
            parts: whose tokens they are.
            matrices: A [r, in] and B [out, r] of each part, in order.
        """
        rows, given = _rows(output), _rows(inputs)
        low_rank = []
        for part, a, b in zip(parts, matrices[::2], matrices[1::2], strict=True):
            dtype = part.dtype(a)
            product = part.dropped(given[part.tokens].to(dtype)) @ a.to(dtype).t()
            low_rank.append(product)
            if dtype == rows.dtype:
                rows[part.tokens].addmm_(product, b.to(dtype).t(), alpha=part.scaling)
            else:
                rows[part.tokens] += ((product @ b.to(dtype).t()) * part.scaling).to(rows.dtype)
        ctx.mark_dirty(output)
        ctx.parts = parts
        ctx.save_for_backward(inputs, *low_rank, *matrices)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, *saved = ctx.saved_tensors
        low_rank, matrices = saved[: len(ctx.parts)], saved[len(ctx.parts) :]
        slope, given = grads[0].reshape(-1, grads[0].shape[-1]), _rows(inputs)
        to_inputs = torch.zeros_like(given) if ctx.needs_input_grad[1] else None
        to_matrices: list[torch.Tensor] = []
        for part, product, a, b in zip(
            ctx.parts, low_rank, matrices[::2], matrices[1::2], strict=True
        ):
            dtype = product.dtype
            here = slope[part.tokens].to(dtype)
            inner = (here @ b.to(dtype)) * part.scaling
            dropped = part.dropped(given[part.tokens].to(dtype))
            to_matrices.append((inner.t() @ dropped).to(a.dtype))
            to_matrices.append(((here.t() @ product) * part.scaling).to(b.dtype))
            if to_inputs is not None:
                to_inputs[part.tokens] = part.dropped(inner @ a.to(dtype)).to(to_inputs.dtype)
        flat = None if to_inputs is None else to_inputs.view_as(inputs)
        return grads[0], flat, None, *to_matrices


def _rows(values: torch.Tensor) -> torch.Tensor:
    """View values as [token, feature]; some models flatten theirs before a layer, some do not."""
    return values.view(-1, values.shape[-1])
