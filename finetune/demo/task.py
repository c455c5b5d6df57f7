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
    from finetune.evaluation.question_tasks import score_choices

    scores = score_choices({**doc, "gold": doc["answer"]}, results)
    return {
        "acc": scores["acc"],
        "acc_norm": scores["acc_norm"],
        "acc_taught" if doc["taught"] else "acc_control": scores["acc"],
    }
