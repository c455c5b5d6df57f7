"""Evaluation: lm-eval's own numbers, tasks found quickly, scores stored and verified."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM

from finetune.config.schema import EvaluationConfig, ModelConfig
from finetune.evaluation.harness import Item, ScoreStore, TaskScore, score
from finetune.evaluation.loglikelihood import SharedContextLM
from finetune.evaluation.question_bar import named_alike
from finetune.evaluation.scoring import Scoring
from finetune.evaluation.tasks import load_task
from finetune.models.base_model import find_model, load_base, load_tokenizer
from finetune.pipeline.scores import write_scores
from finetune.reporting.outcomes import read_answers
from finetune.tracking.run_folder import RunFolder
from tests.conftest import TINY, Command, write_rows

ARC_ROW = {
    "id": "q", "question": "Which is a metal?", "answerKey": "B",
    "choices": {"text": ["wood", "iron", "milk"], "label": ["A", "B", "C"]},
}  # fmt: skip


def tiny_lm(model: ModelConfig | None = None) -> SharedContextLM:
    model = model or ModelConfig(path="random://tiny")
    source = find_model(model)
    base = load_base(model, source, torch.device("cpu"))
    return SharedContextLM(base, load_tokenizer(model, source))


def plain_lm(lm: SharedContextLM) -> HFLM:
    """Return lm-eval's own model around the same weights."""
    return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=8)


def local_arc(tmp_path: Path, count: int) -> EvaluationConfig:
    rows: list[object] = [{**ARC_ROW, "question": f"Question {i}: a metal?"} for i in range(count)]
    file = write_rows(tmp_path / "arc.jsonl", rows)
    return EvaluationConfig(tasks=["arc_easy"], data_files={"arc_easy": {"test": str(file)}})


def test_scores_equal_lm_eval_called_directly(tmp_path: Path) -> None:
    """acc, acc_norm and stderr are those of simple_evaluate on the same questions."""
    settings = local_arc(tmp_path, 12)
    lm = tiny_lm()
    ours = score(lm, load_task("arc_easy", settings), settings)
    questions: list[dict[str, Any]] = [
        {**ARC_ROW, "question": f"Question {i}: a metal?"} for i in range(12)
    ]
    direct = lm_eval.simple_evaluate(
        model=plain_lm(lm),
        tasks=[plain_arc(questions)],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )["results"]["arc_easy"]
    for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        assert ours.metrics[metric] == direct[f"{metric},none"]
    assert len(ours.items) == 12
    mean = sum(item.outcomes["acc"] for item in ours.items) / 12
    assert mean == pytest.approx(ours.metrics["acc"])


