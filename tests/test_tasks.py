"""Tasks: found without lm-eval's index, from local files as from the hub, in chats as lm-eval's."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from finetune.config.schema import Config, DataConfig, EvaluationConfig, ModelConfig
from finetune.evaluation import task_index
from finetune.evaluation.harness import score
from finetune.evaluation.task_index import find_task_file, find_task_problems
from finetune.evaluation.tasks import load_task
from finetune.models import base_model
from finetune.pipeline import preflight
from tests.conftest import TINY, Command, write_rows
from tests.test_harness import plain_lm, tiny_lm

Rows = Mapping[str, list[dict[str, Any]]]  # by split

SUBJECTS = ("anatomy", "virology")


def arc_rows() -> Rows:
    def row(split: str, i: int) -> dict[str, Any]:
        choices = {"text": ["wood", "iron", f"{i} l milk"], "label": ["A", "B", "C"]}
        return {"id": "q", "question": f"{split} {i}: a metal?", "choices": choices,
                "answerKey": "ABC"[i % 3]}  # fmt: skip

    return {split: [row(split, i) for i in range(5)] for split in ("train", "validation", "test")}


def hellaswag_rows() -> Rows:
    def row(split: str, i: int) -> dict[str, Any]:
        return {
            "ind": i, "activity_label": "Baking", "ctx_a": f"On {split} {i}, bread [title] rises.",
            "ctx_b": "the baker", "ctx": "", "endings": [f"{n} waits [step]" for n in "abcd"],
            "source_id": "s", "split": split, "split_type": "indomain", "label": str(i % 4),
        }  # fmt: skip

    return {split: [row(split, i) for i in range(5)] for split in ("train", "validation")}


def gsm8k_rows() -> Rows:
    def row(split: str, n: int) -> dict[str, Any]:
        return {"question": f"{split}: {n} + {n}?", "answer": f"{n} and {n}.\n#### {2 * n}"}

    return {split: [row(split, n) for n in range(7)] for split in ("train", "test")}


def mmlu_rows(subjects: tuple[str, ...] = SUBJECTS) -> Rows:
    def row(split: str, subject: str, i: int) -> dict[str, Any]:
        choices = ["one", "two", f"{i}", "none"]
        return {"question": f" {split} {i}? ", "subject": subject, "choices": choices,
                "answer": i % 4}  # fmt: skip

    return {
        split: [row(split, subject, i) for i in range(6) for subject in subjects]
        for split in ("dev", "validation", "test")
    }


class Recorder(LM):  # type: ignore[misc]  # lm-eval is untyped
    """Keeps what lm-eval asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Instance] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.requests += requests
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.requests += requests
        return [""] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


def ask_stock(name: str, rows: Rows, lm: LM, **settings: Any) -> dict[str, Any]:
    """Run the stock task by lm-eval alone, with the hub in memory."""

    def hub(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        picked = {
            split: [row for row in found if row.get("subject", name) == name]
            for split, found in rows.items()
        }
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(found) for split, found in picked.items()}
        )

    folder = find_task_file(name)
    assert folder is not None
    manager = TaskManager(include_defaults=False, include_path=str(folder.parent))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets, "load_dataset", hub)
        patched.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)  # takes seconds
        results = lm_eval.simple_evaluate(
            model=lm, tasks=[name], task_manager=manager, bootstrap_iters=0, **settings
        )
    assert results is not None
    return dict(results)


def local(tmp_path: Path, name: str, rows: Rows, **settings: Any) -> EvaluationConfig:
    """Return the settings that ask a task from files."""
    files = {
        split: str(write_rows(tmp_path / f"{name}-{split}.jsonl", list(found)))
        for split, found in rows.items()
    }
    return EvaluationConfig([name], data_files={name: files}, **settings)


def told(requests: list[Instance]) -> list[Any]:
    return [(one.task_name, one.doc_id, one.idx, one.args, one.doc) for one in requests]


