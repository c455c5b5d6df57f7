"""Measure the scorer against lm-eval's own HFLM: the same questions, one thread, fp32.

    python -m benchmarks.evaluation [--quick] [--data FOLDER] [--device cuda] [--tokenizer FOLDER]
        [--only texts]

FOLDER holds arc_easy_test.jsonl and arc_easy_train.jsonl; without it only the demo is measured.
Both score in one process on one core, in turns. Prints the times and answers of both, and at the
end one JSON object per comparison; a ratio above 1 means that ours is faster. On CUDA the model has
random weights and the shape of Mistral-7B, in 4-bit, and computes in bf16 and in fp32; HFLM takes
the fastest of several batch sizes. With random weights most answers are near ties: the number of
answers that differ in bf16 is printed, and only fp32 is held to the same answers.

Generated texts are those of 60 questions of examples/questions.jsonl and of 20 word problems in the
shape of gsm8k, five-shot; HFLM takes the fastest of several batch sizes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks.mistral_shaped import mistral_shaped
from benchmarks.options import build_parser
from benchmarks.stock import as_it_comes
from benchmarks.word_problems import make_problems
from finetune.config.schema import EvaluationConfig, ModelConfig
from finetune.data.questions import QuestionPrompt
from finetune.evaluation.harness import TaskScore, score
from finetune.evaluation.loglikelihood import PLAIN_BATCH_SIZE, Request, SharedContextLM
from finetune.evaluation.prefix_tree import count_tokens
from finetune.evaluation.question_tasks import load_questions
from finetune.evaluation.scoring import Scoring
from finetune.evaluation.tasks import LoadedTask, load_task
from finetune.models.base_model import find_model, load_base, load_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
ROUNDS = 2  # in the second, ours goes first
BATCH_SIZES = (32, 128)  # of HFLM on a card
TEXT_BATCH_SIZES = (4, 16, 64)  # of HFLM, for texts
QUESTIONS = Path(__file__).parents[1] / "examples" / "questions.jsonl"
TOLERANCE = 1e-4  # nats, of a log-likelihood in fp32


class Stock(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """Stock HFLM, with the `scoring` that TaskScore records."""

    scoring = Scoring("plain", "it is measured")


def compare_texts(
    what: str, task: LoadedTask, evaluation: EvaluationConfig, device: torch.device
) -> dict[str, Any]:
    """Generate the texts of one task by both; print and return the comparison."""
    model = ModelConfig()
    source = find_model(model)
    base, tokenizer = load_base(model, source, device), load_tokenizer(model, source)
    sizes = [size for size in TEXT_BATCH_SIZES if size <= 2 * len(task.requests)]
    stock: dict[int, float] = {}
    texts: dict[str, list[Any]] = {}
    for size in sizes:
        plain = Stock(pretrained=base, tokenizer=tokenizer, batch_size=size)
        with as_it_comes():
            found = score(plain, task, evaluation)
        stock[size], texts["stock"] = found.seconds, [item.said for item in found.items]
    best = min(stock, key=lambda size: stock[size])
    lm = SharedContextLM(base, tokenizer)
    ours = score(lm, task, evaluation)
    plain = Stock(pretrained=base, tokenizer=tokenizer, batch_size=best)
    with as_it_comes():  # again, beside ours
        found = score(plain, task, evaluation)
    texts["ours"] = [item.said for item in ours.items]
    other = sum(a != b for a, b in zip(texts["stock"], texts["ours"], strict=True))
    print(f"\n{what}: {len(ours.items)} texts; {other} differ; {lm.scoring.ties} ties in the check")
    print("  HFLM " + ", ".join(f"{one:.1f} s at {size}" for size, one in stock.items()))
    print(f"  ours {ours.seconds:.1f} s, of which the check {lm.scoring.check_seconds:.1f} s")
    return {
        "what": what,
        "ratio": round(found.seconds / ours.seconds, 2),
        "ours": round(ours.seconds, 1),
        "stock": round(found.seconds, 1),
        "batch_size": best,
        "flipped": other,
        "equal": other == 0,
    }


def text_tasks(quick: bool) -> dict[str, tuple[LoadedTask, EvaluationConfig]]:
    """Return the tasks whose texts are generated."""
    folder = Path(tempfile.mkdtemp())
    own, problems = (6, 2) if quick else (60, 20)
    rows = []
    for row in map(json.loads, QUESTIONS.read_text(encoding="utf-8").splitlines()):
        choices = row.pop("choices", None)
        answer = row["answer"]
        if choices is not None and answer not in choices:
            place = answer if isinstance(answer, int) else ord(answer) - ord("A")
            row["answer"] = choices[place]
        rows.append(row)
    files = {
        "questions": rows[-own:],
        "train": make_problems(20, 1),
        "test": make_problems(problems),
    }
    for name, some in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    asked = EvaluationConfig(["questions"], questions=str(folder / "questions.jsonl"))
    prompt = QuestionPrompt.load(None, "alpaca", None)
    splits = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    gsm8k = EvaluationConfig(["gsm8k"], num_fewshot=5, data_files={"gsm8k": splits})
    load = partial(load_questions, asked, prompt, selects=False)
    return {
        f"{own} own questions": (load_task("questions", asked, build=load), asked),
        f"gsm8k 5-shot, {problems} questions": (load_task("gsm8k", gsm8k), gsm8k),
    }


class Timed:
    """Pass requests to a model, and keep its time and answers."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self.seconds = 0.0
        self.answers: list[tuple[float, bool]] = []
        self.loglikelihood_of = lm.loglikelihood
        lm.loglikelihood = self.loglikelihood

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Answer by the model, timed."""
        with as_it_comes() if isinstance(self.lm, Stock) else nullcontext():
            started = time.perf_counter()
            self.answers = self.loglikelihood_of(requests)
            self.seconds += time.perf_counter() - started
        return self.answers


def compare(
    what: str, evaluation: EvaluationConfig, model: ModelConfig, device: torch.device
) -> dict[str, Any]:
    """Score one task by both in turns; print and return the comparison."""
    source = find_model(model)
    base = load_base(model, source, device)
    tokenizer = load_tokenizer(model, source)
    task = load_task(evaluation.tasks[0], evaluation)
    sizes = [PLAIN_BATCH_SIZE] if device.type == "cpu" else BATCH_SIZES
    tried = {
        size: Timed(Stock(pretrained=base, tokenizer=tokenizer, batch_size=size)) for size in sizes
    }
    size = sizes[0] if len(sizes) == 1 else fastest(tried, task, evaluation)
    stock = tried[size]
    stock.seconds = 0.0
    ours = Timed(SharedContextLM(base, tokenizer))
    scores: dict[str, TaskScore] = {}
    for number in range(ROUNDS):
        for name, timed in (("stock", stock), ("ours", ours))[:: 1 if number % 2 == 0 else -1]:
            scores[name] = score(timed.lm, task, evaluation)
    differences = [abs(a[0] - b[0]) for a, b in zip(ours.answers, stock.answers, strict=True)]
    flipped = count_flips(scores["stock"], scores["ours"])
    is_exact = flipped == 0 and max(differences) <= TOLERANCE
    least, read = needed_tokens(ours.lm, [i for t in task.tasks.values() for i in t.instances])
    shown = {name: scores[name].metrics for name in scores}
    print(f"\n{what}: {len(scores['ours'].items)} questions, {len(differences)} requests")
    print(f"  HFLM's batch size {size}; {flipped} questions are answered differently")
    for name, timed in (("stock", stock), ("ours", ours)):
        accuracy = "  ".join(f"{m} {shown[name][m]:.6f}" for m in ("acc", "acc_norm"))
        print(f"  {name:5}  {timed.seconds / ROUNDS:7.1f} s  {accuracy}")
    ratio, check = stock.seconds / ours.seconds, ours.lm.scoring.check_seconds
    print(f"  ratio {ratio:.2f}; {check:.1f} s of ours are the check's, however many questions")
    print(f"  largest difference of a log-likelihood {max(differences):.2g}")
    print(
        f"  tokens: stock {read}, ours {ours.lm.scoring.forwarded_tokens}, least possible {least}"
    )
    return {
        "what": what,
        "ratio": round(ratio, 2),
        "ours": round(ours.seconds / ROUNDS, 1),
        "stock": round(stock.seconds / ROUNDS, 1),
        "flipped": flipped,
        "equal": is_exact or model.dtype == "bf16",
    }


def fastest(tried: dict[int, Timed], task: LoadedTask, evaluation: EvaluationConfig) -> int:
    """Return the batch size with which HFLM is fastest; one that does not fit is left out."""
    for timed in tried.values():
        try:
            score(timed.lm, task, evaluation)
        except torch.OutOfMemoryError:
            timed.seconds = math.inf
    return min(tried, key=lambda size: tried[size].seconds)


def count_flips(one: TaskScore, other: TaskScore) -> int:
    """Return the number of questions that are answered differently."""
    pairs = zip(one.items, other.items, strict=True)
    return sum((a.hash, a.outcomes) != (b.hash, b.outcomes) for a, b in pairs)


def needed_tokens(lm: SharedContextLM, instances: Sequence[Instance]) -> tuple[int, int]:
    """Return the tokens of the prefix tree, and those that stock computes without padding."""
    requests: list[Request] = []
    for instance in instances:
        context, continuation = instance.args
        requests.append((instance.args, *lm._encode_pair(context, continuation)))
    sequences = [lm._tokens((tuple(a), tuple(b))) for _, a, b in requests]
    return count_tokens(list(set(sequences))), sum(map(len, sequences))


def choice_tasks(data: Path, dtype: str, quick: bool) -> list[tuple[str, EvaluationConfig]]:
    """Return the tasks whose choices are scored: on CUDA all of ARC-Easy, in fp32 few of it."""
    files = {split: str(data / f"arc_easy_{split}.jsonl") for split in ("test", "train")}
    if not all(Path(file).is_file() for file in files.values()):
        print(f"no ARC-Easy files in {data}: measured on the demo only")
        return [("demo_science", EvaluationConfig(["demo_science"], limit=30 if quick else 400))]
    few, many = {"": (80, 400), ", bf16": (80, None), ", fp32": (4, 200)}[dtype]
    if quick:
        few, many = min(few, 6), 30
    tasks = [] if dtype else [("demo_science", EvaluationConfig(["demo_science"], limit=many))]
    return tasks + [
        (
            f"arc_easy {what}",
            EvaluationConfig(
                ["arc_easy"], num_fewshot=shots, limit=limit, data_files={"arc_easy": files}
            ),
        )
        for what, shots, limit in (("zero-shot", 0, many), ("5-shot", 5, few))
    ]


def main() -> None:
    """Run all comparisons whose data is available."""
    quick, data = "fewer questions: two minutes", "the folder of ARC-Easy files"
    parser = build_parser(__doc__, quick=quick, data=data, default=DATA)
    parser.add_argument("--only", choices=("texts",), help="generated texts alone")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    if given.device == "cuda":
        device, path = torch.device("cuda", 0), str(mistral_shaped(given.tokenizer))
        models = {f", {dtype}": ModelConfig(path=path, dtype=dtype) for dtype in ("bf16", "fp32")}
    else:
        device, models = torch.device("cpu"), {"": ModelConfig()}
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    found = [
        compare(what + dtype, evaluation, model, device)
        for dtype, model in models.items()
        for what, evaluation in ([] if given.only else choice_tasks(given.data, dtype, given.quick))
    ]
    if given.device != "cuda":
        found += [
            compare_texts(what, *asked, device) for what, asked in text_tasks(given.quick).items()
        ]
    print()
    for comparison in found:
        print(json.dumps(comparison))


if __name__ == "__main__":
    main()
