"""Results: each metric in its direction, ties, runs without a base, and what is not shared."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console

from finetune.config.schema import TrackingConfig
from finetune.files import parse_lines
from finetune.reporting.end_tables import render_end
from finetune.reporting.pages import write_report
from finetune.reporting.results import Results, read_results
from finetune.reporting.run_list import ListedRun, render_list
from finetune.reporting.run_pair import render_pair
from finetune.reporting.sweep_summaries import summarise
from finetune.reporting.verdict import verdict
from finetune.statistics.metrics import Metric, compute
from finetune.tracking.events import EventLog
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.sweep_record import RunRecord, SweepRecord
from finetune.tracking.tracker import build_tracker

LOWER = Metric("mean", higher_is_better=False)
ACC = Metric("mean", higher_is_better=True)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write pages without pictures, which take most of a report's time."""
    monkeypatch.setattr("finetune.reporting.figures.draw_figures", lambda *_: {})
    monkeypatch.setattr("finetune.reporting.charts.build_charts", lambda _: [])
    monkeypatch.setattr("finetune.reporting.figures.read_javascript", lambda: "")


Task = Mapping[str, tuple[Metric, Sequence[Any] | None, Sequence[Any]]]  # base's and tuned values


def write_run(path: Path, tasks: Mapping[str, Task], loss: float | None = None) -> None:
    """Write the files that a finished run leaves: scores, outcomes, status and training."""
    run = RunFolder(path)
    run.write_json("status.json", {"state": "finished"})
    run.write_json("environment.json", {"versions": {}, "threads": 1})
    run.write_json("training.json", {"mean_loss": 1.5, "validation_loss": loss})
    for name, task in tasks.items():
        sides: dict[str, dict[str, Any]] = {}
        items: dict[int, dict[str, Any]] = {}
        for metric, (definition, *both) in task.items():
            for side, values in zip(("base", "tuned"), both, strict=True):
                if values is None:
                    continue
                score = sides.setdefault(
                    side,
                    {"task": name, "metrics": {}, "seconds": 1.0, "num_questions": len(values),
                     "definitions": {}, "setup": {"dtype": "float32", "limit": None}},
                )  # fmt: skip
                known = definition.is_known
                score["metrics"][metric] = compute(definition, values) if known else 10.0
                score["metrics"][f"{metric}_stderr"] = 0.01
                score["definitions"][metric] = asdict(definition)
                for number, value in enumerate(values):
                    item = items.setdefault(number, {"hash": f"h{number}", "prompt": "p"})
                    item.setdefault(side, {})[metric] = value
        run.write_json(f"evaluation/{name}.json", sides)
        lines = "".join(json.dumps(item) + "\n" for item in items.values())
        run.write_text(f"evaluation/{name}.items.jsonl", lines)
    events = EventLog(run.events)
    for step in (1, 2):
        events.metrics({"train/loss": 2.0 - step / 4}, step)
    events.metrics({"train/mean_loss": 1.5}, 2)
    events.status("finished")
    events.close()
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_config.json").write_text("{}")


def write_sweep(
    root: Path, runs: Sequence[Mapping[str, Task]], losses: Sequence[float | None] = ()
) -> Path:
    """Write a sweep over lora.r and return its folder."""
    records = []
    for number, tasks in enumerate(runs):
        write_run(root / f"run-{number}", tasks, losses[number] if losses else None)
        records.append(RunRecord(f"../run-{number}", {"lora.r": str(2 ** (number + 1))}))
    folder = root / "sweep"
    folder.mkdir()
    SweepRecord("sweep", ["lora.r=..."], ["lora.r"], list(runs[0]), records).write(folder)
    return folder


def end_lines(results: Results, width: int = 80) -> list[str]:
    """Return the lines that the terminal shows at the end of a sweep."""
    console = Console(width=width)
    with console.capture() as captured:
        console.print(render_end(results, width))
    return [line.rstrip() for line in captured.get().splitlines()]


def page(results: Results) -> str:
    return (results.folder / "report.md").read_text()


BASE = [9.0, 8.0, 7.5, 9.5, 8.8, 7.9, 9.1, 8.4, 8.6, 9.9]
LESS = [value - 1 - 0.1 * (n % 3) for n, value in enumerate(BASE)]
LEAST = [value - 3 - 0.1 * (n % 3) for n, value in enumerate(BASE)]
MORE = [value + 1 + 0.1 * (n % 3) for n, value in enumerate(BASE)]


