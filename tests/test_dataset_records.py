"""What MLflow is told of rows and questions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.config.inputs import DataSource
from finetune.config.schema import VALIDATION_PATH, EvaluationConfig, SourceConfig
from finetune.data.row_counts import RowCounts
from finetune.pipeline.dataset_records import record_questions, record_rows
from finetune.tracking.event_sending import send_events
from finetune.tracking.events import EventLog, read_events
from finetune.tracking.mlflow_store import open_store
from tests.conftest import train_tiny


def datasets(path: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(path) if event["event"] == "dataset"]


def source(location: str, key: str = "data.path") -> DataSource:
    return DataSource(key, location, "d" * 64, SourceConfig(path=location))


def test_the_rows_that_were_used_are_told(tmp_path: Path) -> None:
    """Not those of the file; another draw of the same file is another data set."""
    events = EventLog(tmp_path / "events.jsonl")
    for drawn in (16, 32, 32):
        counts = RowCounts(read=589, drawn=drawn, validation=4, dropped={"empty": 2}, tokens=99)
        record_rows(events, [source("data/rows.jsonl")], counts)
    events.close()
    one, other = datasets(tmp_path / "events.jsonl")
    assert (one["name"], one["rows"], other["rows"]) == ("rows", 12, 28)
    assert one["profile"]["num_rows_read"] == 589
    assert one["profile"]["num_rows_dropped"] == 2
    assert one["digest"] != other["digest"]


def test_each_source_of_a_mix_has_its_own_rows(tmp_path: Path) -> None:
    """As drawn from it."""
    sources = [source("a.jsonl"), source("b.csv")]
    drawn = {str(one): RowCounts(drawn=n) for one, n in zip(sources, (9, 3), strict=True)}
    counts = RowCounts.total(drawn)
    events = EventLog(tmp_path / "events.jsonl")
    record_rows(events, sources, counts)
    events.close()
    found = {one["name"]: one["rows"] for one in datasets(tmp_path / "events.jsonl")}
    assert found == {"a": 9, "b": 3}


def test_rows_to_validate_on_are_a_data_set_of_that_context(tmp_path: Path) -> None:
    """Those of `data.validation_path` are not trained on."""
    events = EventLog(tmp_path / "events.jsonl")
    sources = [source("a.jsonl"), source("v.jsonl", VALIDATION_PATH)]
    record_rows(events, sources, RowCounts(drawn=10, validation=4))
    events.close()
    found = datasets(tmp_path / "events.jsonl")
    assert [(one["context"], one["rows"]) for one in found] == [("training", 6), ("validation", 4)]


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("arc_easy", {}, "allenai/ai2_arc"),
        ("arc_easy", {"data_files": {"arc_easy": {"test": "t.jsonl"}}}, "t.jsonl"),
        ("questions", {"questions": "mine.jsonl"}, "mine.jsonl"),
        ("by_code", {}, "by_code"),
    ],
)
def test_questions_are_a_data_set_too(
    name: str, config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    """With where they come from, how many were asked, and whether they choose the best run."""
    path = None if name == "by_code" else "allenai/ai2_arc"
    inner = {"x": SimpleNamespace(config=SimpleNamespace(dataset_path=path))}
    task = SimpleNamespace(name=name, key=name, digest="ab", selects=False, tasks=inner)
    chosen = SimpleNamespace(**{**vars(task), "key": f"{name}.select", "selects": True})
    numbers = {name: 7, f"{name}.select": 1}
    scores: Any = {key: SimpleNamespace(items=[0] * n) for key, n in numbers.items()}
    tasks: Any = [task, chosen]
    events = EventLog(tmp_path / "events.jsonl")
    record_questions(events, tasks, scores, EvaluationConfig(**config))
    record_questions(events, tasks, {}, EvaluationConfig(**config))
    events.close()
    found = datasets(tmp_path / "events.jsonl")
    assert [(one["context"], one["rows"]) for one in found] == [("evaluation", 7), ("selection", 1)]
    assert {one["source"] for one in found} == {expected}


@pytest.mark.filterwarnings("ignore")
def test_a_run_tells_mlflow_both(uri: str, tmp_path: Path) -> None:
    """Its rows with their counts; a log of an earlier version has none."""
    run = train_tiny(tmp_path / "runs")
    (trained,) = datasets(run / "events.jsonl")
    assert trained["rows"] == 8
    client = open_store(uri)
    run_id = client.create_run("0").info.run_id
    old = {key: value for key, value in trained.items() if key != "profile"} | {"name": "old"}
    send_events(client, run_id, run, [trained, old, {**old, "name": "odd", "profile": "x"}])
    inputs = client.get_run(run_id).inputs
    assert inputs is not None
    profiles = {one.dataset.name: str(one.dataset.profile) for one in inputs.dataset_inputs}
    assert '"num_rows": 8' in profiles["rows"]
    assert '"num_rows_read": 589' in profiles["rows"]
    assert profiles["old"] == profiles["odd"] == '{"num_rows": 8}'
