"""A sweep of one run whose questions and answers are given, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from finetune.config.schema import Config
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.sweep_record import RunRecord, SweepRecord

TASK = "questions"

Line = dict[str, Any]  # of a run's items


def ask(number: int, base: float, tuned: float, metric: str = "acc", **texts: Any) -> Line:
    """Return one line of a run's items."""
    sides = {"base": {metric: base}, "tuned": {metric: tuned}}
    return {"hash": f"h{number}", "prompt": f"p{number}", **sides, **texts}


def write_sweep(folder: Path, items: list[Line], *, keep_texts: bool = True) -> Path:
    """Write a sweep of one finished run, and return its folder."""
    run = RunFolder(folder / "outputs" / "run")
    config = OmegaConf.structured(Config)
    config.evaluation.keep_texts = keep_texts
    run.write_text("config.yaml", OmegaConf.to_yaml(config))
    run.write_json("status.json", {"state": "finished", "reason": None, "last_lines": []})
    metrics = dict.fromkeys(metric for item in items for metric in item["tuned"])
    sides = {
        side: {
            "metrics": {metric: _mean(items, side, metric) for metric in metrics},
            "definitions": {
                metric: {"aggregation": "mean", "higher_is_better": True} for metric in metrics
            },
            "num_questions": len(items), "seconds": 1.0,
        }
        for side in ("base", "tuned")
    }  # fmt: skip
    run.write_json(f"evaluation/{TASK}.json", sides)
    lines = "".join(json.dumps(item) + "\n" for item in items)
    run.write_text(f"evaluation/{TASK}.items.jsonl", lines)
    sweep = folder / "multirun_reports" / "a-sweep"
    sweep.mkdir(parents=True)
    SweepRecord("a-sweep", [], [], [TASK], [RunRecord("../../outputs/run", {})]).write(sweep)
    return sweep


def _mean(items: list[Line], side: str, metric: str) -> float:
    values = [item[side][metric] for item in items if metric in item[side]]
    return float(sum(values) / len(values))
