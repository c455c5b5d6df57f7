"""Remarks on scores of one table that are not comparable: other questions, dtype or hardware."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.tracking.run_folder import RunFolder
from finetune.tracking.score_files import TaskScores

# Of each part of a score's setup its name in remarks, and whether it changes the questions.
SETUP = {
    "limit": ("evaluation.limit", True),
    "num_fewshot": ("evaluation.num_fewshot", True),
    "chat_template": ("evaluation.chat_template", True),
    "version": ("lm-eval's version of the task", True),
    "digest": ("the task's questions, prompts or definition", True),
    "num_questions": ("the number of questions", True),
    "dtype": ("the dtype of scoring", False),
}
MACHINE = ("threads", "gpu")  # of environment.json: they change the last bits of every number


@dataclass(frozen=True)
class Mixtures:
    """Differences between the setups of one task's scores."""

    remarks: list[str]
    questions_differ: bool  # then the runs are not ranked by this task


def find_mixtures(task: str, scores: Mapping[str, TaskScores]) -> Mixtures:
    """Compare the setups with which the runs of a table were scored.

    Args:
        task: its name.
        scores: by the run's label; runs without scores are left out.
    """
    sides = {
        (label, side): one.setup
        for label, both in scores.items()
        for side, one in both.sides.items()
    }
    remarks, questions_differ = [], False
    for key, (name, asks_others) in SETUP.items():
        # Scores of older versions lack some.
        values = {where: one[key] for where, one in sides.items() if key in one}
        if len(set(map(json.dumps, values.values()))) < 2:
            continue
        if key == "digest" and questions_differ:
            continue  # a consequence of the remark before
        labels = {f"{label} ({side})": value for (label, side), value in values.items()}
        detail = "" if key == "digest" else f": {_grouped(labels)}"
        remarks.append(f"{task}: {name} differs between scores of this table{detail}")
        questions_differ |= asks_others
    if questions_differ:
        remarks.append(f"{task}: the runs are not ranked by it, since they were scored differently")
    return Mixtures(remarks, questions_differ)


def find_machine_mixtures(runs: Mapping[str, RunFolder]) -> list[str]:
    """Return remarks on runs of a table that ran on different hardware or thread counts."""
    environments = {label: run.read_json("environment.json") or {} for label, run in runs.items()}
    remarks = []
    for key in MACHINE:
        values = {label: one[key] for label, one in environments.items() if key in one}
        if len(set(map(str, values.values()))) > 1:
            remarks.append(
                f"{key} differs between runs of this table: {_grouped(values)}; equal settings "
                "can then give numbers that differ in their last digits"
            )
    return remarks


def _grouped(values: Mapping[str, Any]) -> str:
    """Return each value with the labels that have it, the most frequent first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label, value in values.items():
        groups["not set" if value is None else str(value)].append(label)
    parts = sorted(groups.items(), key=lambda group: -len(group[1]))
    return "; ".join(f"{value} in {_shortened(labels)}" for value, labels in parts)


def _shortened(labels: list[str]) -> str:
    shown = ", ".join(labels[:3])
    return f"{shown} and {len(labels) - 3} more" if len(labels) > 3 else shown
