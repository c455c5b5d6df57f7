"""Measure a whole sweep against stock scripts: three ranks times three learning rates.

    python benchmarks/sweep.py [--quick] [--data FOLDER] [--device cuda] [--tokenizer FOLDER]

Stock is one process a point, as a script would do it: SFTTrainer, then lm-eval's HFLM on the base
and on the tuned model. Ours is one command. Same rows, same questions, one thread each; prints
scores, and at the end one JSON object for the sweep and one for each of its parts, in seconds; a
ratio above 1 means that ours is faster. Ours also tracks and reports, beside its runs, in a process
of its own. Most of stock's time is evaluation here: where more
rows are trained for each question, the sweep comes nearer to the ratio of its training. FOLDER
holds alpaca_999.jsonl, arc_easy_test.jsonl and arc_easy_train.jsonl; without it the demo's are
used. On CUDA the model has random weights and the shape of Mistral-7B, in 4-bit.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.options import build_parser
from finetune.home import cache_dir

DATA = Path(__file__).parents[2] / "shared" / "data"
SCORES = ("base_acc", "acc", "acc_norm")
SCORES_MAY_DIFFER_BY = 0.02  # of tuned models: two trainings in fp32 drift in the last bits

Point = tuple[int, float]  # the rank and the learning rate


@dataclass(frozen=True)
class Measured:
    """Times and scores of one side over all points; `seconds` includes starts and reports."""

    seconds: float
    training_seconds: float
    evaluation_seconds: float
    scores: dict[Point, dict[str, float]]


@dataclass(frozen=True)
class StockPoint:
    """The output of one stock script."""

    training_seconds: float
    evaluation_seconds: float
    scores: dict[str, float]


def settings(data: Path, quick: bool) -> list[str]:
    """Return what both sides train and score on, as overrides."""
    rows, questions, shots, length = (8, 8, 0, 96) if quick else (12, 100, 5, 512)
    shared = [f"data.num_examples={rows}", f"evaluation.limit={questions}", "lora.alpha=16"]
    shared += ["training.batch_size=4", "training.epochs=1", f"training.max_length={length}"]
    files = [data / f"{name}.jsonl" for name in ("alpaca_999", "arc_easy_test", "arc_easy_train")]
    if not all(file.is_file() for file in files):
        return [*shared, "evaluation=demo"]
    trained, asked, shown = files
    few = [f"evaluation.num_fewshot={shots}", f"+evaluation.data_files.arc_easy.train={shown}"]
    task = ["evaluation=arc_easy", f"+evaluation.data_files.arc_easy.test={asked}", *few]
    return [*shared, "data=local", f"data.path={trained}", *task]


def run_stock(overrides: list[str]) -> StockPoint:
    """Do what a stock script does for one point."""
    import torch
    from hydra import compose, initialize_config_dir
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    from benchmarks.evaluation import Stock
    from benchmarks.stock import build_stock
    from finetune.config.paths import conf_dir
    from finetune.config.schema import build_config, register
    from finetune.data import dataset
    from finetune.evaluation.harness import score
    from finetune.evaluation.loglikelihood import PLAIN_BATCH_SIZE
    from finetune.evaluation.tasks import load_task
    from finetune.models.base_model import find_model, load_base, load_tokenizer
    from finetune.models.precision import find_precision
    from finetune.tracking.run_folder import RunFolder
    from finetune.training import trainer as training

    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = build_config(compose("config", overrides))
    source, precision = find_model(config.model), find_precision(config)
    base = load_base(config.model, source, precision.device)
    tokenizer = load_tokenizer(config.model, source)
    sources = dataset.read_sources(dataset.find_sources(config.data))
    examples = dataset.build_examples(sources, config.data, config.training, tokenizer)
    task = load_task(config.evaluation.tasks[0], config.evaluation)

    def scored(model: Any) -> tuple[dict[str, float], float]:
        started = time.perf_counter()
        lm = Stock(pretrained=model, tokenizer=tokenizer, batch_size=PLAIN_BATCH_SIZE)
        metrics = score(lm, task, config.evaluation).metrics
        return metrics, time.perf_counter() - started

    before, base_seconds = scored(base)
    torch.manual_seed(config.training.seed)
    lora = PeftLora(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        target_modules=config.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(base, lora)
    with tempfile.TemporaryDirectory() as folder:
        run, sections = RunFolder(Path(folder)), (config.optimizer, config.training)
        given = training.build_arguments(run, *sections, precision, validate=False)
        trainer = build_stock(adapted, given, examples.train, tokenizer)
        started = time.perf_counter()
        trainer.train()
        training_seconds = time.perf_counter() - started
    after, tuned_seconds = scored(adapted.eval())
    scores = dict(zip(SCORES, (before["acc"], after["acc"], after["acc_norm"]), strict=True))
    return StockPoint(training_seconds, base_seconds + tuned_seconds, scores)


def choose_cuda_model(tokenizer: Path | None) -> list[str]:
    """Name the model that a CUDA card is measured on."""
    from benchmarks.mistral_shaped import mistral_shaped

    return [f"model.path={mistral_shaped(tokenizer)}", "training.device=cuda"]


def main() -> None:
    """Run nine scripts and one sweep; or, for a process of the former, one script."""
    quick = "two points, fewer and shorter rows: two minutes"
    data = "the folder of rows and questions"
    parser = build_parser(__doc__, quick=quick, data=data, default=DATA)
    parser.add_argument("--script", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.script:
        print(json.dumps(asdict(run_stock(json.loads(given.script)))))
        return
    ranks, rates = ([8], [1e-4, 1e-3]) if given.quick else ([4, 8, 16], [1e-4, 3e-4, 1e-3])
    model = choose_cuda_model(given.tokenizer) if given.device == "cuda" else []
    common = [*settings(given.data.resolve(), given.quick), *model]
    stock = measure_stock(common, list(product(ranks, rates)))
    ours = measure_ours(common, ranks, rates)
    print_comparison(stock, ours)


def measure_stock(common: list[str], points: list[Point]) -> Measured:
    """Run one script a point, one after the other; their imports are part of their time."""
    started, found = time.perf_counter(), {}
    for rank, rate in points:
        overrides = json.dumps([*common, f"lora.r={rank}", f"optimizer.lr={rate}"])
        told = _run([sys.executable, __file__, "--script", overrides], Path.cwd())
        found[rank, rate] = point = StockPoint(**json.loads(told.splitlines()[-1]))
        seconds = time.perf_counter() - started
        parts = f"training {point.training_seconds:.0f} s, scoring {point.evaluation_seconds:.0f} s"
        print(f"stock: {rank}, {rate:g}: {parts}; after {seconds:.0f} s", point.scores, flush=True)
    return Measured(
        time.perf_counter() - started,
        sum(point.training_seconds for point in found.values()),
        sum(point.evaluation_seconds for point in found.values()),
        {place: point.scores for place, point in found.items()},
    )


def _run(command: list[str], folder: Path, **more: str) -> str:
    """Return the output of a command; exit with its error where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def measure_ours(common: list[str], ranks: list[int], rates: list[float]) -> Measured:
    """Run one command, with an empty store of scores."""
    swept: dict[str, Sequence[float]] = {"lora.r": ranks, "optimizer.lr": rates}
    grid = [f"{key}={','.join(map(str, values))}" for key, values in swept.items()]
    command = [sys.executable, "-m", "finetune", *common, *grid]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cache").mkdir()
        (folder / "cache" / "models").symlink_to(cache_dir() / "models")  # stock had them too
        started = time.perf_counter()
        _run([*command, "--multirun"], folder, FINETUNE_CACHE=f"{folder}/cache")
        seconds = time.perf_counter() - started
        (table,) = folder.glob("multirun_reports/*/results.csv")
        with table.open() as file:
            rows = list(csv.DictReader(file))
        evaluations = [
            json.loads(file.read_text()) for file in folder.glob("outputs/*/evaluation/*.json")
        ]
    for row in rows:
        speed, peak = float(row["tokens_per_second"]), float(row["peak_memory_gib"])
        print(f"ours: {row['run']}: {speed:.0f} tokens/s, {peak:.2f} GiB at most")
    task = evaluations[0]["tuned"]["task"]
    return Measured(
        seconds,
        sum(float(row["train_seconds"]) for row in rows),
        # The base is scored once: its scores are the same in every run.
        sum(one["tuned"]["seconds"] for one in evaluations) + evaluations[0]["base"]["seconds"],
        {
            # A setting with one value is no column.
            (int(row.get("lora.r", ranks[0])), float(row.get("optimizer.lr", rates[0]))): {
                name: float(row[f"{task}/{name}"]) for name in SCORES
            }
            for row in rows
        },
    )


