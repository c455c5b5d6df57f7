"""The questions that two models answer differently, as they are found and printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from finetune import flips as command
from finetune.config.schema import Config
from finetune.reporting.flips import find_flips
from finetune.tracking.run_folder import RunFolder

CONFIG = OmegaConf.to_yaml(OmegaConf.structured(Config))
CHOICES: dict[str, Any] = {
    "question": "Which is a fruit?",
    "choices": ["stone", "apple"],
    "gold": 1,
    "id": "q1",
}
TEXT: dict[str, Any] = {
    "question": "Name the capital\nof France.",
    "gold": ["Paris"],
    "category": "geography",
}


def item(name: str, base: float, tuned: float, metric: str = "acc", **texts: Any) -> dict[str, Any]:
    sides = {"base": {metric: base}, "tuned": {metric: tuned}}
    return {"hash": name, "prompt": f"p{name}", **sides, **texts}


def write_run(folder: Path, *items: dict[str, Any], metric: str = "acc") -> RunFolder:
    """Write what a run's folder has to have."""
    run = RunFolder(folder)
    run.write_text("config.yaml", CONFIG)
    side = {"metrics": {metric: 0.5}, "num_questions": len(items)}
    run.write_json("evaluation/questions.json", {"tuned": side, "base": side})
    lines = "".join(json.dumps(one) + "\n" for one in items)
    run.write_text("evaluation/questions.items.jsonl", lines)
    return run


def printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of the command."""
    monkeypatch.setattr(sys, "argv", ["finetune.flips", *map(str, arguments)])
    code = 0
    try:
        command.main()
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    said = {"base": [-3.0, -5.25], "tuned": [-4.0, -2.5]}
    texts = {"base": "London.", "tuned": "Berlin"}
    return write_run(
        tmp_path / "run",
        item("a", 0.0, 1.0, **CHOICES, said=said),
        item("b", 1.0, 0.0, **TEXT, said=texts),
        item("c", 1.0, 1.0, **TEXT),
    )


def test_flips_are_gained_or_lost(run: RunFolder) -> None:
    """Of all questions that both have answered; with what each picked."""
    found = find_flips(run, None, "questions", "acc")
    assert (found.total, found.gained, len(found.flips)) == (3, 1, 2)
    first, second = found.flips
    assert (first.pick(first.before), first.pick(first.after), first.right) == (
        "stone", "apple", "apple",
    )  # fmt: skip
    assert (second.gained, second.pick(second.before), second.right) == (False, "London.", "Paris")


def test_less_may_be_better(tmp_path: Path) -> None:
    """As for a perplexity."""
    lower = write_run(tmp_path / "run", item("a", 3.0, 2.0, "perplexity"), metric="perplexity")
    assert find_flips(lower, None, "questions", "perplexity").gained == 1


def test_they_are_printed_with_both_answers(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each choice with both log-likelihoods; a summary at the end."""
    code, out, _ = printed(capsys, monkeypatch, run.path)
    assert code == 0
    assert out.splitlines() == [
        "+ q1",
        "    Which is a fruit?",
        "       -3.00     -4.00  stone  before",
        "       -5.25     -2.50  apple  right after",
        "",
        "- [geography]",
        "    Name the capital",
        "    of France.",
        "    right:  Paris",
        "    before: London.",
        "    after:  Berlin",
        "",
        "questions/acc, base -> tuned: 1 gained and 1 lost of 3 questions",
    ]


@pytest.mark.parametrize(
    ("flags", "shown"),
    [(["--gained"], "+"), (["--lost"], "-"), (["--category", "geography"], "-")],
)
def test_a_part_of_them_is_printed(
    run: RunFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    shown: str,
) -> None:
    """And how many of all these are."""
    _, out, _ = printed(capsys, monkeypatch, run.path, *flags)
    assert [line[0] for line in out.splitlines() if line[:2] in ("+ ", "- ")] == [shown]
    assert out.endswith("1 gained and 1 lost of 3 questions; 1 shown\n")


def test_all_tasks_are_compared_in_the_order_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With choices and answers in one file, both kinds; a perplexity by each row's own."""
    run = write_run(tmp_path / "run", item("a", 0.0, 1.0), item("b", 1.0, 0.0, "exact_match"))
    side = {"metrics": {"acc": 0.5, "acc_norm": 0.5, "exact_match": 0.5}, "num_questions": 2}
    run.write_json("evaluation/questions.json", {"tuned": side, "base": side})
    pairs = {"base": {"perplexity": [-9.0, 3]}, "tuned": {"perplexity": [-6.0, 3]}}
    run.write_text(
        "evaluation/heldout.items.jsonl", json.dumps({"hash": "h", "prompt": "p", **pairs}) + "\n"
    )
    kind = {"aggregation": "weighted_perplexity", "higher_is_better": False}
    one = {"metrics": {"perplexity": 9.0}, "definitions": {"perplexity": kind}, "num_questions": 1}
    run.write_json("evaluation/heldout.json", {"tuned": one, "base": one})
    settings = OmegaConf.structured(Config)
    settings.evaluation.tasks = ["questions", "heldout"]
    run.write_text("config.yaml", OmegaConf.to_yaml(settings))
    code, out, _ = printed(capsys, monkeypatch, run.path)
    assert code == 0
    assert [line.partition(",")[0] for line in out.splitlines() if " of " in line] == [
        "questions/acc", "questions/exact_match", "heldout/perplexity",
    ]  # fmt: skip
    assert out.endswith("heldout/perplexity, base -> tuned: 1 gained and 0 lost of 1 questions\n")


def test_two_runs_are_compared(
    run: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By their tuned models; a question that only one has is none of both."""
    other = write_run(tmp_path / "other", item("b", 0.0, 1.0, **TEXT), item("d", 0.0, 1.0))
    _, out, _ = printed(capsys, monkeypatch, run.path, other.path)
    assert "questions/acc, run -> other: 1 gained and 0 lost of 1 questions" in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--task", "quetsions"], "did you mean 'questions'?"),
        (["--metric", "ac"], "did you mean 'acc'?"),
        (["--category", "geografy"], "did you mean 'geography'?"),
    ],
)
def test_what_is_not_there_is_refused(
    run: RunFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    problem: str,
) -> None:
    """With the nearest that is."""
    code, out, err = printed(capsys, monkeypatch, run.path, *arguments)
    assert (code, out) == (2, "")
    assert problem in err


def test_a_folder_without_scores_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, whatever is missing."""
    code, _, err = printed(capsys, monkeypatch, tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "is not a run's folder" in err
    RunFolder(tmp_path).write_text("config.yaml", CONFIG)
    assert "has no scores yet" in printed(capsys, monkeypatch, tmp_path)[2]
