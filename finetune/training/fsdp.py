"""FSDP: each process holds its part of every weight that is trained, and of the optimizer's state.

Accelerate deals the parts out; here they become whole again, for a checkpoint or the run's result.
All processes must ask for that at once, and the first one alone is given it.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from finetune import distributed


def use_fsdp(accelerator: Accelerator, settings: dict[str, Any]) -> None:
    """Let accelerate deal a model's weights out, in fp32, also on CPUs.

    Left alone (1.15) it does so on GPUs only, and adds up gradients in the autocast's dtype.
    """
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return what a training changes; where weights are dealt out, this process's parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # validation leaves some of them gathered
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole_tensors(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the first process all values, on the CPU where they were dealt out; others nothing."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if distributed.is_main() else tensor
        if distributed.is_main():
            found[name] = tensor.contiguous()
    return found


@torch.no_grad()
def put_back(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Set a parameter, or this process's part of it, to whole values that every process has."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        values = values.to(parameter.device)
        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
    parameter.copy_(values)


def whole_optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return the first process the optimizer's state by the parameters' names; others nothing."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


def make_whole(model: PreTrainedModel) -> None:
    """Make the first process's model an ordinary one again, which can be saved."""
    tensors = whole_tensors(trained_parameters(model))
    if not distributed.is_main():
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__bases__[1]  # fully_shard put its own before it
    for name, tensor in tensors.items():  # load_state_dict would run FSDP's hooks
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, torch.nn.Parameter(tensor))
    model.tie_weights()
