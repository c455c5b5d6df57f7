"""PEFT adapters on a base model: `target_modules` checked, attached, saved, loaded, removed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    IA3Model,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig as PeftSettings
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.config.methods import METHODS, lora_settings
from finetune.config.methods import changes_base as changes_base_at_first
from finetune.config.schema import ALL_LINEAR, LoraConfig, PeftConfig
from finetune.files import (
    Check,
    Damaged,
    allow,
    digest,
    file_digest,
    refuse_lfs_pointer,
    replaced,
)
from finetune.tracking import run_files
from finetune.tracking.run_folder import RunFolder

ADAPTER = "default"  # PEFT's name of a model's only adapter
FoldableLayer = tuple[PeftLoraLayer, torch.nn.Parameter]  # and its base layer's weight


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the model below an adapter, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def num_prepended(model: PreTrainedModel | PeftModel) -> int:
    """Return the number of virtual tokens that prompt tuning puts before each sequence."""
    settings = model.active_peft_config if isinstance(model, PeftModel) else None
    return settings.num_virtual_tokens if isinstance(settings, PromptTuningConfig) else 0


def find_problems(model: PreTrainedModel, peft: PeftConfig, lora: LoraConfig) -> list[str]:
    """Return why a PEFT method cannot be used on a model, which may be on the `meta` device."""
    method = METHODS[peft.method]
    if "target_modules" in method.lora:
        return find_target_problems(model, lora)
    kind = model.config.get_text_config().model_type
    known = None if method.model_types is None else method.model_types()
    if known is not None and kind not in known:
        return [
            f"peft.method is {method.name}, and PEFT knows no target modules of it in a {kind} "
            f"model; set peft=lora, or use a model of type {', '.join(known)}"
        ]
    return []


def find_target_problems(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """Return why `lora` does not fit a model: unknown target modules, or a rank above their width.

    PEFT itself ignores an unknown name as long as another one matches.
    """
    widths = _linear_widths(model)
    if lora.target_modules == [ALL_LINEAR]:
        targets = list(widths)
    else:
        targets = [name for name in lora.target_modules if name in widths]
    problems = [
        f"lora.target_modules: the model has no linear layer {name!r}; "
        f"{_hint(name, list(widths))}it has {', '.join(widths)}"
        for name in lora.target_modules
        if name not in widths and name != ALL_LINEAR
    ]
    narrowest = min((widths[name] for name in targets), default=lora.r)
    if lora.r > narrowest:
        name = min(targets, key=lambda target: widths[target])
        problems.append(
            f"lora.r is {lora.r}, but the layer {name} has only {narrowest} features; "
            f"set lora.r to at most {narrowest}"
        )
    return problems


def attach(model: PreTrainedModel, settings: PeftSettings, seed: int) -> PeftModel:
    """Attach a fresh adapter to the base, its weights in fp32 and initialised from `seed`.

    They are fp32 whatever the dtype of the base, so that a resumed run is bitwise the same: on a
    quantised base TRL would make them bf16, but load them back as fp32.
    """
    torch.manual_seed(seed)
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=True)
    assert isinstance(adapted, PeftModel)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for name, value in vars(adapted.active_peft_config).items():
        if isinstance(value, set):  # saved as a list, whose order would differ between processes
            setattr(adapted.active_peft_config, name, sorted(value))
    return adapted


@dataclass(frozen=True)
class LoraLayer:
    """One layer's update, `scaling * B A`: A [r, in], B [out, r], both fp32."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scaling: float


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA adapter detached from its base model."""

    settings: PeftLoraConfig
    layers: dict[str, LoraLayer]  # by the name of the base's layer
    tensors: dict[str, torch.nn.Parameter]  # by the name that PEFT saves them under


def draw(model: PreTrainedModel, lora: LoraConfig, seed: int) -> LoraWeights:
    """Initialise a LoRA adapter as `attach` does, without leaving it on the base."""
    adapted = attach(model, lora_settings(lora), seed)
    layers = {
        name.removeprefix("base_model.model."): LoraLayer(
            cast(torch.nn.Parameter, module.lora_A[ADAPTER].weight),
            cast(torch.nn.Parameter, module.lora_B[ADAPTER].weight),
            module.scaling[ADAPTER],
        )
        for name, module in adapted.named_modules()
        if isinstance(module, PeftLoraLayer)
    }
    tensors = {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    settings = cast(PeftLoraConfig, adapted.peft_config[ADAPTER])
    adapted.unload()
    return LoraWeights(settings, layers, tensors)


def save_weights(weights: LoraWeights, folder: Path) -> None:
    """Save an adapter's files, as PEFT does, into an existing folder."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.tensors.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    settings = copy.copy(weights.settings)
    settings.inference_mode = True
    settings.save_pretrained(str(folder))


def load_weights(weights: LoraWeights, folder: Path) -> None:
    """Load the tensors of a saved adapter into an adapter of the same settings."""
    saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    with torch.no_grad():
        for name, tensor in weights.tensors.items():
            tensor.copy_(saved[name])


