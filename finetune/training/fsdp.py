"""FSDP2: trained weights and optimizer state sharded across ranks, gathered to be saved.

Accelerate shards them. Gathering is a collective: all ranks call it, and rank 0 gets the tensors.
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
    """Let accelerate shard a model, in fp32, also on CPUs.

    By default (1.15) it does so on GPUs only, and reduces gradients in the dtype of the autocast.
    """
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters; under FSDP, this rank's shards of them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # validation leaves some of them gathered
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def full_tensors(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the full tensors on rank 0, on the CPU if they were sharded; nothing on others."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if distributed.is_main() else tensor
        if distributed.is_main():
            tensors[name] = tensor.contiguous()
    return tensors


@torch.no_grad()
def load_full_tensor(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Set a parameter, or this rank's shard of it, from a full tensor that every rank has."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        values = values.to(parameter.device)
        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
    parameter.copy_(values)


def full_optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return the full optimizer state by parameter names on rank 0; nothing on others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


def unshard(model: PreTrainedModel) -> None:
    """Turn rank 0's sharded model into an ordinary one, which can be saved."""
    tensors = full_tensors(trained_parameters(model))
    if not distributed.is_main():
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__bases__[1]  # fully_shard put its own before it
    for name, tensor in tensors.items():  # load_state_dict would run FSDP's hooks
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, torch.nn.Parameter(tensor))
    model.tie_weights()
