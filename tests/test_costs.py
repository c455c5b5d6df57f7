"""Costs: of each run, and their sums, in which nothing is counted twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.reporting.costs import build_costs, show_duration, show_number
from finetune.reporting.results import read_results
from finetune.reporting.rows import list_columns
from finetune.tracking.run_folder import RunFolder, Status
from tests.test_effects import write_grid


def test_a_pause_is_no_cost_and_a_shared_base_counts_once(tmp_path: Path) -> None:
    """A run that was killed and resumed took the seconds of its steps, not those in between."""
    folder = write_grid(tmp_path, {"lora.r": ["4", "8"]}, [1, 3])
    for number in (0, 1):
        run = RunFolder(tmp_path / f"run-{number}")
        run.write_json("training.json", {"train_seconds": 100.0, "tokens_per_second": 50.0})
        run.write_status(Status("finished", started=0.0, ended=99_999.0))
    table = build_costs(read_results(folder))
    assert table.notes == [
        "In all: 3 min training, 2 s scoring the tuned models, 1 s the base. Steps before an "
        "interruption are counted once."
    ]
    column = table.columns.index("training, s")
    assert [row[column].text for row in table.rows] == ["100", "100"]
    assert "validation loss" not in table.columns


def test_energy_has_a_column_where_it_is_known(tmp_path: Path) -> None:
    """Mean power times the seconds of all steps; on a CPU there is none, and no column."""
    folder = write_grid(tmp_path, {"lora.r": ["4", "8"]}, [1, 3])
    without = read_results(folder)
    assert "energy, Wh" not in build_costs(without).columns
    assert "energy_wh" not in list_columns(without.rows)
    run = RunFolder(tmp_path / "run-0")
    run.write_json("training.json", {"train_seconds": 1800.0, "power_watts": 300.0})
    results = read_results(folder)
    table = build_costs(results)
    column = table.columns.index("energy, Wh")
    assert [row[column].text for row in table.rows] == ["150", ""]
    assert "150 Wh of GPUs in training" in table.notes[0]
    assert list_columns(results.rows)[-2:] == ["energy_wh", "mlflow_run_id"]


def test_a_run_without_results_has_empty_cells(tmp_path: Path) -> None:
    """It has a row with its state."""
    folder = write_grid(tmp_path, {"lora.r": ["4"]}, [1])
    run = RunFolder(tmp_path / "run-0")
    (run.path / "training.json").unlink()
    (run.path / "digests.json").unlink()
    (run.path / "status.json").write_text(json.dumps({"state": "failed"}))
    (row,) = build_costs(read_results(folder)).rows
    assert [cell.text for cell in row][:3] == ["lora.r=4", "failed", ""]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(35, "35 s"), (119, "119 s"), (720, "12 min"), (12_000, "3 h 20 min")]
)
def test_durations_have_the_unit_that_fits(seconds: float, shown: str) -> None:
    """Seconds below two minutes, hours from two hours on."""
    assert show_duration(seconds) == shown


def test_numbers_are_short() -> None:
    """Four digits, or all of a whole number; none is empty."""
    assert [show_number(one) for one in (4884480, 93.84691, None)] == ["4,884,480", "93.85", ""]
