"""Measure training against stock SFTTrainer, and adapters trained together against separately.

    python benchmarks/training.py [--quick] [--only TEXT] [--data FILE]
        [--device cuda] [--tokenizer FOLDER]

FILE holds Alpaca rows; without it the demo's are measured. TEXT runs only comparisons whose name
contains it; all take more than an hour. On a CPU all run in one process on one core, in turns.
Prints real tokens per second, seconds and peak memory (each in its own process), and at the end one
JSON object per comparison, in tokens per second; a ratio above 1 means that ours is faster. Where
several adapters are measured, "stock" is ours, trained separately. On CUDA the model has random
weights and the shape of Mistral-7B, in 4-bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.mistral_shaped import mistral_shaped
from benchmarks.options import build_parser
from benchmarks.stock import as_it_comes, build_stock
from finetune.config import methods
from finetune.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from finetune.data.dataset import Examples, build_examples, find_sources, read_sources
from finetune.data.row_counts import RowCounts
from finetune.data.token_rows import Example
from finetune.models import adapters, process_memory
from finetune.models.base_model import find_model, load_base, load_tokenizer
from finetune.models.precision import Precision
from finetune.tracking.events import EventLog, read_events
from finetune.tracking.run_folder import RunFolder
from finetune.training import trainer as training
from finetune.training.adapter_training import AdapterSpec
from finetune.training.multi_adapter import find_obstacle, train_together

DATA = Path(__file__).parents[2] / "shared" / "data" / "alpaca_999.jsonl"
TOLERANCE = {"fp32": 1e-4, "nf4": 1e-4, "bf16": 0.02, "nf4-bf16": 0.02}  # of each step's loss
LORA = LoraConfig(r=8, alpha=16)
RANKS = (LORA.r, 2 * LORA.r)  # of the adapters, in turns


@dataclass(frozen=True)
class Case:
    """One measurement: the base, the batches and the number of adapters."""

    kind: str  # of the base: fp32, bf16, nf4 (computing in fp32), nf4-bf16
    batch_size: int
    accumulation: int
    steps: int
    max_length: int
    together: int = 1  # adapters trained together
    times: int = 1  # how often, one after the other
    is_stock: bool = False
    by_liger: bool = False  # stock with Liger's kernels
    checkpointing: bool = False
    row_tokens: int | None = None  # rows of exactly so many; None takes them as they are


@dataclass(frozen=True)
class Measured:
    """Times, tokens, memory and losses of a case, for all its adapters."""

    seconds: float
    cpu_seconds: float
    tokens: int  # real ones
    peak_gib: float
    losses: list[float]  # of one adapter after the other


@lru_cache(maxsize=1)
def load(kind: str, device: torch.device) -> PreTrainedModel:
    if device.type == "cuda":
        shaped = ModelConfig(path=str(mistral_shaped()), dtype="bf16")
        return load_base(shaped, find_model(shaped), device)
    settings = ModelConfig(
        dtype="bf16" if "bf16" in kind else "fp32",
        quantization="nf4" if "nf4" in kind else "none",
    )
    return load_base(settings, find_model(settings), device)


def arguments(case: Case, folder: Path, device: torch.device) -> training.Arguments:
    precision = Precision(device, _autocast(case))
    return training.build_arguments(
        RunFolder(folder),
        OptimizerConfig(lr=2e-4),
        TrainingConfig(
            batch_size=case.batch_size,
            gradient_accumulation_steps=case.accumulation,
            max_steps=case.steps,
            max_length=case.max_length,
            checkpoint_every=10_000,
            gradient_checkpointing=case.checkpointing,
        ),
        precision,
        validate=False,
    )


def _autocast(case: Case) -> torch.dtype:
    return torch.bfloat16 if "bf16" in case.kind else torch.float32


def train_stock(
    base: PreTrainedModel, case: Case, rows: list[Example], folder: Path, _: int
) -> list[float]:
    """Train by stock SFTTrainer."""
    given = arguments(case, folder, base.device)
    adapted = adapters.attach(base, methods.lora_settings(LORA), 42)
    trainer = build_stock(adapted, given, rows, tokenizer(base.device), by_liger=case.by_liger)
    with as_it_comes():
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    adapted.unload()
    base.__dict__.pop("forward", None)
    return losses


def train_ours(
    base: PreTrainedModel, case: Case, rows: list[Example], folder: Path, first: int
) -> list[float]:
    """Train a group of adapters together, whose first one has the number `first`."""
    given = arguments(case, folder / "0", base.device)
    precision = Precision(base.device, _autocast(case))
    examples = Examples(rows, [], RowCounts())
    runs = [RunFolder(folder / str(number)) for number in range(case.together)]
    specs = [
        AdapterSpec(
            replace(LORA, r=RANKS[(first + number) % 2]), given, examples, EventLog(run.events)
        )
        for number, run in enumerate(runs)
    ]
    for _, _, outcome in train_together(base, specs, precision):
        if isinstance(outcome, Exception):
            raise outcome
    for spec in specs:
        spec.events.close()
    events = [event for run in runs for event in read_events(run.events)]
    return [event["value"] for event in events if event.get("key") == "train/loss"]


def run_case(base: PreTrainedModel, case: Case, rows: list[Example]) -> Measured:
    """Train as the case says, and measure it."""
    losses: list[float] = []
    process_memory.reset_peak_memory(base.device)
    chosen = rows[: case.batch_size * case.accumulation * case.steps]
    started, cpu = time.perf_counter(), time.process_time()
    if not case.is_stock:  # which a sweep checks once per base and rows
        assert find_obstacle(base, [row["input_ids"] for row in chosen]) is None
    for number in range(case.times):
        with tempfile.TemporaryDirectory() as folder, _silence():
            train = train_stock if case.is_stock else train_ours
            losses += train(base, case, chosen, Path(folder), number)
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    tokens = sum(len(row["input_ids"]) for row in chosen) * case.together * case.times
    peak = process_memory.peak_memory_gib(base.device)
    return Measured(seconds, time.process_time() - cpu, tokens, peak, losses)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def read_examples(file: Path, case: Case, device: torch.device) -> list[Example]:
    """Tokenise Alpaca rows in a fixed order; without the file, the demo's."""
    file = file / DATA.name if file.is_dir() else file
    path = str(file) if file.is_file() else "package://finetune/demo/rows.jsonl"
    settings = DataConfig(path=path)
    rows = read_sources(find_sources(settings))
    given = TrainingConfig(max_length=case.max_length)
    examples = build_examples(rows, settings, given, tokenizer(device)).train
    if case.row_tokens is None:
        return list(examples)
    joined = [token for example in examples for token in example["input_ids"]]
    cut = [joined[i : i + case.row_tokens] for i in range(0, len(joined), case.row_tokens)]
    return [Example(input_ids=ids, labels=ids) for ids in cut[:-1]]