def test_a_runs_scores_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's file is hashed and parsed once, for the row, the checks and the comparison."""
    folder = write_sweep(tmp_path, [{"arc": {"acc": (ACC, [0, 1], [1, 1])}}] * 2)
    read: list[tuple[str, str]] = []
    read_scores = RunFolder.read_scores

    def count(run: RunFolder, task: str) -> Any:
        read.append((run.name, task))
        return read_scores(run, task)

    monkeypatch.setattr(RunFolder, "read_scores", count)
    read_results(folder)
    assert len(read) == len(set(read))


def test_a_runs_events_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the damage check, the last loss and the curves: of 240 runs this is most of the time."""
    folder = write_sweep(tmp_path, [{"arc": {"acc": (ACC, [0, 1], [1, 1])}}] * 2)
    read: list[str] = []

    def count(raw: bytes, is_valid: Any) -> Any:
        read.append(is_valid.__name__)
        return parse_lines(raw, is_valid)

    monkeypatch.setattr("finetune.tracking.events.parse_lines", count)
    results = read_results(folder)
    assert read == ["is_event"] * 2
    assert [row["train/loss"] for row in results.rows] == [1.5, 1.5]


@pytest.mark.usefixtures("no_figures")
def test_where_lower_is_better_the_lowest_is_best(tmp_path: Path) -> None:
    """The best run, the claim, the table's order and the view all have the metric's direction."""
    runs = [{"crows": {"likelihood_diff": (LOWER, BASE, tuned)}} for tuned in (LESS, LEAST, MORE)]
    results = write_report(write_sweep(tmp_path, runs))
    assert results.best_run() == "run-1"
    assert results.lowest_first
    said = verdict(results)
    assert said.startswith("lora.r=4 scores 5.5800 in crows/likelihood_diff (lower is better), -3")
    assert "2 of 3 runs are significantly better" in said
    assert "| lora.r=8 | 8.6700 | 9.7600 | **+1.09** |" in page(results)
    assert "| 0 / 10 |" in page(results)
    assert "points" not in said
    assert "Lower is better." in page(results)


def log_likelihoods(shift: float) -> list[float]:
    return [-(2 + shift + n % 4 / 5) for n in range(20)]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("metric", "base", "tuned"),
    [
        (Metric("perplexity", False), log_likelihoods(0.5), log_likelihoods(0.0)),
        (
            Metric("weighted_perplexity", False),
            [[value, 2 + n % 3] for n, value in enumerate(log_likelihoods(0.5))],
            [[value, 2 + n % 3] for n, value in enumerate(log_likelihoods(0.0))],
        ),
        (
            Metric("matthews_corrcoef", True),
            [[n % 2, n % 3 % 2] for n in range(40)],
            [[n % 2, n % 2 if n % 8 else n % 3 % 2] for n in range(40)],
        ),
    ],
)
def test_table_csv_and_report_speak_of_one_quantity(
    metric: Metric, base: list[Any], tuned: list[Any], tmp_path: Path
) -> None:
    """Difference and interval are of the number that is shown, not of the questions' mean."""
    runs = [{"task": {"name": (metric, base, one)}} for one in (tuned, base)]
    results = write_report(write_sweep(tmp_path, runs))
    with (results.folder / "results.csv").open() as file:
        row, same = csv.DictReader(file)
    low, value, high = (float(row[f"task/name_diff{end}"]) for end in ("_low", "", "_high"))
    assert low < value < high
    assert float(row["task/name"]) == pytest.approx(compute(metric, tuned))
    assert float(row["task/base_name"]) == pytest.approx(compute(metric, base))
    assert value == pytest.approx(compute(metric, tuned) - compute(metric, base))
    assert results.best_run() == "run-0"
    assert f"{compute(metric, tuned):.4f}" in verdict(results)
    assert "bootstrap" in page(results)
    assert (same["task/name_diff_low"], same["task/name_diff_high"]) == ("", "")
    assert "| no detectable difference |  |  |  |  |" in page(results)


