"""Measure what planning a grid costs, and what a report over many runs does.

    python benchmarks/planning.py [--quick]

Plans (`sweep.dry_run=true`) 24 and 240 jobs over a local model folder of 1 GB and 50,000 rows, in a
process of their own each, and writes the report of 24 and 240 finished runs. Prints, at the end,
one JSON object each: seconds of processor time (also of the worker), and for 240 what each job
after the first 24 costs.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune.config import ModelConfig
from finetune.models import find_model, load_tokenizer
from finetune.sweep_record import RunRecord, SweepRecord

SIZES: dict[str, Any] = {  # about 0.25 billion parameters in fp32: 1 GB
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 15,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
ROWS = 50_000


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


def report(finished: Path, runs: int, folder: Path) -> float:
    """Return the processor time of writing the report of so many runs, seconds.

    Args:
        finished: where a sweep of one run has finished; the others are copies of it.
        runs: how many.
        folder: to put them into.
    """
    (run,) = (finished / "outputs").iterdir()
    (sweep,) = (finished / "multirun_reports").iterdir()
    here = folder / f"report-{runs}"
    table = here / "multirun_reports" / sweep.name
    shutil.copytree(sweep, table)
    names = [f"{run.name}-{number}" for number in range(runs)]
    for name in names:
        shutil.copytree(run, here / "outputs" / name)
    records = [
        RunRecord(f"../../outputs/{name}", {"lora.r": str(number + 1)})
        for number, name in enumerate(names)
    ]
    replace(SweepRecord.load(table), swept=["lora.r"], runs=records).write(table)
    return processor_seconds(["-m", "finetune.report", str(table)], here)


def processor_seconds(arguments: list[str], folder: Path) -> float:
    """Return what a command and its processes take; end with its complaint where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Plan both grids and write both reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, a tenth of the rows")
    quick = parser.parse_args().quick
    few, many = (8, 24) if quick else (24, 240)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = write_inputs(folder, quick=quick)
        seconds = {jobs: plan(overrides, jobs, folder) for jobs in (few, many)}
        each = (seconds[many] - seconds[few]) / (many - few)
        found += [{"what": f"plan {n} jobs", "seconds": round(s, 1)} for n, s in seconds.items()]
        found.append({"what": "each job more", "seconds": round(each, 3)})
        (folder / "finished").mkdir()
        small = ["model=tiny", "tracking=none", "data.num_examples=8", "training.max_length=400"]
        processor_seconds(["-m", "finetune", *small], folder / "finished")
        reports = {runs: report(folder / "finished", runs, folder) for runs in (few, many)}
        found += [{"what": f"report {n} runs", "seconds": round(s, 1)} for n, s in reports.items()]
    for one in found:
        print(json.dumps(one))


if __name__ == "__main__":
    main()
