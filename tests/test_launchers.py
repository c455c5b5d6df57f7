"""Another of Hydra's launchers: the sweep plans before and reports after, each job runs alone."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from finetune.files import file_digest
from tests.conftest import TINY, Command

JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def adapters(folder: Path) -> dict[str, str]:
    files = folder.glob("*/adapter/adapter_model.safetensors")
    return {path.parts[-3]: file_digest(path) for path in files}


@pytest.mark.slow
def test_another_launcher_gives_the_same_runs(tmp_path: Path, finetune: Command) -> None:
    """Same folders, same adapters, same table; what is finished is not launched again."""
    grid = ("--multirun", *TINY, "lora.r=2,4")
    ours = finetune(*grid, "output_dir=ours", "report_dir=ours_reports")
    theirs = finetune(*grid, *JOBLIB)
    assert ours.returncode == theirs.returncode == 0, theirs.stderr
    assert adapters(tmp_path / "outputs") == adapters(tmp_path / "ours") != {}
    (table,) = tmp_path.glob("multirun_reports/*/results.csv")
    with table.open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished"] * 2
    again = finetune(*grid, *JOBLIB)
    assert again.stdout.count("finished already") == 2
    assert "launching 0 jobs" in again.stdout


@pytest.mark.slow
def test_a_job_that_fails_elsewhere_is_told(tmp_path: Path, finetune: Command) -> None:
    """One diverges under the launcher: the other is finished, and the exit code says so."""
    done = finetune("--multirun", *TINY, "optimizer.lr=1e-3,1e30", *JOBLIB)
    assert done.returncode == 1
    (table,) = tmp_path.glob("multirun_reports/*/results.csv")
    with table.open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished", "diverged"]
    assert "diverged" in done.stderr