def test_without_a_base_every_metric_is_shown_and_a_best_run_chosen(tmp_path: Path) -> None:
    """Generated answers too; nothing is claimed."""
    runs: list[Mapping[str, Task]] = [
        {"sciq": {"acc": (ACC, None, right)}, "triviaqa": {"exact_match": (ACC, None, [1.0, 0.0])}}
        for right in ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    ]
    results = write_report(write_sweep(tmp_path, runs))
    assert results.best_run() == "run-1"
    said = verdict(results)
    assert said.startswith("lora.r=4 has the best sciq/acc of 2 runs, 0.6667 (higher is better).")
    assert "no improvement is claimed" in said
    assert "In triviaqa/exact_match lora.r=4 scores 0.5000." in said
    assert "| lora.r=2 | 0.5000 | 0.0100 |" in page(results)
    shown = end_lines(results)
    assert shown[shown.index("triviaqa") + 1].split() == ["lora.r", "exact_match"]
    drawn = {path.name for path in results.folder.glob("figures/*.png")}
    assert "grid.png" in drawn
    assert not any(name.startswith("differences-") for name in drawn)


@pytest.mark.parametrize(
    ("losses", "best", "reason"),
    [
        ([1.5, 1.25], "run-1", "lora.r=4 is named since it has the lowest validation loss"),
        ([None, None], "run-0", "lora.r=2 is named since it comes first in the grid"),
        ([1.5, 1.5], "run-0", "lora.r=2 is named since it comes first in the grid"),
    ],
)
@pytest.mark.parametrize("has_base", [True, False])
def test_a_tie_is_named_and_broken_by_the_validation_loss(
    losses: list[float | None], best: str, reason: str, has_base: bool, tmp_path: Path
) -> None:
    """Equal scores are no accident of the grid's order."""
    base = [0.0] * 8 if has_base else None
    runs: list[Mapping[str, Task]] = [
        {"task": {"acc": (ACC, base, [1.0, 0.0] * 4)}},
        {"task": {"acc": (ACC, base, [0.0, 1.0] * 4)}},
    ]
    results = read_results(write_sweep(tmp_path, runs, losses))
    assert results.best_run() == best
    assert "A tie in task/acc: " in verdict(results)
    assert reason in verdict(results)


@pytest.mark.usefixtures("no_figures")
def test_one_run_has_one_p(tmp_path: Path) -> None:
    """There is no grid to adjust for, in words, table or csv."""
    run: Mapping[str, Task] = {"task": {"acc": (ACC, [0.0] * 12, [1.0] * 8 + [0.0] * 4)}}
    results = write_report(write_sweep(tmp_path, [run]))
    assert "adjusted" not in verdict(results)
    assert "adjusted |" not in page(results)
    found = results.comparisons["task/acc"].differences["run-0"]
    assert found.p == found.p_adjusted == pytest.approx(0.5**8)


def test_if_no_answer_changed_that_alone_is_said(tmp_path: Path) -> None:
    """No interval of width zero, no p, and no picture of nothing."""
    answers = [1.0, 0.0, 1.0]
    runs: list[Mapping[str, Task]] = [{"task": {"acc": (ACC, answers, answers)}}] * 2
    results = write_report(write_sweep(tmp_path, runs))
    said = "No detectable difference in task/acc: no answer differs from the base's in any of 2"
    assert verdict(results) == f"{said} runs."
    assert "| lora.r=2 | 0.6667 | 0.6667 | no detectable difference |  |  |  |  |" in page(results)
    assert "+0.0" not in page(results)
    assert "figures/differences-" not in page(results)


def test_the_verdict_speaks_of_every_task(tmp_path: Path) -> None:
    """Better in one, worse in another, equal in a third."""
    zeros, ones = [0.0] * 12, [1.0] * 12
    tasks: Mapping[str, Task] = {
        "first": {"acc": (ACC, [*zeros], [*ones[:9], *zeros[:3]])},
        "second": {"perplexity": (LOWER, BASE, MORE)},
        "third": {"acc": (ACC, ones, ones)},
    }
    results = read_results(write_sweep(tmp_path, [tasks]))
    said = verdict(results)
    assert said.startswith("lora.r=2 scores 0.7500 in first/acc, +75.0 points")
    assert re.search(r"In second/perplexity \(lower is better\) .*: significantly worse\.", said)
    assert "No detectable difference in third/acc" in said