@pytest.mark.parametrize(
    "name", ["arc_easy", "arc_challenge", "hellaswag", "mmlu", "mmlu_anatomy", "gsm8k", "boolq"]
)
def test_tasks_are_found_without_the_index(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the shipped options nor any other task pays for indexing all of lm-eval."""
    monkeypatch.setattr(task_index, "stock_index", lambda: pytest.fail("indexed"))
    path = find_task_file(name)
    assert path is not None
    assert path.suffix == ".yaml"


@pytest.mark.slow  # it reads lm-eval's whole index
def test_an_unknown_task_gets_the_nearest_known_one() -> None:
    """A misspelt task is told with the one that was meant, a tag with its tasks."""
    names = ["arc_eazy", "demo_science", "ai2_arc"]
    misspelt, tag = find_task_problems(EvaluationConfig(tasks=names))
    assert "no task 'arc_eazy'; did you mean 'arc_easy'?" in misspelt
    assert "ai2_arc is a tag" in tag
    assert "evaluation.tasks=[arc_challenge,arc_easy]" in tag


@pytest.mark.parametrize(
    ("name", "rows", "shots"),
    [
        ("arc_challenge", arc_rows(), None),
        ("arc_challenge", arc_rows(), 2),
        ("hellaswag", hellaswag_rows(), None),
        ("hellaswag", hellaswag_rows(), 2),
        ("gsm8k", gsm8k_rows(), None),
        ("gsm8k", gsm8k_rows(), 2),
        ("mmlu_anatomy", mmlu_rows(("anatomy",)), None),
        ("mmlu_anatomy", mmlu_rows(("anatomy",)), 5),
        ("mmlu_anatomy", mmlu_rows(("anatomy",)), 2),
    ],
)
def test_local_files_give_the_stock_tasks_requests(
    tmp_path: Path, name: str, rows: Rows, shots: int | None
) -> None:
    """Prompts, choices, targets and their order are those of lm-eval on the hub's data set."""
    stock = Recorder()
    ask_stock(name, rows, stock, num_fewshot=shots)
    task = load_task(name, local(tmp_path, name, rows, num_fewshot=shots))
    assert told(task.requests) == told(stock.requests)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("arc_challenge", arc_rows()), ("hellaswag", hellaswag_rows()), ("mmlu_anatomy", mmlu_rows())],
)
def test_one_file_is_enough_where_nothing_is_solved_first(
    tmp_path: Path, name: str, rows: Rows
) -> None:
    """Without solved examples a task needs the split it asks, and says so if it is not there."""
    asked = "validation" if name == "hellaswag" else "test"
    few = local(tmp_path, name, {asked: rows[asked]})
    whole = local(tmp_path, name, rows)
    assert told(load_task(name, few).requests) == told(load_task(name, whole).requests)
    del whole.data_files[name][asked]
    with pytest.raises(ValueError, match=f"add .evaluation.data_files.{name}.{asked}=FILE"):
        load_task(name, whole)


@pytest.mark.parametrize(
    ("name", "rows", "shots", "solved"),
    [
        ("arc_challenge", arc_rows(), 2, "train"),
        ("gsm8k", gsm8k_rows(), None, "train"),
        ("mmlu_anatomy", mmlu_rows(), 5, "dev"),
    ],
)
def test_solved_examples_come_from_the_stock_split_or_not_at_all(
    tmp_path: Path, name: str, rows: Rows, shots: int | None, solved: str
) -> None:
    """A file that is missing does not quietly give other prompts."""
    settings = local(tmp_path, name, {"test": rows["test"]}, num_fewshot=shots)
    with pytest.raises(ValueError, match=f"solved examples from its {solved} split"):
        load_task(name, settings)
    settings.num_fewshot = 0
    assert len(load_task(name, settings).tasks) == 1


def all_of_mmlu() -> Rows:
    folder = find_task_file("mmlu")
    assert folder is not None
    names = [path.stem.removeprefix("mmlu_") for path in sorted(folder.parent.glob("mmlu_*.yaml"))]
    return mmlu_rows(tuple(names))


