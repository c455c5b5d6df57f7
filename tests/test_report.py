"""The report: golden tables from fixed outcomes, pages that need nothing, honest words."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.reporting.pages import write_report
from finetune.reporting.results import read_results
from finetune.reporting.verdict import verdict
from finetune.tracking.sweep_record import RunRecord, SweepRecord
from tests.test_results import end_lines

TASK = "arc_easy"


def score(right: int, total: int) -> dict[str, object]:
    """Return what a run stores of one model on one task."""
    return {
        "task": TASK, "metrics": {"acc": right / total, "acc_stderr": 0.01}, "seconds": 2.0,
        "num_questions": total,
    }  # fmt: skip


def write_run(
    folder: Path, name: str, base: list[int], tuned: list[int], state: str = "finished"
) -> None:
    """Write the files that a run with these outcomes leaves."""
    run = folder / name
    (run / "evaluation").mkdir(parents=True)
    reason = None if state == "finished" else f"the <b>reason</b> of {name}"
    status = {"state": state, "reason": reason, "last_lines": ["first line", "last <line>"]}
    (run / "status.json").write_text(json.dumps(status))
    (run / "environment.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}}))
    events = [
        {"event": "metric", "key": "train/loss", "value": 2 - 0.1 * step, "step": step, "time": 0}
        for step in range(1, 9)
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if state != "finished":
        return
    trained = {
        "loss": 1.25, "validation_loss": None, "train_seconds": 60.0, "tokens_per_second": 99.5,
        "peak_memory_gib": 1.5, "num_trainable_parameters": 1000,
    }  # fmt: skip
    (run / "training.json").write_text(json.dumps(trained))
    scores = {"base": score(sum(base), len(base)), "tuned": score(sum(tuned), len(tuned))}
    (run / "evaluation" / f"{TASK}.json").write_text(json.dumps(scores))
    lines = [
        {"hash": f"h{n}", "prompt": f"p{n}", "base": {"acc": b}, "tuned": {"acc": t}}
        for n, (b, t) in enumerate(zip(base, tuned, strict=True))
    ]
    (run / "evaluation" / f"{TASK}.items.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )


BASE = [1] * 60 + [0] * 40
BETTER = [1] * 58 + [0] * 2 + [1] * 22 + [0] * 18  # 22 gained, 2 lost
EQUAL = [1] * 55 + [0] * 5 + [1] * 6 + [0] * 34  # 6 gained, 5 lost


def sweep(tmp_path: Path, swept: list[str], values: list[list[str]]) -> Path:
    """Write a sweep of one better run, equal ones, and a failed one, and return its folder."""
    runs = []
    for number, value in enumerate(values):
        tuned, state = (BETTER if number == 1 else EQUAL), "finished"
        if number == len(values) - 1:
            state = "failed"
        write_run(tmp_path / "outputs", f"run-{number}", BASE, tuned, state)
        places = dict(zip(swept, value, strict=True))
        runs.append(RunRecord(f"../../outputs/run-{number}", places))
    folder = tmp_path / "multirun_reports" / "a-sweep"
    folder.mkdir(parents=True)
    SweepRecord("a-sweep", ["lora.r=4,8"], swept, [TASK], runs).write(folder)
    return folder


@pytest.fixture
def by_rank(tmp_path: Path) -> Path:
    """Return a sweep over one key."""
    return sweep(tmp_path, ["lora.r"], [["4"], ["8"], ["16"], ["<script>alert(1)</script>"]])


def test_the_table_is_the_recorded_one(by_rank: Path) -> None:
    """Differences, flips, interval and p of fixed outcomes, by recorded references."""
    write_report(by_rank)
    page = (by_rank / "report.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| lora.r=8 | 0.6000")]
    assert rows == [
        "| lora.r=8 | 0.6000 | 0.8000 | **+20.0** | +11.1 to +28.9 | 22 / 2 | < .0001 | 0.0001 |"
    ]
    with (by_rank / "results.csv").open() as file:
        found = {row["lora.r"]: row for row in csv.DictReader(file)}
    assert float(found["8"][f"{TASK}/acc_p"]) == pytest.approx(
        (2 * (1 + 24 + 276) - 276) / 2**24  # two tails of 24 flips with at most 2, less the point
    )
    assert float(found["8"][f"{TASK}/acc_p_adjusted"]) < 0.001
    assert float(found["16"][f"{TASK}/acc_p_adjusted"]) > 0.9
    assert found["16"][f"{TASK}/acc_diff"] == "0.010000000000000009"


def test_the_verdict_claims_what_is_significant(by_rank: Path) -> None:
    """The best run by name, its interval, the size of the grid, and the caution it needs."""
    said = verdict(read_results(by_rank))
    assert said.startswith("lora.r=8 scores 0.8000 in arc_easy/acc, +20.0 points [+11.1, +28.9]")
    assert "adjusted for 3 runs" in said
    assert "1 of 3 runs are significantly better" in said


def test_the_verdict_claims_nothing_else(tmp_path: Path) -> None:
    """Without a significant difference it says so, and the minimum detectable one."""
    folder = sweep(tmp_path, ["lora.r"], [["4"], ["8"]])
    for file in tmp_path.glob("outputs/run-0/evaluation/*.jsonl"):
        assert file.exists()
    said = verdict(read_results(folder))
    assert said.startswith("No run is significantly better than the base in arc_easy/acc")
    assert re.search(
        r"Minimum detectable difference: [\d.]+ points \(5 % level, 80 % power\)", said
    )


def test_the_page_needs_no_network_and_escapes_what_it_is_given(by_rank: Path) -> None:
    """One file: charts and scripts inside, links only to click; values and reasons are text."""
    write_report(by_rank)
    page = (by_rank / "report.html").read_text()
    scripts = re.findall(r"<script.*?</script>", page, re.S)
    text = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r"src=|<link|url\(|@import", text)
    assert "http" not in re.sub(r'<a href="[^"]*"', "", text)
    assert len(scripts) == 3
    specs = json.loads(re.sub(r"</?script[^>]*>", "", scripts[0]))["specs"]
    assert len(specs) == page.count('<div class="chart"') == 4
    assert "University of Washington Interactive Data Lab" in text  # Vega's licence
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
    assert "the &lt;b&gt;reason&lt;/b&gt; of run-3" in page
    assert "last &lt;line&gt;" in page


@pytest.mark.parametrize(
    ("swept", "values"),
    [
        (["lora.r"], [["4"], ["8"], ["16"]]),
        (["lora.r", "optimizer.lr"], [["4", "1e-4"], ["4", "1e-3"], ["8", "1e-4"], ["8", "1e-3"]]),
        (["a", "b", "c"], [["1", "x", "p"], ["2", "x", "q"], ["1", "y", "q"], ["2", "y", "p"]]),
        (["lora.r", "training.seed"], [["4", "1"], ["4", "2"], ["8", "1"], ["8", "2"]]),
        ([], [[], []]),
    ],
)
def test_any_number_of_swept_keys_is_drawn(
    tmp_path: Path, swept: list[str], values: list[list[str]]
) -> None:
    """A line, a heat map, small multiples, and each setting's effect; seeds also together."""
    folder = sweep(tmp_path, swept, values)
    write_report(folder)
    drawn = {path.name for path in folder.glob("figures/*.png")}
    assert {f"differences-{TASK}.png", "loss.png"} <= drawn
    assert ("grid.png" in drawn) == bool(swept)
    assert sum(name.startswith("effect-") for name in drawn) == len(swept) * (len(swept) > 1)
    assert ("All seeds combined" in (folder / "report.md").read_text()) == (
        "training.seed" in swept
    )


