"""Forecasts: what is asked, and how long it takes once the model was scored before."""

from __future__ import annotations

from pathlib import Path

from finetune.evaluation.forecast import Speeds
from finetune.evaluation.tasks import load_task
from tests.test_tasks import arc_rows, gsm8k_rows, local


def test_choices_are_timed_by_what_other_tasks_took(tmp_path: Path) -> None:
    """Twice the characters take twice as long; without a speed there are only counts."""
    speeds = Speeds(tmp_path / "speeds.json")
    first = load_task("arc_easy", local(tmp_path, "arc_easy", arc_rows()))
    rows = {split: found * 40 for split, found in arc_rows().items()}
    for number, row in enumerate(rows["test"]):
        row_of_its_own = {**row, "question": f"{number:03} {row['question']}"}
        rows["test"][number] = row_of_its_own
    longer = load_task("arc_challenge", local(tmp_path, "arc_challenge", rows))
    assert speeds.forecast(first) == "arc_easy: 5 questions, 15 choices"
    speeds.record(first, 10.0)
    assert speeds.forecast(first) == "arc_easy: 5 questions, 15 choices, about 10 s"
    minutes = longer.num_characters / first.num_characters * 10 / 60
    said = f"arc_challenge: 200 questions, 600 choices, about {minutes:.0f} min"
    assert speeds.forecast(longer) == said
    assert minutes > 5


def test_generations_are_bounded_and_timed_by_their_own_task(tmp_path: Path) -> None:
    """The longest answer is told at once; a time only after the same task, per question."""
    speeds = Speeds(tmp_path / "speeds.json")
    settings = local(tmp_path, "gsm8k", gsm8k_rows())
    task = load_task("gsm8k", settings)
    speeds.record(load_task("arc_easy", local(tmp_path, "arc_easy", arc_rows())), 1.0)
    assert speeds.forecast(task) == "gsm8k: 7 questions, answers of up to 256 tokens"
    speeds.record(task, 700.0)
    settings.limit = 2
    few = load_task("gsm8k", settings)
    assert speeds.forecast(few).endswith(", answers of up to 256 tokens, about 3 min")


def test_what_choices_share_counts_once(tmp_path: Path) -> None:
    """The measure is what the scorer forwards: a question once, its choices each."""
    task = load_task("arc_easy", local(tmp_path, "arc_easy", arc_rows(), limit=1))
    context, _ = task.requests[0].args
    choices = [request.args[1] for request in task.requests]
    assert task.num_characters == len(context) + sum(map(len, choices)) - 2  # their blanks