@pytest.mark.usefixtures("no_figures")
def test_a_metric_without_a_direction_is_shown_and_never_ranked(tmp_path: Path) -> None:
    """Neither champion nor claim, and the reason in words."""
    unknown = Metric("mean", None)
    runs: list[Mapping[str, Task]] = [
        {"task": {"count": (unknown, BASE, tuned)}} for tuned in (LESS, MORE)
    ]
    results = write_report(write_sweep(tmp_path, runs))
    assert results.best_run() is None
    assert "lm-eval names no direction" in verdict(results)
    assert "it is shown, not ranked" in page(results)
    assert "| lora.r=2 | 8.6700 |" in page(results)
    ranked = write_sweep(tmp_path / "two", [{"task": {"n": (unknown, BASE, LESS), "acc": (
        ACC, [0.0, 1.0], [1.0, 1.0])}}])  # fmt: skip
    assert read_results(ranked).main_metric == "task/acc"


@pytest.mark.usefixtures("no_figures")
def test_runs_scored_on_different_questions_are_not_ranked(tmp_path: Path) -> None:
    """Another limit, shots or template is said with the runs that have it."""
    runs: list[Mapping[str, Task]] = [{"task": {"acc": (ACC, None, [1.0, 0.0])}} for _ in range(3)]
    folder = write_sweep(tmp_path, runs)
    change_setup(tmp_path / "run-2", limit=2, dtype="bfloat16")
    results = write_report(folder)
    assert results.best_run() is None
    assert "evaluation.limit differs" in page(results)
    assert "2 in lora.r=8 (tuned)" in page(results)
    assert "the dtype of scoring differs" in page(results)
    assert "not ranked" in verdict(results)


def change_setup(run: Path, **changes: Any) -> None:
    """Let a run have been scored otherwise."""
    folder = RunFolder(run)
    stored = folder.read_json("evaluation/task.json")
    for side in stored.values():
        side["setup"] |= changes
    folder.write_json("evaluation/task.json", stored)


@pytest.mark.usefixtures("no_figures")
def test_another_dtype_or_thread_count_is_said_and_still_ranked(tmp_path: Path) -> None:
    """They ask the same questions; what differs is in a remark."""
    runs: list[Mapping[str, Task]] = [
        {"task": {"acc": (ACC, [0.0, 0.0, 1.0], right)}} for right in ([1.0, 0.0, 1.0], [1.0] * 3)
    ]
    folder = write_sweep(tmp_path, runs)
    change_setup(tmp_path / "run-1", dtype="bfloat16")
    RunFolder(tmp_path / "run-1").write_json("environment.json", {"versions": {}, "threads": 2})
    results = write_report(folder)
    assert results.best_run() == "run-1"
    assert "the dtype of scoring differs" in page(results)
    assert "threads differs between runs of this table: 1 in lora.r=2; 2 in lora.r=4" in page(
        results
    )


@pytest.mark.usefixtures("no_figures")
def test_a_metric_that_only_lm_eval_computes_has_the_stored_resamples(tmp_path: Path) -> None:
    """Interval and p come from the file; without it the metric is shown, not compared."""
    bleu = Metric("bleu", True)
    texts: list[Any] = [["gold", f"answer {n}"] for n in range(6)]
    other: list[Any] = [["gold", f"better {n}"] for n in range(6)]
    folder = write_sweep(tmp_path, [{"task": {"bleu": (bleu, texts, other)}}] * 2)
    for number, gain in enumerate((3.0, 5.0)):
        run = RunFolder(tmp_path / f"run-{number}")
        stored = run.read_json("evaluation/task.json")
        stored["tuned"]["metrics"]["bleu"] = 10 + gain
        run.write_json("evaluation/task.json", stored)
        drawn = {"bootstrap": [gain + n / 50 for n in range(-50, 50)],
                 "swapped": [n / 50 for n in range(-50, 50)]}  # fmt: skip
        if number:
            continue
        run.write_json("resamples/task.json", {"bleu": {"of": "", **drawn}})
    results = write_report(folder)
    found = results.comparisons["task/bleu"].differences
    assert set(found) == {"run-0"}
    assert found["run-0"].low == pytest.approx(2.05, abs=0.1)
    assert found["run-0"].is_significant
    assert "6 changed" in page(results)
    (tmp_path / "run-0" / "resamples" / "task.json").unlink()
    assert "task/bleu is shown, but not compared" in " ".join(read_results(folder).remarks)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("stored_as", ["mean of log-likelihoods", "no outcomes"])