@pytest.mark.slow
def test_the_command_writes_the_report_without_torch(by_rank: Path) -> None:
    """`python -m finetune.report DIR` needs only the files."""
    code = (
        "import runpy, sys; sys.argv = ['report', sys.argv[1]]\n"
        "runpy.run_module('finetune.report', run_name='__main__')\n"
        "assert not {'torch', 'mlflow', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(by_rank)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "lora.r=8 scores 0.8000" in done.stdout
    assert (by_rank / "report.html").exists()


def test_a_folder_that_is_no_sweeps_is_refused(tmp_path: Path) -> None:
    """One line and exit code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune.report", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == f"{tmp_path} is not a sweep's folder: sweep.yaml is missing"


def test_unequal_questions_are_not_compared_but_said(by_rank: Path, tmp_path: Path) -> None:
    """A run with other prompts stays in the table of costs, with a remark."""
    path = tmp_path / "outputs" / "run-0" / "evaluation" / f"{TASK}.items.jsonl"
    path.write_text(path.read_text().replace('"p7"', '"other"'))
    results = write_report(by_rank)
    assert results.comparisons == {}
    assert "is not compared" in results.remarks[0]
    assert "is not compared" in (by_rank / "report.md").read_text()


def test_a_validation_loss_is_shown_and_ranks_where_no_task_does(by_rank: Path) -> None:
    """The lowest is named, without a claim."""
    outputs = by_rank.parents[1] / "outputs"
    for number, loss in enumerate((1.5, 1.25, 1.75)):
        path = outputs / f"run-{number}" / "training.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"validation_loss": loss}))
        (outputs / f"run-{number}" / "evaluation" / f"{TASK}.json").unlink()
    results = write_report(by_rank)
    assert results.best_run() == "run-1"
    assert results.drawn_metrics() == ["validation/loss"]
    said = "lora.r=8 has the lowest validation loss, 1.2500, of 3 runs."
    assert verdict(results).startswith(said)
    page = (by_rank / "report.md").read_text()
    assert "| mean loss | last loss | validation loss |" in page
    assert re.search(r"^\| lora.r=8 .*\| 1.25 \| 1.2 \| 1.25 \|$", page, re.MULTILINE), page
    heading, *rows = end_lines(results)
    assert "validation loss" in heading
    assert "1.250" in rows[1].split()


def choose_by(folder: Path, scores: dict[str, float]) -> None:
    """Write each run's score on the questions that choose the best run."""
    for name, value in scores.items():
        chosen = {"tuned": {"metrics": {"acc": value}, "seconds": 1.0}}
        path = folder / "outputs" / name / "evaluation" / f"{TASK}.select.json"
        path.write_text(json.dumps(chosen))


def test_the_best_run_is_chosen_on_other_questions(by_rank: Path, tmp_path: Path) -> None:
    """The selection decides, the reported questions test only its choice, unadjusted."""
    choose_by(tmp_path, {"run-0": 0.5, "run-1": 0.6, "run-2": 0.7})
    results = write_report(by_rank)
    assert results.best_run() == "run-2"
    said = verdict(results)
    assert said.startswith("No significant improvement in arc_easy/acc: lora.r=16 differs by +1.0")
    assert "It was chosen from 3 runs on other questions." in said
    page = (by_rank / "report.md").read_text()
    assert "| lora.r=16 | 0.7000 | 0.6000 |" in page
    choose_by(tmp_path, {"run-1": 0.8})
    results = write_report(by_rank)
    assert verdict(results).startswith("lora.r=8 scores 0.8000 in arc_easy/acc, +20.0 points")
    with (by_rank / "results.csv").open() as file:
        assert [row[f"{TASK}/select_acc"] for row in csv.DictReader(file)] == [
            "0.5", "0.8", "0.7", "",
        ]  # fmt: skip