@pytest.mark.slow
def test_a_group_reads_one_file_for_all_its_tasks(tmp_path: Path) -> None:
    """MMLU: each subject takes its rows, requests and scores are lm-eval's, members are kept."""
    rows = all_of_mmlu()
    settings = local(tmp_path, "mmlu", rows, num_fewshot=1, limit=2)
    lm = tiny_lm()
    task = load_task("mmlu", settings)
    ours = score(lm, task, settings)
    stock = Recorder()
    ask_stock("mmlu", rows, stock, num_fewshot=1, limit=2)
    assert told(task.requests) == told(stock.requests)
    direct = ask_stock("mmlu", rows, plain_lm(lm), num_fewshot=1, limit=2)["results"]
    assert ours.metrics["acc"] == direct["mmlu"]["acc,none"]
    assert len(ours.items) == 2 * 57
    assert ours.members["mmlu_anatomy"]["acc"] == direct["mmlu_anatomy"]["acc,none"]
    assert (ours.version, ours.num_fewshot, len(ours.members)) == ("2", 1, 57)


def test_a_group_wants_rows_for_each_of_its_tasks(tmp_path: Path) -> None:
    """A subject without a row, as in the file of a single one, is named."""
    with pytest.raises(ValueError, match="has no row whose column `subject` is 'astronomy'"):
        load_task(
            "mmlu_stem", local(tmp_path, "mmlu_stem", mmlu_rows(("abstract_algebra", "anatomy")))
        )


@pytest.mark.parametrize(("shots", "multiturn"), [(None, True), (2, True), (2, False)])
def test_chats_are_those_of_lm_eval(tmp_path: Path, shots: int | None, multiturn: bool) -> None:
    """With the tokenizer's chat template, requests and scores equal simple_evaluate's."""
    settings = local(
        tmp_path, "arc_easy", arc_rows(), num_fewshot=shots, chat_template=True,
        fewshot_as_multiturn=multiturn,
    )  # fmt: skip
    lm = tiny_lm()
    task = load_task("arc_easy", settings, lm.tokenizer)
    ours = score(lm, task, settings)
    direct = ask_stock(
        "arc_easy", arc_rows(), plain_lm(lm), num_fewshot=shots, apply_chat_template=True,
        fewshot_as_multiturn=multiturn, log_samples=True,
    )  # fmt: skip
    context, choice = task.requests[0].args
    assert context.count("<s>user\n") == (1 + (shots or 0) if multiturn else 1)
    assert context.endswith("</s>\n<s>assistant\n")
    assert choice == "wood"
    assert [item.prompt_hash for item in ours.items] == [
        sample["prompt_hash"] for sample in direct["samples"]["arc_easy"]
    ]
    for metric in ("acc", "acc_norm"):
        assert ours.metrics[metric] == direct["results"]["arc_easy"][f"{metric},none"]
    settings.chat_template = False
    assert load_task("arc_easy", settings).digest != task.digest


def test_a_chat_wants_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A tokenizer without a chat template is refused before anything is loaded, in one line."""
    tokenizer.chat_template = None
    monkeypatch.setattr(base_model, "load_tokenizer", lambda *_: tokenizer)
    config = Config(
        model=ModelConfig(path="random://tiny"),
        data=DataConfig(path=str(write_rows(tmp_path / "rows.jsonl", list(gsm8k_rows()["test"]))),
                        columns={"instruction": "question", "output": "answer"}),
        evaluation=local(tmp_path, "arc_easy", arc_rows(), chat_template=True),
    )  # fmt: skip
    (problem,) = preflight.prepare(config).problems
    assert problem.startswith(
        "evaluation.chat_template is true, but the tokenizer of random://tiny"
    )


@pytest.mark.parametrize("said", ["is a group that has no score of its own", "runs code"])
def test_what_could_not_be_scored_at_the_end_is_refused(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group without a score, and a task that would run what the model writes."""

    class Unscored:
        task_name, UNSAFE_CODE, has_aggregation = "one", "code" in said, False

    loaded = {
        "tasks": {"one": Unscored()},
        "groups": {"mmlu": Unscored()},
        "group_map": {"mmlu": ["one"]},
    }
    monkeypatch.setattr(TaskManager, "load", lambda *_: loaded)
    with pytest.raises(ValueError, match=said):
        load_task("mmlu", EvaluationConfig(["mmlu"]))


