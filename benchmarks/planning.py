"""Measure the cost of planning a grid, of a finished grid, and of a report over many runs.

    python benchmarks/planning.py [--quick]

Plans (`sweep.dry_run=true`) 24 and 240 jobs over a local model folder of 1 GB and 50,000 rows; runs
24 jobs of the tiny model, and the same command again; writes the report of 24 and of 240 finished
runs twice, from the JSON lines of their questions and from cached arrays; resamples a macro
mean of 57 tasks (14,000 questions) for 1 and for 24 runs. Prints, at the end, one JSON object
each: seconds of processor time (also of the worker). --quick takes 8 and 24 jobs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune.config.schema import ModelConfig
from finetune.models.base_model import find_model, load_tokenizer
from finetune.statistics.metrics import Metric, Strata
from finetune.statistics.resampling import resample_all
from finetune.tracking.sweep_record import RunRecord, SweepRecord

SIZES: dict[str, Any] = {  # about 0.25 billion parameters in fp32: 1 GB
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 15,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
ROWS = 50_000
SMALL = ("model=tiny", "tracking=none", "data.num_examples=8", "training.max_length=400")


def write_inputs(folder: Path, *, quick: bool) -> list[str]:
    """Write model and rows; return the overrides that name them."""
    tiny = ModelConfig(path="random://tiny")
    tokenizer = load_tokenizer(tiny, find_model(tiny))
    layers: dict[str, Any] = {"num_hidden_layers": 1} if quick else {}
    config = LlamaConfig(vocab_size=len(tokenizer), **{**SIZES, **layers})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(ROWS // 10 if quick else ROWS):
            row = {"instruction": f"Say the number {number}.", "output": f"It is {number}."}
            file.write(json.dumps(row) + "\n")
    return [
        f"model.path={folder / 'model'}", "data=local", f"data.path={folder / 'rows.jsonl'}",
        "tracking=none", "training.max_length=256",
    ]  # fmt: skip


def plan(overrides: list[str], jobs: int, folder: Path) -> float:
    """Return the processor time of planning a grid of so many jobs, seconds."""
    ranks = ",".join(str(rank) for rank in range(1, 9))
    rates = ",".join(f"{rate}e-5" for rate in range(1, jobs // 8 + 1))
    grid = [f"lora.r={ranks}", f"optimizer.lr={rates}", "sweep.dry_run=true", "--multirun"]
    return processor_seconds(["-m", "finetune", *overrides, *grid], folder)


def finished_grid(jobs: int, folder: Path) -> dict[str, float]:
    """Return the processor time of a grid of the tiny model, and of the same command again."""
    folder.mkdir()
    rates = ",".join(f"{number}e-4" for number in range(1, jobs + 1))
    command = ["-m", "finetune", *SMALL, f"optimizer.lr={rates}", "--multirun"]
    first = processor_seconds(command, folder)
    again = processor_seconds(command, folder)
    return {f"run {jobs} jobs of the tiny model": first, "the same command again": again}


def copy_runs(finished: Path, runs: int, folder: Path) -> Path:
    """Return a sweep's folder with so many copies of the one run that has finished."""
    (run,) = (finished / "outputs").iterdir()
    (sweep,) = (finished / "multirun_reports").iterdir()
    here = folder / f"report-{runs}"
    table = here / "multirun_reports" / sweep.name
    shutil.copytree(sweep, table)
    names = [f"{run.name}-{number}" for number in range(runs)]
    for name in names:
        shutil.copytree(run, here / "outputs" / name, ignore=shutil.ignore_patterns(".outcomes"))
    records = [
        RunRecord(f"../../outputs/{name}", {"lora.r": str(number + 1)})
        for number, name in enumerate(names)
    ]
    replace(SweepRecord.load(table), swept=["lora.r"], runs=records).write(table)
    return table


def report(finished: Path, runs: int, folder: Path) -> dict[str, float]:
    """Return the processor time of writing a report of so many runs, and of writing it again."""
    table = copy_runs(finished, runs, folder)
    command = ["-m", "finetune.report", str(table)]
    first, again = (processor_seconds(command, folder) for _ in range(2))
    return {f"report {runs} runs": first, f"report {runs} runs again": again}


def macro_mean(runs: int) -> float:
    """Return the processor time of the intervals and p of so many runs in a mean of 57 tasks."""
    draw = np.random.default_rng(0)
    members = [
        f"task{n}" for n, size in enumerate(draw.integers(100, 400, 57)) for _ in range(size)
    ]
    metric = Metric("mean", True, "equal")
    right = draw.random((runs + 1, len(members))) < 0.4
    base, *tuned = right.astype(float).tolist()
    started = time.process_time()
    resample_all(metric, [(base, one) for one in tuned], Strata.build(metric, members))
    return time.process_time() - started


def processor_seconds(arguments: list[str], folder: Path) -> float:
    """Return the processor time of a command; exit with its error where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FINETUNE_CACHE": str(folder / "cache")}
    environment = {**os.environ, **own}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(folder: Path, *, quick: bool) -> dict[str, float]:
    """Return the processor time of each part, seconds."""
    few, many = (8, 24) if quick else (24, 240)
    overrides = write_inputs(folder, quick=quick)
    found = {"plan 8 jobs, reading the rows for the first time": plan(overrides, 8, folder)}
    planned = {jobs: plan(overrides, jobs, folder) for jobs in (few, many)}
    found |= {f"plan {jobs} jobs": seconds for jobs, seconds in planned.items()}
    found["each job more"] = (planned[many] - planned[few]) / (many - few)
    found |= finished_grid(few, folder / "grid")
    (folder / "finished").mkdir()
    processor_seconds(["-m", "finetune", *SMALL], folder / "finished")
    for runs in (few, many):
        found |= report(folder / "finished", runs, folder)
    for runs in (1, few):
        found[f"resample a macro mean of 57 tasks, {runs} runs"] = macro_mean(runs)
    return found


def main() -> None:
    """Measure all and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, a tenth of the rows")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), quick=quick)
    for what, seconds in found.items():
        print(json.dumps({"what": what, "seconds": round(seconds, 3)}))


if __name__ == "__main__":
    main()
