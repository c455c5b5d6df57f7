"""The name of a sweep: the same command has the same, another has another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from finetune import planning
from finetune.config import Config, ModelConfig, SweepConfig
from finetune.planning import sweep_name
from finetune.run_folder import Job


def name(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, experiment: str | None = None, **sweep: Any
) -> str:
    """Return the name of a sweep over the given overrides."""
    choices = {"model": "tiny", "data": "demo", "experiment": experiment}
    hydra = SimpleNamespace(runtime=SimpleNamespace(choices=choices))
    monkeypatch.setattr(planning, "HydraConfig", SimpleNamespace(get=lambda: hydra))
    paths = [a.removeprefix("model.path=") for a in arguments if a.startswith("model.path=")]
    jobs = [
        Job(Config(model=ModelConfig(path=path), sweep=SweepConfig(**sweep)), "", [*arguments], {})
        for path in (paths[0].split(",") if paths else ["random://tiny"])
    ]
    return sweep_name(jobs, arguments)


def test_the_default_name_is_that_of_earlier_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command continues the same sweep."""
    assert name(monkeypatch, "lora.r=4", "model=tiny") == "tiny-demo-0d2ead1d"
    assert name(monkeypatch, "tracking.uri=x", "lora.r=4", "model=tiny") == "tiny-demo-0d2ead1d"


@pytest.mark.parametrize(
    ("path", "begin"),
    [
        ("org/Some-Model-1.5B", "some-model-1.5b-demo-"),
        ("/models/mine/", "mine-demo-"),
        ("package://llm/Smol.Q4_1.gguf", "smol.q4_1.gguf-demo-"),
        ("a/one,b/two", "one-two-demo-"),
        (".", "model-demo-"),
    ],
)
def test_a_sweep_is_named_after_its_models_path(
    path: str, begin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the option that the path replaced."""
    assert name(monkeypatch, f"model.path={path}").startswith(begin)


def test_an_experiment_with_another_model_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its registered model is not that of the experiment."""
    typed = name(monkeypatch, "model.path=org/other", experiment="mistral_alpaca_arc")
    assert typed.startswith("mistral_alpaca_arc-other-")
    assert name(monkeypatch, experiment="e").startswith("e-")


def test_two_names_are_never_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any script and length; the digest of a long name is not cut off."""
    given = ["Опыт", "実験", "My Sweep", "my sweep", "my-sweep", "x" * 90, "x" * 91]
    assert len({name(monkeypatch, name=one) for one in given}) == len(given)
    paths = [f"model.path={'x' * 100}/{'y' * 100}{number}" for number in (1, 2)]
    assert len({name(monkeypatch, path) for path in paths}) == 2
    assert all(len(name(monkeypatch, path)) <= 80 for path in paths)
