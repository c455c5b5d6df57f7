"""What was run, in lines, and the settings that differ between runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from finetune.config.schema import Config
from finetune.reporting.pages import write_report
from finetune.reporting.results import read_results
from finetune.reporting.run_facts import describe_runs
from finetune.reporting.settings import find_differences, read_settings
from finetune.tracking.run_folder import RunFolder
from finetune.tracking.sweep_record import RunRecord, SweepRecord
from tests.test_effects import write_grid

COUNTS = {"read": 589, "drawn": 240, "validation": 24, "truncated": 3}


def write_runs(root: Path, **beside: Any) -> Path:
    """Write a sweep over two ranks with settings, row counts and environments."""
    folder = write_grid(root, {"lora.r": ["4", "8"]}, [1, 3])
    for number, rank in enumerate((4, 8)):
        run = RunFolder(root / f"run-{number}")
        config = OmegaConf.structured(Config)
        config.lora.r, config.model.path, config.data.path = rank, "a/model", "rows.jsonl"
        config.training.seed += number * beside.get("seeds", 0)
        config.workers.num = number + 1
        run.write_text("config.yaml", OmegaConf.to_yaml(config))
        run.write_json("data.json", COUNTS)
        environment: dict[str, Any] = {
            "versions": {},
            "threads": 2,
            "gpu": beside.get("gpu"),
            "dtype": "bf16",
        }
        run.write_json("environment.json", environment)
    return folder


def test_model_method_data_and_hardware_are_named(tmp_path: Path) -> None:
    """Values that differ between runs are listed, those of all stand once."""
    results = read_results(write_runs(tmp_path))
    facts = describe_runs(results, read_settings(results))
    assert facts["runs"] == "2 finished"
    assert facts["model"] == "a/model, bf16"
    assert facts["method"].startswith("lora, r 4, 8, alpha 16, dropout 0")
    assert facts["data"] == "rows.jsonl: 240 of 589 rows used, 24 to validate, 3 truncated"
    assert facts["evaluation"] == "arc (40 questions)"
    assert facts["settings that differ"] == "lora.r: 4, 8"
    assert facts["hardware"] == "CPU, 2 threads"


def test_a_gpu_is_named_in_place_of_threads(tmp_path: Path) -> None:
    """As environment.json has it."""
    results = read_results(write_runs(tmp_path, gpu="NVIDIA T4"))
    assert describe_runs(results, {})["hardware"] == "NVIDIA T4"


def test_runs_without_files_are_described_by_what_is_there(tmp_path: Path) -> None:
    """A sweep whose runs have not begun has neither settings nor counts."""
    results = read_results(write_grid(tmp_path, {"lora.r": ["4", "8"]}, [1, 3]))
    assert set(describe_runs(results, read_settings(results))) == {
        "runs", "evaluation", "settings that differ", "hardware"
    }  # fmt: skip


def test_only_settings_that_differ_are_in_the_page(tmp_path: Path) -> None:
    """Each value once, and by run the number of its own; workers change no number of a run."""
    results = read_results(write_runs(tmp_path, seeds=1))
    found = find_differences(results, read_settings(results))
    assert found["runs"] == ["lora.r=4", "lora.r=8"]
    assert found["keys"]["lora.r"] == {"values": ["4", "8"], "of": [0, 1]}
    assert set(found["keys"]) == {"lora.r", "training.seed"}
    assert found["first"] == [1, 0]  # the best run, and another


def test_the_page_has_them_and_the_links(tmp_path: Path) -> None:
    """A run's folder, and its run in MLflow, by addresses that nothing in them can break."""
    folder = write_runs(tmp_path)
    mirror = {
        "uri": "https://me:secret@mlflow.example/x", "experiment": "e", "name": "sweep",
        "swept": ["lora.r"], "experiment_id": "7", "run_id": "parent",
        "children": {"run-0": {"path": "run-0", "run_id": 'a"b'}},
    }  # fmt: skip
    (folder / "mlflow.json").write_text(json.dumps(mirror))
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert 'href="../run-0/"' in page
    assert (
        'href="https://mlflow.example/x/#/experiments/7/runs/a%22b?workflowType=machine_learning"'
        in page
    )
    assert (
        'href="https://mlflow.example/x/#/experiments/7/runs/parent?workflowType=machine_learning"'
        in page
    )
    assert "secret" not in page
    assert "<dt>model<dd>a/model, bf16" in page
    assert "- model: a/model, bf16" in (folder / "report.md").read_text()


def test_many_waiting_runs_take_a_line(tmp_path: Path) -> None:
    """Their labels are behind it."""
    folder = tmp_path / "sweep"
    runs = [RunRecord(f"../run-{n}", {"lora.r": str(n)}) for n in range(240)]
    SweepRecord("sweep", [], ["lora.r"], ["arc"], runs).write(folder)
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "<summary>240 pending</summary>lora.r=0; lora.r=1;" in page
    assert "<dd>240 pending" in page
    assert page.count("pending") < 260  # the rest in the table of costs
    assert "- 240 pending: lora.r=0; lora.r=1;" in (folder / "report.md").read_text()