@lru_cache(maxsize=1)
def tokenizer(device: torch.device) -> PreTrainedTokenizerBase:
    """Load it once, so that its time is on neither side."""
    model = ModelConfig() if device.type == "cpu" else ModelConfig(path=str(mistral_shaped()))
    return load_tokenizer(model, find_model(model))


def peak_of(case: Case, file: Path) -> float:
    """Return the peak memory of a case in a process of its own, GiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_alone, (case, file)).peak_gib


def _measure_alone(case: Case, file: Path) -> Measured:
    _quieten()
    base = load(case.kind, torch.device("cpu"))
    return run_case(base, replace(case, steps=2), read_examples(file, case, base.device))


def compare(
    what: str, stock: Case, ours: Case, file: Path, device: torch.device, quick: bool
) -> dict[str, Any]:
    """Measure two cases in turns; print and return the comparison."""
    base, rows = load(ours.kind, device), read_examples(file, ours, device)
    bases = {"ours": base, "stock": load.__wrapped__(ours.kind, device) if stock.by_liger else base}
    both = {"stock": stock, "ours": ours}
    rounds = 1 if quick or device.type == "cuda" else 2
    for name, case in both.items():  # one step each, to warm up
        small = replace(case, batch_size=1, accumulation=1) if quick else case
        run_case(bases[name], replace(small, steps=1, times=1), rows)
    found: dict[str, list[Measured]] = {name: [] for name in both}
    for number in range(rounds):
        for name in list(both)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(run_case(bases[name], both[name], rows))
    speed = {n: sum(m.tokens for m in ms) / sum(m.seconds for m in ms) for n, ms in found.items()}
    pairs = zip(found["stock"][0].losses, found["ours"][0].losses, strict=True)
    worst = max(abs(a - b) for a, b in pairs)
    print(f"\n{what}: {ours.steps} steps, {found['ours'][0].tokens} tokens")
    for name, case in both.items():
        wall, cpu = (
            fmean(getattr(one, kind) for one in found[name]) for kind in ("seconds", "cpu_seconds")
        )
        told = f"  {name:5} {speed[name]:8.0f} tokens/s  {wall:7.1f} s  {cpu:7.1f} CPU s"
        if device.type == "cuda":
            told += f"  {found[name][-1].peak_gib:5.2f} GiB at most"
        elif not quick:
            told += f"  {peak_of(case, file):5.2f} GiB at most"
        print(told)
    print(f"  ratio {speed['ours'] / speed['stock']:.2f}; losses differ by at most {worst:.1g}")
    return {
        "what": what,
        "ratio": round(speed["ours"] / speed["stock"], 2),
        "ours": round(speed["ours"], 1),
        "stock": round(speed["stock"], 1),
        "equal": worst <= TOLERANCE[ours.kind],
    }


def comparisons(quick: bool, device: torch.device) -> list[tuple[str, Case, Case]]:
    """Return the comparisons: stock against ours, then separately against together."""
    if device.type == "cuda":
        return _cuda_comparisons(quick)
    kinds = ("fp32",) if quick else ("fp32", "bf16")
    batches = [Case(kind, 4, 2, 1 if quick else 6, 512) for kind in kinds]
    grid = [("fp32", 1, 4, 96)]
    if not quick:
        all_kinds = ("fp32", "bf16", "nf4", "nf4-bf16")
        grid = list(product(all_kinds, (1, 2, 4), (2, 4, 8), (160,)))
        grid += product(("fp32", "nf4-bf16"), (1,), (2, 4, 8), (48,))
    found = [
        (
            f"{case.batch_size} x {case.accumulation} rows, {case.kind}",
            replace(case, is_stock=True),
            case,
        )
        for case in batches
    ]
    for kind, size, count, length in grid:
        alone = Case(kind, size, 1, 2, length, times=count)
        name = f"{count} adapters, micro-batch {size}, {kind}, up to {length} tokens"
        found.append((name, alone, replace(alone, together=count, times=1)))
    return found


def _cuda_comparisons(quick: bool) -> list[tuple[str, Case, Case]]:
    """Return the comparisons on CUDA: the reference's batches, and groups by lengths of rows."""
    case = Case("nf4-bf16", 8, 4, 1 if quick else 12, 2048, checkpointing=True)
    stock = replace(case, is_stock=True)
    found = [("8 x 4 rows, nf4-bf16", stock, case)]
    if find_spec("liger_kernel") is not None:
        found.append(("8 x 4 rows, nf4-bf16, stock by Liger", replace(stock, by_liger=True), case))
    free, whole = replace(case, checkpointing=False), replace(case, batch_size=32, accumulation=1)
    found.append(("8 x 4 rows, nf4-bf16, activations kept", replace(free, is_stock=True), free))
    found.append(("32 x 1 rows, nf4-bf16", replace(whole, is_stock=True), whole))
    groups = [(4, 50), (4, 100), (4, 200), (4, 400), (2, 200), (8, 200)]
    for count, length in [(4, 200)] if quick else groups:
        alone = Case("nf4-bf16", 1, 1, 24, 2048, times=count, row_tokens=length)
        name = f"{count} adapters, micro-batch 1, nf4-bf16, {length} tokens"
        found.append((name, alone, replace(alone, together=count, times=1)))
    return found


def _quieten() -> None:
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def main() -> None:
    """Run all comparisons, or those that --quick leaves."""
    quick, data = "fewer steps: two minutes", "Alpaca rows, or their folder"
    parser = build_parser(__doc__, quick=quick, data=data, default=DATA)
    parser.add_argument("--only", default="", metavar="TEXT", help="only what has TEXT in its name")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/training.py: there is no CUDA device; leave out --device")
    _quieten()
    if given.device == "cuda":
        mistral_shaped(given.tokenizer)
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device("cpu")
    chosen = [one for one in comparisons(given.quick, device) if given.only in one[0]]
    if not chosen:
        names = "\n".join(what for what, *_ in comparisons(given.quick, device))
        sys.exit(f"benchmarks/training.py: no comparison is named so; there are:\n{names}")
    told = [compare(*one, given.data, device, given.quick) for one in chosen]
    print()
    for comparison in told:
        print(json.dumps(comparison))


if __name__ == "__main__":
    main()
