"""What MLflow shows of a sweep beside its runs' events: parent, base, names, costs, differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from finetune.config.schema import TrackingConfig
from finetune.files import Damaged
from finetune.reporting.results import read_results
from finetune.reporting.sweep_summaries import summarise
from finetune.sweeps import run_sweep
from finetune.tracking.mirror import Mirror
from finetune.tracking.mlflow_store import open_store
from finetune.tracking.sweep_record import RunRecord, SweepRecord, label_run
from finetune.tracking.sweep_summary import SweepSummary
from finetune.tracking.tracker import build_tracker, send
from tests.test_results import ACC, write_run, write_sweep

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own

ZEROS, HALF, ONES = [0.0] * 20, [0.0, 1.0] * 10, [1.0] * 20


def send_sweep(uri: str, folder: Path) -> dict[str, Any]:
    """Send a sweep as its process does, and return its MLflow runs by their names."""
    results = read_results(folder)
    settings = TrackingConfig(uri=uri, experiment="test")
    tracker = build_tracker(settings, folder, sweep_name="sweep", swept=["lora.r"])
    for run in results.runs:
        tracker.follow(run)
    tracker.describe(summarise(results))
    tracker.flush()
    assert tracker.close(state="finished") is None
    client = open_store(uri)
    mirror = Mirror.load(folder / "mlflow.json")
    found = client.search_runs([str(mirror.experiment_id)])
    return {run.info.run_name: run for run in found}


@pytest.mark.parametrize(
    ("swept", "label"),
    [
        ({"lora.r": "16", "optimizer.lr": "1e-3"}, "r=16 lr=1e-3"),
        ({"data.path": "/me/a.csv", "model.path": "hub/b"}, "data.path=a.csv model.path=b"),
        ({"model": "tiny"}, "model=tiny"),
        ({"lora.target_modules": "[" + "x" * 60 + "]"}, "target_modules=[" + "x" * 36 + "..."),
        ({}, ""),
    ],
)  # fmt: skip
def test_a_run_is_labelled_by_its_place_in_the_grid(swept: dict[str, str], label: str) -> None:
    """Keys by their last word where those differ, paths by their names, bounded."""
    assert label_run(swept) == label


def test_mlflow_has_the_sweep_as_its_report_has_it(uri: str, tmp_path: Path) -> None:
    """Named children, the base as a run, and a parent with score, verdict and report."""
    folder = write_sweep(
        tmp_path,
        [{"arc": {"acc": (ACC, ZEROS, HALF)}}, {"arc": {"acc": (ACC, ZEROS, ONES)}}],
    )
    (folder / "report.md").write_text("# report")
    (folder / "figures").mkdir()
    (folder / "figures" / "grid.png").write_bytes(b"png")
    runs = send_sweep(uri, folder)
    assert set(runs) == {"sweep", "base", "r=2", "r=4"}
    parent, base, child = runs["sweep"], runs["base"], runs["r=4"]
    for run in (base, child):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["finetune.run"] == "run-1"
    assert base.data.metrics["arc/acc"] == 0.0
    assert base.info.status == "FINISHED"
    assert child.data.metrics["arc/acc_diff"] == 1.0
    assert child.data.metrics["arc/acc_p_adjusted"] < 0.05
    assert parent.data.metrics["best_score"] == parent.data.metrics["best_score_diff"] == 1.0
    assert parent.data.tags["finetune.best_run"] == "lora.r=4"
    assert "lora.r=4 scores 1.0000 in arc/acc" in parent.data.tags["mlflow.note.content"]
    client = open_store(uri)
    names = [one.path for one in client.list_artifacts(parent.info.run_id, "report")]
    assert names == ["report/figures", "report/report.md", "report/sweep.yaml"]


def test_a_run_without_a_grid_keeps_its_name(uri: str, tmp_path: Path) -> None:
    """There is no place in a grid to name it by."""
    write_run(tmp_path / "run-0", {"arc": {"acc": (ACC, ZEROS, HALF)}}, None)
    folder = tmp_path / "sweep"
    folder.mkdir()
    SweepRecord("sweep", [], [], ["arc"], [RunRecord("../run-0", {})]).write(folder)
    assert set(send_sweep(uri, folder)) == {"sweep", "base", "run-0"}


def test_bases_that_differ_are_runs_of_their_own(tmp_path: Path) -> None:
    """Named by the swept values that all their runs share."""
    paths = ["a/one", "a/one", "b/two"]
    for number, path in enumerate(paths):
        base = ZEROS if path == "a/one" else HALF
        write_run(tmp_path / f"run-{number}", {"arc": {"acc": (ACC, base, ONES)}}, None)
    swept = [{"model.path": path, "lora.r": str(number)} for number, path in enumerate(paths)]
    records = [RunRecord(f"../run-{number}", one) for number, one in enumerate(swept)]
    folder = tmp_path / "sweep"
    folder.mkdir()
    SweepRecord("sweep", [], ["model.path", "lora.r"], ["arc"], records).write(folder)
    bases = summarise(read_results(folder)).bases
    assert {name: base.scores for name, base in bases.items()} == {
        "base path=one": {"arc/acc": 0.0},
        "base path=two r=2": {"arc/acc": 0.5},
    }


def test_a_sweep_at_work_shows_its_best_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each run; the champion is registered once, when all runs have ended."""
    runs: list[Any] = [{"arc": {"acc": (ACC, ZEROS, HALF)}}]
    folder = write_sweep(tmp_path, runs)
    monkeypatch.setattr(run_sweep, "_write_report", lambda _: (read_results(folder), True))
    tracker, sweep = MagicMock(), MagicMock()
    run_sweep._report_so_far(sweep, tracker)
    (summary,) = tracker.describe.call_args.args
    assert summary.values["best_score"] == 0.5
    assert set(summary.bases) == {"base"}
    assert summary.champion is None