def num_trainable(model: torch.nn.Module) -> int:
    """Return the number of parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _linear_widths(model: PreTrainedModel) -> dict[str, int]:
    """Return the last name of each linear layer but the head, with its smaller dimension."""
    head = model.get_output_embeddings()
    widths: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            short = name.rpartition(".")[2]
            width = min(module.weight.shape)
            widths[short] = min(width, widths.get(short, width))
    return widths


def _hint(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def save(
    adapter: PeftModel | LoraWeights,
    folder: Path,
    write_beside: Callable[[Path], object] = lambda _: None,
    check: Check = allow,
) -> None:
    """Save the adapter as safetensors, with the files of `write_beside`, atomically.

    What `check` raises leaves the folder as it was.
    """
    with replaced(folder, check) as temporary, warnings.catch_warnings():
        if isinstance(adapter, PeftModel):
            # AdaLoRA may leave a layer no rank at all, which PEFT takes for a lost shard.
            warnings.filterwarnings("ignore", message=".* LoRA tensor.s. have invalid shape")
            adapter.save_pretrained(str(temporary), safe_serialization=True)
        else:
            save_weights(adapter, temporary)
        write_beside(temporary)


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load a saved adapter onto the base, for evaluation."""
    with warnings.catch_warnings():
        # PEFT looks for AdaLoRA's ranks under LoRA's names, and then finds them under its own.
        warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match")
        return PeftModel.from_pretrained(model, str(folder), is_trainable=False)


@contextmanager
def folded(layers: Sequence[FoldableLayer]) -> Iterator[None]:
    """Merge LoRA updates into the base weights while the context lasts.

    The sums are the same, in another order. The original weights are put back at the end, and
    until then both are in memory.
    """
    originals = [(layer, weight, weight.data) for layer, weight in layers]
    try:
        with torch.no_grad():
            for layer, weight, data in originals:
                a, b = (
                    cast(torch.nn.Linear, matrices[ADAPTER]).weight
                    for matrices in (layer.lora_A, layer.lora_B)
                )
                weight.data = torch.addmm(data, b, a, alpha=layer.scaling[ADAPTER])
                layer.merged_adapters.append(ADAPTER)  # PEFT then adds no update to the output
        yield
    finally:
        for layer, weight, data in originals:
            weight.data = data
            layer.merged_adapters.clear()


def foldable_layers(model: PreTrainedModel | PeftModel) -> list[FoldableLayer]:
    """Return the LoRA layers with their base weights; none if one layer cannot be merged.

    Only in fp32 does merging cost no precision.
    """
    base = base_of(model)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())  # they may share a weight
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not all(_is_foldable(layer, ends) for layer in layers):
        return []
    return [
        (cast(PeftLoraLayer, layer), cast(torch.nn.Parameter, layer.get_base_layer().weight))
        for layer in layers
    ]


def _is_foldable(layer: BaseTunerLayer, ends: Sequence[torch.nn.Module | None]) -> bool:
    below = layer.get_base_layer()
    return (
        type(layer) is PeftLoraLinear
        and type(below) is torch.nn.Linear
        and below.weight.dtype == torch.float32
        and not any(end is one for end in ends for one in (layer, below))
        and layer.active_adapters == [ADAPTER]
        and not (layer.merged or layer.disable_adapters or layer.lora_variant)
        and not layer.lora_bias[ADAPTER]
    )


def changes_base(adapted: PeftModel) -> bool:
    """Return whether an adapter changed the base's weights: by its initialisation, or biases."""
    settings: Any = adapted.active_peft_config
    init = str(getattr(settings, "init_lora_weights", ""))
    return changes_base_at_first(init) or getattr(settings, "bias", "none") != "none"


def saved_digest(folder: Path) -> str:
    """Return the digest of a saved adapter.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        Damaged: a file differs from the one that was saved.
    """
    files = [folder / name for name in ("adapter_config.json", SAFETENSORS_WEIGHTS_NAME)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"model.adapter={folder} is not an adapter's folder: there is no "
                f"{file.absolute()}; name a folder that PEFT's save_pretrained wrote"
            )
    _refuse_damaged(folder, files)
    return digest([file_digest(file) for file in files])


def _refuse_damaged(folder: Path, files: Sequence[Path]) -> None:
    """Verify each file; those of a run by the digests that the run recorded."""
    run = RunFolder(folder.absolute().parent)
    for file in files:
        try:
            refuse_lfs_pointer(file)
        except ValueError as error:
            raise Damaged(f"model.adapter={folder}: {error}") from None
        problem = run_files.find_misfit(file, file.name)
        if folder.absolute() == run.adapter:
            problem = run.find_problem(f"{folder.name}/{file.name}")
        if problem:
            raise Damaged(f"model.adapter={folder}: {file.name} is damaged: {problem}")


def take_off(adapted: PeftModel) -> None:
    """Remove an adapter from the base, whose modules and weights are then as before."""
    base = base_of(adapted)
    if adapted.active_peft_config.is_prompt_learning:
        return  # virtual tokens leave the modules of the base as they are
    for name, layer in list(base.named_modules()):  # PEFT would leave modules_to_save's copies
        if isinstance(layer, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer.original_module)
    if not isinstance(adapted.base_model, IA3Model):
        adapted.unload()
        return
    for name, layer in list(base.named_modules()):  # PEFT refuses where the base is quantised
        if isinstance(layer, IA3Layer):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer.get_base_layer())
    del base.peft_config
