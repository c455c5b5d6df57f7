"""Forward and backward passes recorded as CUDA graphs, so that a GPU need not wait for Python.

A 4-bit base of 7B parameters launches some ten thousand kernels a pass, which takes the processor
several times as long as the GPU computes. A graph launches them at once, but always on tensors of
the same shapes in the same places: each run's micro-batch is filled up to a common width with a
sequence whose positions predict nothing, and every position has a weight, which is zero where it
predicts no label. What is computed is the same in every replay, bit for bit.

Axes: token = place in the row, the runs one after the other, each in a slot of one width.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from finetune.models.process_memory import is_out_of_memory
from finetune.training.sequence_attention import positions
from finetune.training.token_batch import TokenBatch

log = logging.getLogger("finetune")

NARROWEST = 64  # tokens between two widths, at least
PASSES_A_GRAPH = 12  # at least: recording takes the time of two or three passes

Key = tuple[int, int]  # tokens of a slot, sequences


@dataclass(frozen=True)
class GraphInputs:
    """What a pass reads, on the device."""

    ids: torch.Tensor  # [1, token]
    positions: torch.Tensor  # in their sequence, [1, token]
    targets: torch.Tensor  # [token]
    weights: torch.Tensor  # [token], fp32
    bounds: torch.Tensor  # the sequences' cumulative lengths, int32, filled up with the last one

    @classmethod
    def blank(cls, key: Key, num_runs: int, device: torch.device) -> GraphInputs:
        """Return the inputs of a shape: one sequence of zeros a run, which weigh nothing."""
        width, num_sequences = key
        num_tokens = width * num_runs
        bounds = [min(number, num_runs) * width for number in range(num_sequences + 1)]
        return cls(
            ids=torch.zeros(1, num_tokens, dtype=torch.long, device=device),
            positions=torch.arange(width, device=device).repeat(num_runs)[None],
            targets=torch.zeros(num_tokens, dtype=torch.long, device=device),
            weights=torch.zeros(num_tokens, device=device),
            bounds=torch.tensor(bounds, dtype=torch.int32, device=device),
        )

    def take(self, batch: TokenBatch) -> None:
        """Copy a batch of the same shapes here."""
        bounds = batch.bounds + [batch.bounds[-1]] * (len(self.bounds) - len(batch.bounds))
        device = self.ids.device
        self.ids.copy_(torch.tensor([batch.tokens], device=device))
        self.positions.copy_(positions(batch.bounds, torch.device("cpu")))
        self.targets.copy_(torch.tensor(batch.targets, device=device).clamp_(min=0))
        self.weights.copy_(torch.tensor(batch.weights, device=device))
        self.bounds.copy_(torch.tensor(bounds, dtype=torch.int32, device=device))


Pass = Callable[[GraphInputs, int], torch.Tensor]  # inputs, width -> losses of the runs [run]


class RecordedPasses:
    """The graphs of one group of runs, one for each width and number of sequences."""

    def __init__(self, run: Pass, device: torch.device, *, longest: int, num_passes: int) -> None:
        """Record nothing yet.

        Args:
            run: the forward pass; the gradients of its losses' sum are added to the parameters'.
            device: a CUDA device.
            longest: tokens of the longest micro-batch of a run.
            num_passes: how many are planned, about.
        """
        self._run = run
        self._device = device
        self._step = find_step(longest, num_passes)
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, GraphInputs, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def learn(self, batches: Sequence[TokenBatch]) -> list[float] | None:
        """Add the gradients of a micro-batch of each run; return the losses.

        None where the pass cannot be recorded, which is logged; nothing was added then.
        """
        width = max(len(batch.tokens) for batch in batches)
        width = math.ceil(width / self._step) * self._step
        batch = TokenBatch.joined([one.filled_up(width) for one in batches])
        key = (width, 1 << (len(batch.bounds) - 2).bit_length())
        try:
            if key not in self._graphs:
                self._graphs[key] = self._record(key, len(batches))
        except Exception as error:  # whatever a model does that a graph cannot
            self.forget()
            said = str(error).partition("\n")[0][:120]
            why = f"{type(error).__name__}: {said}"
            if is_out_of_memory(error):
                why = "there is not enough memory for it"
            log.info("passes are not recorded as CUDA graphs: %s", why)
            return None
        graph, inputs, losses = self._graphs[key]
        inputs.take(batch)
        graph.replay()
        return [float(loss) for loss in losses.tolist()]

    def forget(self) -> None:
        """Free the graphs and their memory."""
        self._graphs.clear()
        torch.cuda.empty_cache()

    def _record(
        self, key: Key, num_runs: int
    ) -> tuple[torch.cuda.CUDAGraph, GraphInputs, torch.Tensor]:
        """Record the pass of a shape, after one with weights of zero that warms it up."""
        (width, _), device = key, self._device
        inputs = GraphInputs.blank(key, num_runs, device)
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            self._run(inputs, width).sum().backward()  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(device).wait_stream(aside)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with (
            _without_collection(),
            torch.cuda.graph(
                graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"
            ),
        ):
            losses = self._run(inputs, width)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            losses = losses.detach()
        return graph, inputs, losses


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python from freeing memory of the GPU, or another graph, while one is recorded.

    It would break the recording off, and bitsandbytes then ends the process.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def find_step(longest: int, num_passes: int) -> int:
    """Return the tokens between two widths: the fewer passes, the fewer widths.

    Args:
        longest: tokens of the longest micro-batch.
        num_passes: how many are planned.
    """
    widths = max(1, num_passes // PASSES_A_GRAPH)
    return math.ceil(longest / widths / NARROWEST) * NARROWEST


def is_worthwhile(num_passes: int) -> bool:
    """Return whether so many passes are enough to record even one graph."""
    return num_passes >= PASSES_A_GRAPH
