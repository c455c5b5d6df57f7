"""What is typed: every problem at once, with the nearest known name, and `+` kept out."""

from __future__ import annotations

import pytest

from finetune.config import register
from finetune.overrides import find_override_problems

register()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("lora.rr=3", "lora.rr is not a setting; did you mean 'lora.r'?"),
        ("lora.r=abc", "lora.r=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        ("lora.r=4,abc", "lora.r=abc: Value 'abc' of type 'str'"),
        ("modle=tiny", "modle is not a setting; did you mean 'model'?"),
        ("model=tinny", "model=tinny: there is no such option; did you mean 'tiny'?"),
        ("+lora.rank=3", "+lora.rank=3: + is for new keys"),
        ("++lora.r=3", "++lora.r=3: + is for new keys"),
        ("+experiment=x", "+experiment=x: + is for new keys"),
        ("evaluation.data_files.a.b=c", "evaluation.data_files.a.b=c: write +evaluation"),
        ("data.mix.0.wieght=2", "data.mix.0.wieght is not a setting of data.mix.0; did you mean"),
        ("data.mix.0.weight=x", "data.mix.0.weight=x: Value 'x' of type 'str' could not be conv"),
        ("lora.r=[", "lora.r=[: "),
    ],
)
def test_a_wrong_override_is_told_with_its_remedy(typed: str, expected: str) -> None:
    """Each kind of mistake has its line."""
    (problem,) = find_override_problems([typed], multirun=True)
    assert problem.startswith(expected)


def test_all_wrong_overrides_are_told_at_once_and_ranges_with_them() -> None:
    """A misspelt key does not hide a value out of range."""
    typed = ["lora.rr=3", "model=tinny", "optimizer.lr=-1", "lora.alpha=1,0"]
    problems = find_override_problems(typed, multirun=True)
    assert [p.split(" ")[0].split("=")[0] for p in problems] == [
        "lora.rr", "model", "optimizer.lr", "lora.alpha",
    ]  # fmt: skip


def test_several_values_without_multirun_are_refused() -> None:
    """A grid that was meant as a sweep is not taken for a list."""
    (problem,) = find_override_problems(["lora.r=4,8"], multirun=False)
    assert "--multirun" in problem


@pytest.mark.parametrize(
    "typed",
    [
        "lora.r=8", "model=tiny", "experiment=mistral_alpaca_arc", "lora.target_modules=[q_proj]",
        "+evaluation.data_files.arc_easy.test=x.jsonl", "hydra.verbose=true", "~lora",
        "model.path='${oc.env:HOME}'", "training.max_steps=null",
        "data.mix.1.weight=2", "++data.mix.1.columns.instruction=q",
    ],
)  # fmt: skip
def test_a_right_override_passes(typed: str) -> None:
    """Nothing that Hydra accepts under the schema is refused."""
    assert find_override_problems([typed], multirun=False) == []
