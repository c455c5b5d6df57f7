"""Optimizers: each name that transformers knows can be built and steps here, or is refused."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from finetune.config import optimizers
from finetune.config.optimizers import OPTIMIZERS, Optimizer, find_optimizer_problems, supported
from finetune.config.schema import Config, ModelConfig, OptimizerConfig
from finetune.models.shape import find_shape
from finetune.pipeline import identity, memory_estimate
from finetune.sweeps import launchers
from finetune.training import grouping

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
    layer = torch.nn.Linear(256, 256)
    before = layer.weight.detach().clone()
    arguments = TrainingArguments(str(tmp_path), optim=name, use_cpu=True, report_to=[])
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(layer.parameters(), **settings)
    layer(torch.ones(1, 256)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    held = [v for v in optimizer.state[layer.weight].values() if isinstance(v, torch.Tensor)]
    state_bytes = sum(v.nbytes for v in held if v.numel() >= 256) / layer.weight.numel()
    assert state_bytes == pytest.approx(OPTIMIZERS[name].state_bytes, abs=0.2)


def test_the_table_has_every_name_of_transformers() -> None:
    """A name that a release adds gets its row, so that its facts are known before it is used."""
    assert set(OPTIMIZERS) == set(NAMES)


def test_pages_lie_in_the_host_s_memory_on_a_gpu_only() -> None:
    """A paged optimizer's state counts where no GPU can move it."""
    paged = OPTIMIZERS["paged_adamw_8bit"]
    assert (paged.resident_bytes("cuda"), paged.resident_bytes("cpu")) == (0.0, 2.0)
    assert OPTIMIZERS["adamw_8bit"].resident_bytes("cuda") == 2.0


def test_an_optimizer_is_added_by_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups, launchers, versions and the estimate ask the row; no other place knows a name."""
    package = optimizers.Package("yaml", "PyYAML")
    row = Optimizer("toy", 6.0, package, can_share_step=True, can_shard=True)
    config = Config(model=ModelConfig(path="random://tiny"), optimizer=OptimizerConfig(name="toy"))
    assert find_optimizer_problems(config.optimizer)
    monkeypatch.setitem(OPTIMIZERS, "toy", row)
    assert find_optimizer_problems(config.optimizer) == []
    assert grouping.find_obstacle(config) is None
    assert identity.find_versions(config, ()) == {"PyYAML": version("PyYAML")}
    shape, place = find_shape(config.model), memory_estimate.DeviceMemory("cpu", 4, 2**33)
    need = memory_estimate.estimate(config, shape, place)
    assert need.optimizer == 6.0 * memory_estimate.num_trained(config, shape)
    config.peft.method = "full"
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("ACCELERATE_USE_FSDP", "true")):
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert launchers.find_problems(config) == []


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
    package = OPTIMIZERS["stable_adamw"].package
    assert package is not None
    assert (package.module, package.name) == ("optimi", "torch-optimi")
    for name in set(NAMES) - set(supported()):
        assert find_optimizer_problems(OptimizerConfig(name=name))


def test_a_typing_error_gets_only_names_that_can_run() -> None:
    """The remedy leads to no second refusal."""
    (problem,) = find_optimizer_problems(OptimizerConfig(name="galore_adam"))
    assert not {"apollo_adamw", "galore_adamw"} & set(supported())
    assert problem.startswith("optimizer.name is 'galore_adam'; ")
    assert "galore_adamw" not in problem
    assert "apollo" not in problem
