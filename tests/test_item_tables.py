"""MLflow's table of questions and answers, in the layout of its own `log_table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.tracking.event_sending import send_events
from finetune.tracking.item_tables import LONGEST, MOST_ROWS, TAG, build_table
from finetune.tracking.mlflow_store import open_store
from finetune.tracking.run_folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own

CHOICE: dict[str, Any] = {
    "hash": "a", "prompt": "pa", "task": "mmlu_food", "id": "q1", "question": "A fruit?",
    "choices": ["stone", "apple"], "gold": 1, "said": {"base": [-1.0, -2.0], "tuned": [-2.0, -1.0]},
    "base": {"acc": 0.0, "pair": [1, 2]}, "tuned": {"acc": 1.0, "pair": [1, 1]},
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hash": "b", "prompt": "pb", "category": "geography", "question": "The capital?",
    "gold": ["Paris", "Lutetia"], "said": {"tuned": " Paris "}, "tuned": {"exact_match": 1.0},
}  # fmt: skip
ARTIFACT = {"event": "artifact", "path": "evaluation", "folder": "evaluation"}


def test_a_row_has_what_was_asked_and_both_answers() -> None:
    """Choices by their texts; outcomes that are numbers, of both sides."""
    assert build_table([CHOICE, TEXT]) == {
        "columns": [
            "id", "category", "question", "choices", "gold", "base", "tuned",
            "base acc", "tuned acc", "base exact_match", "tuned exact_match",
        ],
        "data": [
            [
                "q1", "mmlu_food", "A fruit?", "stone\napple", "apple", "stone", "apple",
                0.0, 1.0, None, None,
            ],
            [
                "", "geography", "The capital?", "", "Paris or Lutetia", "", "Paris",
                None, None, None, 1.0,
            ],
        ],
    }  # fmt: skip


def test_the_table_is_bounded() -> None:
    """In rows, and in each cell."""
    table = build_table([TEXT | {"question": "x" * 10_000}] * (MOST_ROWS + 1))
    assert table is not None
    assert len(table["data"]) == MOST_ROWS
    assert len(table["data"][0][2]) == LONGEST + 3


def test_what_is_no_number_is_empty() -> None:
    """As JSON has it: no NaN, no infinity, and no text among numbers."""
    values = [float("nan"), float("inf"), "text", [1, 2], 1.5]
    table = build_table([TEXT | {"tuned": {"ppl": value}} for value in values])
    assert table is not None
    assert [row[-1] for row in table["data"]] == [None, None, None, None, 1.5]


def test_without_texts_there_is_no_table() -> None:
    """`evaluation.keep_texts=false`, or no questions at all."""
    bare = {key: CHOICE[key] for key in ("hash", "prompt", "said", "base", "tuned")}
    assert build_table([bare]) is None
    assert build_table([]) is None


def test_mlflow_reads_it_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, however often the scores are sent, and beside a table of somebody else's."""
    run = RunFolder(tmp_path / "run")
    side = {"metrics": {"acc": 0.5}, "num_questions": 2}
    for task, items in (("mine", [CHOICE, TEXT]), ("bare", [{"hash": "a", "prompt": "p"}])):
        run.write_json(f"evaluation/{task}.json", {"tuned": side, "base": side})
        lines = "".join(json.dumps(item) + "\n" for item in items)
        run.write_text(f"evaluation/{task}.items.jsonl", lines)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = open_store(uri)
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "kept").as_uri())
    run_id = client.create_run(experiment).info.run_id
    other = {"path": "other.json", "type": "table"}
    client.set_tag(run_id, TAG, json.dumps([other]))
    for _ in range(2):
        send_events(client, run_id, run.path, [ARTIFACT])
    ours = {"path": "evaluation/mine.table.json", "type": "table"}
    assert json.loads(client.get_run(run_id).data.tags[TAG]) == [other, ours]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # MLflow's search reads it
    table = client.load_table(experiment, ours["path"], run_ids=[run_id])
    assert list(table["tuned"]) == ["apple", "Paris"]
    assert table["tuned acc"][0] == 1.0
    assert sorted(one.path for one in client.list_artifacts(run_id, "evaluation")) == [
        f"evaluation/{name}" for name in
        ("bare.items.jsonl", "bare.json", "mine.items.jsonl", "mine.json", "mine.table.json")
    ]  # fmt: skip
