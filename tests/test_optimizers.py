"""Optimizers: each name that transformers knows can be built and steps here, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from finetune import optimizers
from finetune.config import OptimizerConfig
from finetune.optimizers import find_optimizer_problems, supported_names

NAMES = [str(item.value) for item in OptimizerNames]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_takes_a_step_or_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    """What passes the check works with the settings there are: nothing fails after the start."""
    problems = find_optimizer_problems(OptimizerConfig(name=name))
    if problems:
        (problem,) = problems
        assert problem.startswith(f"optimizer.name={name} ")
        assert problem.endswith("use optimizer.name=adamw_torch")
        assert "\n" not in problem
        return
    layer = torch.nn.Linear(70, 70)
    before = layer.weight.detach().clone()
    arguments = TrainingArguments(str(tmp_path), optim=name, use_cpu=True, report_to=[])
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(layer.parameters(), **settings)
    layer(torch.ones(1, 70)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("galore_adamw", "optim_target_modules"),
        ("galore_adafactor_layerwise", "optim_target_modules"),
        ("apollo_adamw", "optim_target_modules"),
        ("apollo_adamw_layerwise", "optim_target_modules"),
        ("adamw_anyprecision", "torchdistx"),
        ("adamw_torch_xla", "TPUs"),
        ("adamw_torch_npu_fused", "NPUs"),
        ("adalomo", "CUDA"),
    ],
)
def test_no_package_helps_a_name_that_cannot_run(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every package installed, what lacks a setting or a device is refused as before."""
    monkeypatch.setattr(optimizers, "find_spec", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (problem,) = find_optimizer_problems(OptimizerConfig(name=name))
    assert reason in problem
    assert "pip install" not in problem


def test_a_missing_package_is_named_as_it_is_installed() -> None:
    """The package's name on PyPI is not always the module's."""
    assert optimizers.OPTIMIZER_PACKAGES["stable_adamw"] == ("optimi", "torch-optimi")
    for name in set(NAMES) - set(supported_names()):
        assert find_optimizer_problems(OptimizerConfig(name=name))


def test_a_typing_error_gets_only_names_that_can_run() -> None:
    """The remedy leads to no second refusal."""
    (problem,) = find_optimizer_problems(OptimizerConfig(name="galore_adam"))
    assert not {"apollo_adamw", "galore_adamw"} & set(supported_names())
    assert problem.startswith("optimizer.name is 'galore_adam'; ")
    assert "galore_adamw" not in problem
    assert "apollo" not in problem