@pytest.mark.slow
def test_several_benchmarks_at_once_from_local_files(
    tmp_path: Path, finetune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices and generations, base and tuned: columns, outcomes, comparison, what will be long."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    asked = {"hellaswag": hellaswag_rows(), "gsm8k": gsm8k_rows()}
    files = [
        f"+evaluation.data_files.{name}.{split}={file}"
        for name, rows in asked.items()
        for split, file in local(tmp_path, name, rows).data_files[name].items()
    ]
    command = [*TINY, "evaluation.tasks=[hellaswag,gsm8k]", "evaluation.limit=3", *files,
               "evaluation.chat_template=true", "training.max_steps=2"]  # fmt: skip
    done = finetune(*command)
    assert done.returncode == 0, done.stderr
    assert "to score: gsm8k: 3 questions, answers of up to 256 tokens\n" in done.stdout
    assert done.stderr.count("generate: 100%") == 2
    assert "arning" not in done.stderr
    (table,) = (tmp_path / "multirun_reports").glob("*/results.csv")
    (row,) = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    matches = ["exact_match_strict-match", "exact_match_flexible-extract"]
    for name in ("hellaswag/acc", "hellaswag/acc_norm", *(f"gsm8k/{one}" for one in matches)):
        task, metric = name.split("/")
        for column in (name, f"{task}/base_{metric}", f"{name}_diff", f"{name}_p"):
            assert float(row[column]) >= -1, column
        assert float(row[f"{name}_stderr"]) >= 0
        assert f"{task}/base_{metric}_stderr" not in row
    (items,) = tmp_path.glob("outputs/*/evaluation/gsm8k.items.jsonl")
    for line in items.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        assert set(item["base"]) == set(item["tuned"]) == set(matches)
    planned = finetune(*command, "training.seed=1", "sweep.dry_run=true")
    assert planned.returncode == 0, planned.stderr
    assert re.search(r"to score: gsm8k: 3 questions, .*, about \d+ s\n", planned.stdout)


def test_a_task_file_is_told_what_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, without the index of all tasks, for a file, a missing file and a folder."""
    monkeypatch.setattr(task_index, "stock_index", lambda: pytest.fail("indexed"))
    monkeypatch.chdir(tmp_path)
    Path("my_task.yaml").write_text("task: my_task\n", encoding="utf-8")
    Path("own/tasks").mkdir(parents=True)
    for name in ("my_task.yaml", str(tmp_path / "my_task.yaml"), "own/tasks"):
        (problem,) = find_task_problems(EvaluationConfig([name]))
        what = "folder" if name == "own/tasks" else "file"
        assert problem.startswith(f"evaluation.tasks: {name} is a {what}; name the folder and")
        named = f"{Path(name).parent} evaluation.tasks=[my_task]"
        assert problem.endswith(named if what == "file" else "own/tasks evaluation.tasks=[TASK]")
    (problem,) = find_task_problems(EvaluationConfig(["no/such.yml"]))
    assert problem.startswith("evaluation.tasks: there is no file no/such.yml")


def test_more_shots_than_solved_examples_are_refused(tmp_path: Path) -> None:
    """The setting is named, where random's own error would name nothing."""
    settings = local(tmp_path, "arc_easy", arc_rows(), num_fewshot=60)
    with pytest.raises(ValueError, match=r"evaluation.num_fewshot is 60, but arc_easy has fewer"):
        load_task("arc_easy", settings)
