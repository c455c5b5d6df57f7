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
    """One run's span of tokens in the batch, with the scaling and dropout of its adapter."""

    tokens: slice
    scaling: float
    dropout: float
    seed: int  # of the dropout mask: of this run, micro-batch and layer

    def dropped(self, values: torch.Tensor) -> torch.Tensor:
        """Return values [token, in] after dropout, with the same mask at each call."""
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
        cast: Sequence[torch.Tensor],
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        """Return the output [1, token, out].

        Args:
            ctx: autograd's.
            output: of the frozen layer, [1, token, out].
            inputs: of the layer, [1, token, in].
            parts: each run's span of tokens.
            cast: the matrices in the dtype of the products.
            matrices: A [r, in] and B [out, r] of each part, in order; they get the gradients.
        """
        rows, given = _rows(output), _rows(inputs)
        low_rank = []
        for part, a, b in zip(parts, cast[::2], cast[1::2], strict=True):
            product = part.dropped(given[part.tokens].to(a.dtype)) @ a.t()
            low_rank.append(product)
            if b.dtype == rows.dtype:
                rows[part.tokens].addmm_(product, b.t(), alpha=part.scaling)
            else:
                rows[part.tokens] += ((product @ b.t()) * part.scaling).to(rows.dtype)
        ctx.mark_dirty(output)
        ctx.parts, ctx.dtypes = parts, [matrix.dtype for matrix in matrices]
        ctx.save_for_backward(inputs, *low_rank, *cast)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, *saved = ctx.saved_tensors
        low_rank, cast = saved[: len(ctx.parts)], saved[len(ctx.parts) :]
        slope, given = grads[0].reshape(-1, grads[0].shape[-1]), _rows(inputs)
        is_covered = sum(p.tokens.stop - p.tokens.start for p in ctx.parts) == len(given)
        begin = torch.empty_like if is_covered else torch.zeros_like
        to_inputs = begin(given) if ctx.needs_input_grad[1] else None
        to_matrices: list[torch.Tensor] = []
        for part, product, a, b in zip(ctx.parts, low_rank, cast[::2], cast[1::2], strict=True):
            here = slope[part.tokens].to(product.dtype)
            inner = (here @ b) * part.scaling
            dropped = part.dropped(given[part.tokens].to(product.dtype))
            to_matrices += [inner.t() @ dropped, (here.t() @ product) * part.scaling]
            if to_inputs is not None:
                to_inputs[part.tokens] = part.dropped(inner @ a).to(to_inputs.dtype)
        flat = None if to_inputs is None else to_inputs.view_as(inputs)
        gradients = (m.to(dtype) for m, dtype in zip(to_matrices, ctx.dtypes, strict=True))
        return grads[0], flat, None, None, *gradients


def _rows(values: torch.Tensor) -> torch.Tensor:
    """View values as [token, feature]; some models flatten theirs before a layer, some do not."""
    return values.view(-1, values.shape[-1])
