"""What a process keeps: made once for each key, the newest few, and let go of when asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune.config.inputs import Inputs
from finetune.config.schema import Config, EvaluationConfig, ModelConfig
from finetune.models import base_model
from finetune.models.base_model import find_model
from finetune.pipeline.session import Kept, Session

TINY = ModelConfig(path="random://tiny")


def inputs_of(tmp_path: object) -> Inputs:
    return Inputs("cpu", find_model(TINY), [], TINY, "a", tmp_path)  # type: ignore[arg-type]


def test_the_newest_few_are_kept_and_made_once() -> None:
    """Equal keys are one key, also those that cannot be hashed; the longest unused one goes."""
    kept: Kept[str] = Kept(2)
    made: list[str] = []

    def get(key: dict[str, list[int]]) -> str:
        return kept.get(key, lambda: made.append(str(key)) or str(key))  # type: ignore[func-returns-value]

    one, two, three = ({"a": [number]} for number in (1, 2, 3))
    assert get(one) == get({"a": [1]}) == "{'a': [1]}"
    get(two)
    get(one)
    get(three)  # two goes
    get(one)
    get(two)
    assert made == [str(one), str(two), str(three), str(two)]


def test_a_base_is_shared_until_it_is_released(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model takes its place, since there is room for one."""
    loaded: list[str] = []
    real = base_model.load_base

    def load(model: ModelConfig, *given: Any) -> Any:
        loaded.append(model.dtype)
        return real(model, *given)

    monkeypatch.setattr(base_model, "load_base", load)
    session, config, inputs = Session(), Config(model=TINY), inputs_of(tmp_path)
    base = session.base(config, inputs)
    assert session.base(Config(model=replace(TINY)), inputs) is base
    assert session.base(Config(model=replace(TINY, dtype="bf16")), inputs) is not base
    assert session.base(config, inputs) is not base
    session.release()
    session.base(config, inputs)
    assert loaded == ["auto", "bf16", "auto", "auto"]


def test_two_sessions_share_nothing(tmp_path: object) -> None:
    """What one process keeps is no matter of the module's."""
    config, inputs = Config(model=TINY), inputs_of(tmp_path)
    one, other = Session(), Session()
    assert one.tokenizer(TINY, inputs.source) is one.tokenizer(TINY, inputs.source)
    assert one.tokenizer(TINY, inputs.source) is not other.tokenizer(TINY, inputs.source)
    config.evaluation = EvaluationConfig(["demo_science"], limit=4)
    assert one.tasks(config, None)[0] is one.tasks(config, None)[0]
    assert one.tasks(config, None)[0] is not other.tasks(config, None)[0]
    config.evaluation = EvaluationConfig(["demo_science"], limit=3)
    assert one.tasks(config, None)[0].name == "demo_science"
