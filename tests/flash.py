"""What PyTorch's flash attention does for concatenated sequences, on a CPU."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from finetune.models.compatibility import Sequences


def attend_in_each(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    scale: float | None,
) -> torch.Tensor:
    """Attend in each sequence, whose queries are its last tokens; one may be empty."""
    parts = []
    bounds = zip(
        pairwise(sequences.queries.tolist()), pairwise(sequences.keys.tolist()), strict=True
    )
    for (start, end), (first, last) in bounds:
        q = query[start:end].transpose(0, 1)[None]
        k, v = (each[first:last].transpose(0, 1)[None] for each in (key, value))
        before = (last - first) - (end - start)
        sees = torch.ones(end - start, last - first, dtype=torch.bool).tril(before)
        attended = F.scaled_dot_product_attention(q, k, v, sees, scale=scale, enable_gqa=True)
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)