def print_comparison(stock: Measured, ours: Measured) -> None:
    """Print the times and scores of both sides."""
    print("rank, rate     base: stock, ours     acc: stock, ours     acc_norm: stock, ours")
    worst = dict.fromkeys(SCORES, 0.0)
    for place, theirs in stock.scores.items():
        pairs = {name: (theirs[name], ours.scores[place][name]) for name in SCORES}
        worst = {name: max(worst[name], abs(a - b)) for name, (a, b) in pairs.items()}
        columns = (f"  {a:9.4f} {b:9.4f}" for a, b in pairs.values())
        print(f"{place[0]:4}, {place[1]:g}".ljust(12), *columns)
    print("scores differ by at most", *(f"{value:.4f} ({name})" for name, value in worst.items()))
    is_equal = worst["base_acc"] == 0 and max(worst.values()) <= SCORES_MAY_DIFFER_BY
    number = len(stock.scores)
    parts = {
        f"a sweep of {number} runs with evaluation": (ours.seconds, stock.seconds),
        f"training {number} runs": (ours.training_seconds, stock.training_seconds),
        f"evaluating {number} runs": (ours.evaluation_seconds, stock.evaluation_seconds),
    }
    for what, (our_seconds, stock_seconds) in parts.items():
        told = {
            "what": what,
            "ratio": round(stock_seconds / our_seconds, 2),
            "ours": round(our_seconds, 1),
            "stock": round(stock_seconds, 1),
            "equal": is_equal,
        }
        print(json.dumps(told))


if __name__ == "__main__":
    main()
