"""Cross-entropy at label positions under a frozen LM head, with logits in chunks.

Axes: label = a position that predicts a label, hidden, vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from finetune.models.base_model import head_on_rows

CHUNK = 256  # labels whose logits exist at one time


class FrozenHeadLoss(torch.autograd.Function):
    """Each label's weighted cross-entropy; its gradient is computed with each chunk of logits.

    The head is frozen, so only the hidden states need a gradient (the idea of Hsu et al. 2024,
    arXiv:2410.10989). Chunks begin anew at each run's first label: the products of a run have the
    same shapes, and so the same bits, as when it is trained separately.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.nn.Module,
        targets: torch.Tensor,
        weights: torch.Tensor,
        parts: Sequence[int],
    ) -> torch.Tensor:
        """Return the weighted losses [label].

        Args:
            ctx: autograd's.
            hidden: [label, hidden].
            head: the frozen output embedding.
            targets: token ids [label].
            weights: [label], fp32.
            parts: the number of labels of each run, in order.
        """
        losses = torch.empty_like(weights)
        gradient = torch.empty_like(hidden)
        for place in _chunks(parts):
            logits, target = head(hidden[place]).float(), targets[place, None]
            normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
            losses[place] = (normaliser - logits.gather(1, target))[:, 0] * weights[place]
            slope = logits.sub_(normaliser).exp_()
            slope.scatter_add_(1, target, torch.full_like(target, -1, dtype=slope.dtype))
            gradient[place] = slope.to(head.weight.dtype) @ head.weight
        ctx.save_for_backward(gradient, weights)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, weights = ctx.saved_tensors
        # In fp32: fp16 has no room for a loss scale, nor for a weight among thousands of labels.
        weighted = gradient.float() * (weights * grads[0])[:, None]
        return weighted.to(gradient.dtype), None, None, None, None


def _chunks(parts: Sequence[int]) -> Iterator[slice]:
    start = 0
    for count in parts:
        for offset in range(0, count, CHUNK):
            yield slice(start + offset, start + min(offset + CHUNK, count))
        start += count


class LabelLoss:
    """The cross-entropy of a model's labels, in chunks where its head is frozen and linear."""

    def __init__(self, base: PreTrainedModel) -> None:
        head = base.get_output_embeddings()
        assert head is not None, "a causal language model has a head"
        self._head = head
        self.is_plain = _is_plain(base, head)

    def __call__(
        self,
        forward: Callable[[], Any],
        rows: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        parts: Sequence[int],
    ) -> torch.Tensor:
        """Return each label's weighted cross-entropy [label].

        Args:
            forward: runs the model on a batch [sequence, token].
            rows: the positions that predict a label, in the flattened batch; None for all.
            targets: their token ids [label].
            weights: [label], fp32.
            parts: the number of labels of each run in the batch, in order.
        """
        if not self.is_plain:
            assert rows is not None, "logits of all positions would take too much memory"
            with head_on_rows(self._head, rows):
                logits = forward().logits[0]
            return F.cross_entropy(logits.float(), targets, reduction="none") * weights
        with _hidden_before(self._head) as caught:
            forward()
        # An adapter in fp32 may have turned it into fp32.
        hidden = caught[0].flatten(0, 1)
        hidden = (hidden if rows is None else hidden[rows]).to(self._head.weight.dtype)
        losses: torch.Tensor = FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden, self._head, targets, weights, parts
        )
        return losses


@contextmanager
def _hidden_before(head: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Capture the input of the head, which computes logits of one position per sequence."""
    caught: list[torch.Tensor] = []

    def catch(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        caught.append(args[0])
        return (args[0][:, :1],)

    hook = head.register_forward_pre_hook(catch)
    try:
        yield caught
    finally:
        hook.remove()


def _is_plain(base: PreTrainedModel, head: torch.nn.Module) -> bool:
    """Return whether logits are the frozen head's output and nothing else (no cap, no scale)."""
    if not isinstance(head, torch.nn.Linear) or any(p.requires_grad for p in head.parameters()):
        return False
    ids = torch.arange(1, 9, device=base.device)[None]
    with torch.no_grad(), _hidden_before(head) as caught:
        logits = base(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        return bool(torch.equal(logits, head(caught[0][:, :1])))