def test_what_changed_is_sent_again_and_only_that(uri: str, tmp_path: Path) -> None:
    """An adjusted p of a grid that grew replaces the old one; sending twice adds no row."""
    runs: list[Any] = [{"arc": {"acc": (ACC, ZEROS, HALF)}}]
    folder = write_sweep(tmp_path, runs)
    send_sweep(uri, folder)
    path, client = folder / "mlflow.json", open_store(uri)
    mirror = Mirror.load(path)
    child = str(mirror.children["run-0"].run_id)

    def history() -> list[float]:
        return [one.value for one in client.get_metric_history(child, "arc/acc_diff")]

    send(mirror, path)
    assert history() == [0.5]
    changed = {"run-0": {**mirror.summary.runs["run-0"], "arc/acc_diff": 0.25}}
    mirror.summary = SweepSummary(runs=changed)
    send(mirror, path)
    assert history() == [0.5, 0.25]
    assert client.get_run(child).data.metrics["arc/acc_diff"] == 0.25


def test_an_earlier_versions_file_is_read(tmp_path: Path) -> None:
    """Its runs are not sent again as new ones."""
    path = tmp_path / "mlflow.json"
    Mirror("sqlite:///x.db", "e", "s", ["lora.r"], run_id="ab").save(path)
    stored = json.loads(path.read_text())
    del stored["summary"]
    path.write_text(
        json.dumps(stored | {"champion": "one", "metrics": ["m"], "lowest_first": True})
    )
    mirror = Mirror.load(path)
    assert mirror.run_id == "ab"
    assert mirror.summary == SweepSummary(champion="one", metrics=["m"], lowest_first=True)


@pytest.mark.parametrize(
    "summary",
    [{"champion": 3}, {"metrics": "acc"}, {"bases": {"base": {"x": 1}}}, {"other": 1}, []],
)
def test_a_damaged_summary_is_named(summary: Any, tmp_path: Path) -> None:
    """The tracker sets such a file aside."""
    path = tmp_path / "mlflow.json"
    Mirror("sqlite:///x.db", "e", "s", []).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"summary": summary}))
    with pytest.raises(Damaged):
        Mirror.load(path)
