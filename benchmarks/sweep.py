"""Measure a whole sweep against stock scripts: three ranks times three learning rates.

    python benchmarks/sweep.py [--quick] [--data FOLDER] [--device cuda]

Stock is one process a point, as a script would do it: SFTTrainer, then lm-eval's HFLM on the base
and on the tuned model. Ours is one command. Same rows, same questions, one thread each; prints
both times and scores, and at the end one JSON object; a ratio above 1 means that ours is faster.
FOLDER holds alpaca_999.jsonl and arc_easy_test.jsonl; without it the demo's are used. On CUDA the
model has random weights and the shape of Mistral-7B, in 4-bit.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "shared" / "data"
SCORES_MAY_DIFFER_BY = 0.02  # two trainings in fp32 drift apart in the last bits


def settings(data: Path, quick: bool) -> list[str]:
    """Return what both sides train and score on, as overrides."""
    rows, questions = (8, 12) if quick else (48, 80)
    shared = [f"data.num_examples={rows}", f"evaluation.limit={questions}", "lora.alpha=16"]
    batches = ["training.batch_size=4", "training.gradient_accumulation_steps=2"]
    task = ["evaluation=demo"]
    if (data / "alpaca_999.jsonl").is_file():
        shared += ["data=local", f"data.path={data / 'alpaca_999.jsonl'}"]
        file = data / "arc_easy_test.jsonl"
        task = ["evaluation=arc_easy", f"+evaluation.data_files.arc_easy.test={file}"]
    return [*shared, *batches, *task]


def run_stock(overrides: list[str]) -> dict[str, float]:
    """Do what a stock script does for one point; its imports are part of its time."""
    import torch
    from datasets import Dataset
    from hydra import compose, initialize_config_dir
    from lm_eval.models.huggingface import HFLM
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from trl.trainer.sft_trainer import SFTTrainer

    from finetune import data, training
    from finetune.config import build_config, conf_dir, register
    from finetune.evaluation import score
    from finetune.identity import find_precision
    from finetune.models import find_model, load_base, load_tokenizer
    from finetune.run_folder import RunFolder
    from finetune.scoring import PLAIN_BATCH_SIZE, Scoring
    from finetune.tasks import load_task

    class Stock(HFLM):  # type: ignore[misc]  # lm-eval is untyped
        scoring = Scoring("plain", "it is measured")

    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = build_config(compose("config", overrides))
    source, precision = find_model(config.model), find_precision(config)
    base = load_base(config.model, source, precision.device)
    tokenizer = load_tokenizer(config.model, source)
    sources = data.read_sources(data.find_sources(config.data))
    examples = data.build_examples(sources, config.data, config.training, tokenizer)
    task = load_task(config.evaluation.tasks[0], config.evaluation)

    def scored(model: Any) -> dict[str, float]:
        lm = Stock(pretrained=model, tokenizer=tokenizer, batch_size=PLAIN_BATCH_SIZE)
        return score(lm, task, config.evaluation).metrics

    before = scored(base)
    torch.manual_seed(config.training.seed)
    adapted = get_peft_model(
        base,
        PeftLora(
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            target_modules=config.lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        given = training.build_arguments(
            RunFolder(Path(folder)), config.optimizer, config.training, precision, validate=False
        )
        given.save_strategy = "no"
        SFTTrainer(
            model=adapted,
            args=given,
            train_dataset=Dataset.from_list([dict(row) for row in examples.train]),
            processing_class=tokenizer,
        ).train()
    adapted.eval()
    after = scored(adapted)
    return {"base_acc": before["acc"], "acc": after["acc"], "acc_norm": after["acc_norm"]}


def write_cuda_model(folder: Path) -> list[str]:
    """Write the model that a CUDA card is measured on, with the default's tokenizer."""
    import torch

    from benchmarks.mistral_shaped import write_mistral_shaped
    from finetune.config import ModelConfig
    from finetune.models import find_model, load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(), find_model(ModelConfig()))
    write_mistral_shaped(folder, torch.device("cuda", 0), vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return [f"model.path={folder}", "model.quantization=nf4", "training.device=cuda"]


def main() -> None:
    """Run nine scripts and one sweep; or, for a process of the former, one script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="two ranks only, fewer rows: two minutes"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of rows and questions")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--script", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.script:
        print(json.dumps(run_stock(json.loads(given.script))))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = write_cuda_model(Path(folder)) if given.device == "cuda" else []
        measure([*settings(given.data.resolve(), given.quick), *model], given.quick)


def measure(common: list[str], quick: bool) -> None:
    """Run both sides and print what they took and came to."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ranks = ["4", "8"] if quick else ["4", "8", "16"]
    rates = ["1e-4"] if quick else ["1e-4", "3e-4", "1e-3"]
    started, stock = time.perf_counter(), {}
    for rank, rate in product(ranks, rates):
        point = json.dumps([*common, f"lora.r={rank}", f"optimizer.lr={rate}"])
        script = [sys.executable, __file__, "--script", point]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
        stock[rank, rate] = json.loads(done.stdout.splitlines()[-1])
    stock_seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        environment["FINETUNE_CACHE"] = f"{folder}/cache"  # no score of another time
        grid = [f"lora.r={','.join(ranks)}", f"optimizer.lr={','.join(rates)}", "--multirun"]
        # The converted model is there for both.
        plan = [sys.executable, "-m", "finetune", *common, "tracking=none", "sweep.dry_run=true"]
        subprocess.run(plan, cwd=folder, env=environment, capture_output=True, check=True)
        started = time.perf_counter()
        ours = [sys.executable, "-m", "finetune", *common, *grid]
        subprocess.run(ours, cwd=folder, env=environment, capture_output=True, check=True)
        seconds = time.perf_counter() - started
        (table,) = Path(folder).glob("multirun_reports/*/results.csv")
        with table.open() as file:
            rows = {(row["lora.r"], row["optimizer.lr"]): row for row in csv.DictReader(file)}
    task = next(
        name.rpartition("/")[0] for name in next(iter(rows.values())) if name.endswith("/acc")
    )
    print("rank, rate     base: stock, ours     acc: stock, ours     acc_norm: stock, ours")
    worst = 0.0
    for place, theirs in stock.items():
        mine = {name: float(rows[place][f"{task}/{name}"]) for name in theirs}
        pairs = [(theirs[name], mine[name]) for name in theirs]
        worst = max(worst, *(abs(a - b) for a, b in pairs))
        print(f"{', '.join(place):12}", *(f"  {a:9.4f} {b:9.4f}" for a, b in pairs))
    for row in rows.values():
        speed, peak = float(row["tokens_per_second"]), float(row["peak_memory_gib"])
        print(f"ours: {row['run']}: {speed:.0f} tokens/s, {peak:.2f} GiB at most")
    print(
        f"stock {stock_seconds:.0f} s, ours {seconds:.0f} s; scores differ by at most {worst:.4f}"
    )
    told = {
        "what": f"a sweep of {len(stock)} runs with evaluation",
        "ratio": round(stock_seconds / seconds, 2),
        "ours": round(seconds, 1),
        "stock": round(stock_seconds, 1),
        "equal": worst <= SCORES_MAY_DIFFER_BY,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
