"""What users type, in Hydra's grammar."""

from __future__ import annotations

import pytest

from finetune.config.grammar import grid_arguments, rewrite, without_null


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("evaluation.tasks=arc_easy", "evaluation.tasks=[arc_easy]"),
        ("evaluation.tasks=arc_easy,hellaswag", "evaluation.tasks=[arc_easy],[hellaswag]"),
        ("evaluation.tasks=[a,b]", "evaluation.tasks=[a,b]"),
        ('evaluation.tasks="a b"', 'evaluation.tasks=["a b"]'),
        ("evaluation.tasks=${x.y}", "evaluation.tasks=${x.y}"),
        ("lora.target_modules=all-linear", "lora.target_modules=[all-linear]"),
        (
            "lora.target_modules=all-linear,[q_proj]",
            "lora.target_modules=[all-linear],[q_proj]",
        ),
        ("lora.target_modules=shuffle(a,b)", "lora.target_modules=shuffle([a],[b])"),
        ("data.path=a.jsonl", "data.path=a.jsonl"),
        ("data.path=a.jsonl,b.jsonl", "data.path=a.jsonl,b.jsonl"),
        ("lora.r=4,8", "lora.r=4,8"),
        ("lora.r=[", "lora.r=["),
        ("lora.alpha=${mul:2,${lora.r}}", "lora.alpha='${mul:2,${lora.r}}'"),
        ("lora.alpha=${mul:2,${lora.r}},16", "lora.alpha='${mul:2,${lora.r}}',16"),
        ("lora.alpha=choice(1,${add:1,${lora.r}})", "lora.alpha=choice(1,'${add:1,${lora.r}}')"),
        ("lora.alpha='${mul:2,${lora.r}}'", "lora.alpha='${mul:2,${lora.r}}'"),
        ("data.path=${oc.env:HOME}/x", "data.path=${oc.env:HOME}/x"),
    ],
)
def test_an_override_is_rewritten_only_where_needed(typed: str, expected: str) -> None:
    """Text is a list of one, nested interpolations are quoted; the rest stays as typed."""
    assert rewrite(typed) == expected
    assert rewrite(expected) == expected


def test_a_grid_of_a_file_is_typed_values() -> None:
    """A YAML list is a list of choices, but one value for a setting that holds a list."""
    params = {
        "lora.r": [4, 8], "lora": {"alpha": "${mul:2,${lora.r}}"}, "evaluation.tasks": ["a", "b"],
        "lora.use_dora": [True, False], "experiment": None, "optimizer.lr": "1e-3,1e-4",
    }  # fmt: skip
    assert grid_arguments(params) == [
        "lora.r=4,8", "lora.alpha='${mul:2,${lora.r}}'", "evaluation.tasks=[a,b]",
        "lora.use_dora=True,False", "experiment=null", "optimizer.lr=1e-3,1e-4",
    ]  # fmt: skip


def test_no_experiment_is_no_override() -> None:
    """Hydra takes null in a defaults list only."""
    assert without_null(["lora.r=4", "experiment=null", "model=null"]) == ["lora.r=4", "model=null"]
