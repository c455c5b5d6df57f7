"""At the end of a sweep the terminal shows training and each task, within its width."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.reporting.results import read_results
from finetune.tracking.run_folder import RunFolder
from tests.test_results import ACC, Task, end_lines, write_sweep

RIGHT = [0.0, 1.0] * 30


def write(tmp_path: Path, metrics: list[str], base: list[float] | None) -> Path:
    """Write a sweep of two runs over two tasks; the second run of it is right throughout."""
    tasks: list[dict[str, Task]] = [
        {name: dict.fromkeys(metrics, (ACC, base, tuned)) for name in ("one_task", "other_task")}
        for tuned in (RIGHT, [1.0] * 60)
    ]
    return write_sweep(tmp_path, tasks)


def test_a_task_stands_on_its_own_line_with_the_base_above_its_runs(tmp_path: Path) -> None:
    """Each score has its difference below it, starred where it is significant."""
    lines = end_lines(read_results(write(tmp_path, ["acc", "acc_norm"], RIGHT)))
    assert lines[0].split() == ["lora.r", "status", "mean", "loss", "train", "time"]
    assert lines[1].split() == ["2", "finished", "1.500"]
    task = lines.index("other_task")
    assert [line.split() for line in lines[task : task + 6]] == [
        ["other_task"],
        ["lora.r", "acc", "acc_norm"],
        ["base", "0.5000", "0.5000"],
        ["2", "0.5000", "0.5000"],
        ["+0.0000", "+0.0000"],
        ["4", "1.0000", "1.0000"],
    ]
    assert lines[task + 6].split() == ["+0.5000*", "+0.5000*"]
    assert lines[-1].startswith("* significant: p < .05")


def test_bases_that_differ_stand_beside_the_scores(tmp_path: Path) -> None:
    """As of several models in one grid."""
    folder = write(tmp_path, ["acc"], RIGHT)
    run = RunFolder(tmp_path / "run-1")
    scores = run.read_json("evaluation/one_task.json")
    scores["base"]["metrics"]["acc"] = 0.25
    run.write_json("evaluation/one_task.json", scores)
    lines = end_lines(read_results(folder))
    task = lines.index("one_task")
    assert lines[task + 2].split() == ["2", "0.5000", "->", "0.5000"]
    assert lines[task + 4].split() == ["4", "0.2500", "->", "1.0000"]


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize("base", [RIGHT, None])
def test_more_metrics_than_a_line_holds_have_more_tables(
    width: int, base: list[float] | None, tmp_path: Path
) -> None:
    """No line is longer than the terminal, and no number is broken."""
    metrics = [f"a_metric_{number}" for number in range(9)]
    lines = end_lines(read_results(write(tmp_path, metrics, base)), width)
    assert max(map(len, lines)) <= width
    headings = [word for line in lines for word in line.split() if word in metrics]
    assert headings == metrics * 2
    assert [line for line in lines if line.split() == []] == ["", ""]
