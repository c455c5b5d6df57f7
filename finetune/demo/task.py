"""The lm-eval task `demo_science`: acc and acc_norm, and acc on taught and on control facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def task_config() -> dict[str, Any]:
    """Return the task of demo_science.yaml, for lm-eval's TaskManager."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(FOLDER / "demo_science.yaml")
    return config


def load_questions(**_: Any) -> Any:
    """Return the questions as lm-eval expects them: a split `test`."""
    from datasets import Dataset, DatasetDict

    text = (FOLDER / "questions.jsonl").read_text(encoding="utf-8")
    return DatasetDict({"test": Dataset.from_list([json.loads(x) for x in text.splitlines()])})


def process_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Score one question as lm-eval's multiple_choice does, also as acc_taught or acc_control.

    Args:
        doc: the question.
        results: for each choice its log-likelihood and whether greedy decoding gives it.
    """
    likelihoods = [result[0] for result in results]
    # acc_norm divides by the length in characters.
    normalised = [x / len(c) for x, c in zip(likelihoods, doc["choices"], strict=True)]
    acc = float(_argmax(likelihoods) == doc["answer"])
    return {
        "acc": acc,
        "acc_norm": float(_argmax(normalised) == doc["answer"]),
        "acc_taught" if doc["taught"] else "acc_control": acc,
    }


def _argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