def test_scores_of_an_older_version_are_shown_without_a_claim(
    stored_as: str, tmp_path: Path
) -> None:
    """They have no definitions, and a perplexity's outcomes are not its own."""
    metric = Metric("perplexity", False)
    base, tuned = log_likelihoods(0.5), log_likelihoods(0.0)
    folder = write_sweep(tmp_path, [{"task": {"perplexity": (metric, base, tuned)}}])
    run = RunFolder(tmp_path / "run-0")
    stored = run.read_json("evaluation/task.json")
    for side in stored.values():
        del side["definitions"], side["setup"]
    run.write_json("evaluation/task.json", stored)
    if stored_as == "no outcomes":
        run.write_text("evaluation/task.items.jsonl", "")
    results = write_report(folder)
    assert results.comparisons == {}
    assert "run the same command again to score it" in page(results)
    assert results.metrics["task/perplexity"].higher_is_better is False
    assert results.best_run() == "run-0"


def test_old_accuracies_are_still_compared(tmp_path: Path) -> None:
    """A mean needs no definition; `loss` of an old training is its mean."""
    folder = write_sweep(tmp_path, [{"task": {"acc": (ACC, [0.0] * 9, [1.0] * 9)}}])
    run = RunFolder(tmp_path / "run-0")
    stored = run.read_json("evaluation/task.json")
    for side in stored.values():
        del side["definitions"], side["setup"]
    run.write_json("evaluation/task.json", stored)
    run.write_json("training.json", {"loss": 1.25, "validation_loss": None})
    results = read_results(folder)
    assert results.comparisons["task/acc"].is_improvement("run-0")
    assert (results.rows[0]["train/loss"], results.rows[0]["train/mean_loss"]) == (1.5, 1.25)


@pytest.mark.usefixtures("no_figures")
def test_two_losses_have_two_names_everywhere(tmp_path: Path) -> None:
    """The last step's is the curve's end; the mean is its own column and metric."""
    results = write_report(write_sweep(tmp_path, [{"task": {"acc": (ACC, None, [1.0])}}]))
    with (results.folder / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["train/loss"], row["train/mean_loss"]) == ("1.5", "1.5")
    assert "| mean loss | last loss |" in page(results)


def test_two_runs_are_compared_in_the_metrics_own_terms(tmp_path: Path) -> None:
    """The commands beside a sweep show perplexities and their interval, and every metric."""
    metric = Metric("perplexity", False)
    for number, shift in enumerate((0.5, 0.0)):
        values = log_likelihoods(shift)
        write_run(tmp_path / f"run-{number}", {"task": {"perplexity": (metric, values, values)}})
    runs = [RunFolder(tmp_path / f"run-{number}") for number in (0, 1)]
    table = render_pair(*runs)
    cells = [str(list(column.cells)[1]).strip() for column in table.columns]
    scores = [compute(metric, log_likelihoods(shift)) for shift in (0.5, 0.0)]
    assert cells[:3] == ["perplexity", *(f"{score:.4f}" for score in scores)]
    assert cells[3].startswith("-")
    assert cells[5] == "20 / 0"
    column = render_list([ListedRun.read(run) for run in runs], 80).columns[-1]
    assert str(column.header) == "task\nperplexity"
    assert [str(cell) for cell in column.cells] == [f"{score:.4f}" for score in scores]


@pytest.mark.parametrize(
    ("metric", "tuned", "best", "has_base"),
    [(LOWER, (LESS, LEAST, MORE), 1, True), (ACC, (LESS, LEAST, MORE), 2, False)],
)
def test_the_champion_is_the_best_run_in_the_metrics_direction(
    metric: Metric, tuned: Sequence[list[float]], best: int, has_base: bool, tmp_path: Path
) -> None:
    """The store's alias names the run that the report names."""
    base = BASE if has_base else None
    folder = write_sweep(tmp_path, [{"task": {"score": (metric, base, one)}} for one in tuned])
    results = read_results(folder)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = TrackingConfig(uri=uri, experiment="test")
    tracker = build_tracker(settings, folder, sweep_name="sweep", swept=["lora.r"])
    for run in results.runs:
        tracker.follow(run)
    tracker.describe(summarise(results))
    behind = tracker.close(state="finished")
    assert behind is None
    client = mlflow.MlflowClient(uri)
    (model,) = client.search_registered_models()
    champion = str(client.get_model_version_by_alias(model.name, "champion").run_id)
    assert client.get_run(champion).data.tags["finetune.run"] == f"run-{best}"
    assert client.get_run(champion).data.metrics["train/mean_loss"] == 1.5