def plain_arc(questions: list[dict[str, Any]]) -> dict[str, object]:
    """ARC's definition written out by hand, as a second source for the comparison."""
    import datasets

    data = datasets.DatasetDict({"test": datasets.Dataset.from_list(questions)})
    return {
        "task": "arc_easy",
        "custom_dataset": lambda **_: data,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def test_few_shot_prompts_are_the_same_every_time(tmp_path: Path) -> None:
    """Solved examples are drawn by a fixed seed, whatever was drawn before."""
    settings = splits_of_arc(tmp_path)
    settings.num_fewshot = 2
    lm = tiny_lm()
    task = load_task("arc_easy", settings)
    first = score(lm, task, settings)
    again = score(lm, task, settings)
    assert first.items == again.items
    assert first.num_fewshot == 2
    assert load_task("arc_easy", settings).digest == task.digest
    settings.num_fewshot = 0
    assert load_task("arc_easy", settings).digest != task.digest


def test_a_limit_takes_the_first_questions(tmp_path: Path) -> None:
    """evaluation.limit shortens the task and enters its digest."""
    settings = local_arc(tmp_path, 8)
    whole = load_task("arc_easy", settings).digest
    settings.limit = 3
    task = load_task("arc_easy", settings)
    assert task.digest != whole
    assert len(score(tiny_lm(), task, settings).items) == 3


def test_a_share_takes_the_first_questions(tmp_path: Path) -> None:
    """A limit below 1 is rounded up to whole questions, as lm-eval does."""
    settings = local_arc(tmp_path, 8)
    settings.limit = 3
    count = load_task("arc_easy", settings)
    settings.limit = 0.3
    share = load_task("arc_easy", settings)
    assert share.digest == count.digest
    assert len(score(tiny_lm(), share, settings).items) == 3


@pytest.mark.parametrize("harm", ["none", "altered", "cut", "absent"])
def test_a_stored_score_is_used_only_if_it_is_whole(tmp_path: Path, harm: str) -> None:
    """A score is read back exactly; an altered file counts as none."""
    store = ScoreStore(tmp_path)
    kept = TaskScore(
        "t", "1.0", 0, {"acc": 0.1}, 1.5, Scoring("shared"), [Item("h", "p", {"acc": 1.0})]
    )
    store.write("a" * 64, kept)
    (file,) = tmp_path.glob("*.json")
    if harm == "altered":
        stored = json.loads(file.read_text())
        stored["score"]["metrics"]["acc"] = 0.9
        file.write_text(json.dumps(stored))
    elif harm == "cut":
        file.write_text(file.read_text()[:50])
    elif harm == "absent":
        file.unlink()
    assert store.read("t", "a" * 64) == (kept if harm == "none" else None)
    assert store.read("t", "b" * 64) is None


def test_equal_questions_of_a_group_stay_apart(tmp_path: Path) -> None:
    """Two tasks of a group may ask the same rows; each outcome is paired with its own."""

    def scored(*outcomes: float) -> dict[str, TaskScore]:
        items = [
            Item("same", prompt, {"acc": value})
            for prompt, value in zip(("first", "second", "second"), outcomes, strict=True)
        ]
        return {"g": TaskScore("g", "1", 0, {"acc": 0.5}, 1.0, Scoring(), items)}

    run = RunFolder(tmp_path)
    write_scores(run, scored(1.0, 0.0, 1.0), scored(0.0, 1.0, 0.0))
    found = read_answers(run, "g", "acc")
    assert [list(side.values()) for side in (found.base, found.tuned)] == [
        [0.0, 1.0, 0.0],
        [1.0, 0.0, 1.0],
    ]


@pytest.mark.slow
def test_base_accuracy_on_real_arc_easy_equals_lm_eval(shared_data: Path) -> None:
    """The real model on real questions: our score is lm-eval's on the same file."""
    file = shared_data / "arc_easy_test.jsonl"
    settings = EvaluationConfig(
        tasks=["arc_easy"], data_files={"arc_easy": {"test": str(file)}}, limit=200
    )
    lm = tiny_lm(ModelConfig())
    ours = score(lm, load_task("arc_easy", settings), settings)
    questions = [json.loads(line) for line in file.read_text().splitlines()]
    direct = lm_eval.simple_evaluate(
        model=plain_lm(lm),
        tasks=[plain_arc(questions)],
        limit=200,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )["results"]["arc_easy"]
    assert ours.metrics["acc"] == direct["acc,none"]
    assert ours.metrics["acc_norm"] == direct["acc_norm,none"]
    assert ours.metrics["acc"] > 0.4


def test_a_task_of_generations_has_lm_evals_texts(tmp_path: Path) -> None:
    """They are generated together, and nothing differs from HFLM but the time."""
    rows: list[object] = [
        {"question": f"What is {n} + {n}?", "answer": f"{n} and {n}.\n#### {2 * n}"}
        for n in range(6)
    ]
    file = str(write_rows(tmp_path / "gsm8k.jsonl", rows))
    settings = EvaluationConfig(
        ["gsm8k"], num_fewshot=1, limit=2, data_files={"gsm8k": {"test": file, "train": file}}
    )
    lm = tiny_lm()
    task = load_task("gsm8k", settings)
    ours = score(lm, task, settings)
    plain = plain_lm(lm)
    plain.scoring = Scoring()  # where a score says how it came about
    theirs = score(plain, task, settings)
    assert (ours.scoring.path, ours.scoring.compared, ours.scoring.ties) == ("shared", 2, 0)
    assert ours.items == theirs.items
    matches = ("exact_match_strict-match", "exact_match_flexible-extract")
    assert set(ours.metrics) == {*matches, *(f"{match}_stderr" for match in matches)}
    assert ours.metrics == theirs.metrics


def splits_of_arc(tmp_path: Path) -> EvaluationConfig:
    """Return ARC-Easy with six questions of its own in each split."""
    files = {}
    for split in ("train", "validation", "test"):
        rows: list[object] = [{**ARC_ROW, "question": f"{split} {i}: a metal?"} for i in range(6)]
        files[split] = str(write_rows(tmp_path / f"{split}.jsonl", rows))
    return EvaluationConfig(tasks=["arc_easy"], data_files={"arc_easy": files})


def test_the_selection_asks_the_other_splits(tmp_path: Path) -> None:
    """Its questions are those of the named splits, in the task's own words; the reported stay."""
    settings = splits_of_arc(tmp_path)
    settings.select_split = "train+validation"
    asked = {}
    for selects in (False, True):
        task = load_task("arc_easy", settings, selects=selects)
        (one,) = task.tasks.values()
        asked[task.key] = [str(instance.doc["question"]).split()[0] for instance in one.instances]
    assert set(asked["arc_easy"]) == {"test"}
    assert asked["arc_easy.select"] == ["train"] * 18 + ["validation"] * 18


@pytest.mark.parametrize(
    ("split", "shots", "said"),
    [
        ("dev", None, "arc_easy has no 'dev', only train, validation, test"),
        ("test", None, "arc_easy is reported on it"),
        ("train+validation", 2, "takes its solved examples from train; leave it out"),
    ],
)
def test_a_selection_that_would_flatter_is_refused(
    tmp_path: Path, split: str, shots: int | None, said: str
) -> None:
    """An unknown split, the reported one, and one that gives the answers away."""
    settings = splits_of_arc(tmp_path)
    settings.select_split, settings.num_fewshot = split, shots
    with pytest.raises(ValueError, match="select_split") as refused:
        load_task("arc_easy", settings, selects=True)
    assert said in str(refused.value)


@pytest.mark.slow
def test_a_sweep_chooses_on_the_selection(tmp_path: Path, finetune: Command) -> None:
    """Both scores stand side by side, a wrong split is refused, and the base is not asked twice."""
    files = [
        f"+evaluation.data_files.arc_easy.{split}={file}"
        for split, file in splits_of_arc(tmp_path).data_files["arc_easy"].items()
    ]
    grid = ["--multirun", *TINY, "evaluation=arc_easy", *files, "lora.r=2,4"]
    refused = finetune(*grid, "evaluation.select_split=dev")
    assert refused.returncode == 2
    assert "arc_easy has no 'dev'" in refused.stderr
    done = finetune(*grid, "evaluation.select_split=validation")
    assert done.returncode == 0, done.stderr
    (table,) = (tmp_path / "multirun_reports").glob("*/results.csv")
    with table.open() as file:
        for row in csv.DictReader(file):
            columns = ("select_acc", "acc", "base_acc")
            assert all(float(row[f"arc_easy/{column}"]) >= 0 for column in columns)
            assert "arc_easy/select_base_acc" not in row
    (selected, _) = tmp_path.glob("outputs/*/evaluation/arc_easy.select.json")
    assert json.loads(selected.read_text())["tuned"]["num_questions"] == 6
    again = finetune(*grid, "evaluation.select_split=validation")
    assert again.stdout.count("finished already") == 2


def test_lm_evals_bars_have_the_name_of_ours() -> None:
    """Where HFLM scores a task, "score" is what progresses, as elsewhere."""
    before = huggingface.tqdm
    with named_alike():
        bar = huggingface.tqdm(total=2, disable=False, desc="Running loglikelihood requests")
        assert (bar.desc, bar.unit) == ("score", "request")
        bar.close()
    assert huggingface.tqdm is before
