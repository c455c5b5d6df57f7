"""The trained model of a run, loaded for use: its base, its tokenizer and its adapter.

A run that tuned every weight has no base but itself. PiSSA and OLoRA subtract their initial adapter
from the base; here their adapters are converted to ones for the published base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.config.foreign_runs import find_config_problems
from finetune.config.inputs import Source
from finetune.config.methods import METHODS, changes_base
from finetune.config.schema import Config, ModelConfig
from finetune.files import resolved
from finetune.models import base_model, quantization
from finetune.models.precision import pick_device
from finetune.models.saved_adapter import find_code_problems
from finetune.pipeline.identity import model_identity
from finetune.problems import Refused, nearest
from finetune.tracking.run_folder import REMEDY, RunFolder

TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class Trained:
    """A run's settings, and the model that its adapter is for."""

    folder: RunFolder
    config: Config
    model: ModelConfig  # the base's; of a full run, of the model that it trained
    source: Source
    device: torch.device

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_full(self) -> bool:
        return METHODS[self.config.peft.method].trains_base

    @property
    def changes_the_base(self) -> bool:
        """Whether its adapter fits only a base from which its initialisation was subtracted."""
        return changes_base(self.config.lora.init)

    def load_base(self) -> PreTrainedModel:
        """Load the base, frozen.

        Raises:
            Refused: the hub has the model, and this machine only a part of it.
        """
        try:
            return base_model.load_base(self.model, self.source, self.device)
        except (OSError, ValueError) as error:
            raise _unloadable(self.model, error) from None

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the base's tokenizer; a full run's own, where it has one.

        Raises:
            Refused: it is not there, or needs Python code of its own.
        """
        try:
            if self.is_full and not (self.folder.model / TOKENIZER_FILE).is_file():
                base = self.config.model
                return base_model.load_tokenizer(base, base_model.find_model(base))
            return base_model.load_tokenizer(self.model, self.source)
        except (OSError, ValueError) as error:
            raise _unloadable(self.model, error) from None


def find_trained(path: Path, *, trusts_remote_code: bool = False) -> Trained:
    """Find the adapter or model of a run's folder, and its base, without loading weights.

    Args:
        path: of the run's folder, which may come from somebody else.
        trusts_remote_code: whether the user lets Python code of its model run.

    Raises:
        Refused: it is no run's folder, is not trained yet, its base is missing, or its settings
            would run code or read the environment.
    """
    folder = RunFolder(resolved(path))
    _refuse_code(folder, trusts_remote_code=trusts_remote_code)
    config = folder.read_config()
    if config.peft.method not in METHODS:
        unknown = f"{path}: peft.method is {config.peft.method!r}"
        raise Refused([f"{unknown}; {nearest(config.peft.method, tuple(METHODS))}"])
    config = _with_own_templates(folder, config)
    is_full = METHODS[config.peft.method].trains_base
    if not (folder.model / "config.json" if is_full else folder.adapter / CONFIG_NAME).is_file():
        status = folder.status()
        raise Refused(
            [
                f"{path} has no {'model' if is_full else 'adapter'} yet"
                f"{f' ({status.state})' if status else ''}; start its command again to finish it"
            ]
        )
    if damage := folder.find_weights_damage(thorough=True):
        raise Refused([f"{path}: {n} is damaged: {why}; {REMEDY}" for n, why in damage.items()])
    model = config.model
    if is_full:
        model = replace(model, path=str(folder.model), revision=None, quantization="none")
    try:
        source = base_model.find_model(model)
        model = quantization.as_loaded(model, base_model.load_config(model, source))
    except FileNotFoundError as error:
        raise Refused([f"{path}: its base is missing: {error}"]) from None
    except (OSError, ValueError) as error:  # such as for a model with its own Python code
        raise _unloadable(model, error) from None
    # The model does not depend on the device: a run of another machine may be used on this one.
    return Trained(folder, config, model, source, pick_device("auto"))


def _with_own_templates(folder: RunFolder, config: Config) -> Config:
    """Return settings with the run's own copies of template files, which may have changed.

    Raises:
        Refused: a copy is damaged.
    """
    for file in (folder.prompt_template, folder.chat_template):
        if why := folder.find_problem(file.name):
            raise Refused([f"{file} is damaged: {why}; {REMEDY}"])
    if folder.prompt_template.is_file():
        template = replace(config.data, prompt_template=str(folder.prompt_template))
        config = replace(config, data=template)
    if folder.chat_template.is_file():
        model = replace(config.model, chat_template=str(folder.chat_template))
        config = replace(config, model=model)
    return config


def _unloadable(model: ModelConfig, error: Exception) -> Refused:
    fault = next(iter(str(error).splitlines()), type(error).__name__)
    return Refused([f"model.path={model.path} cannot be loaded: {fault}"])


def _refuse_code(folder: RunFolder, *, trusts_remote_code: bool) -> None:
    """Refuse a run's folder whose settings would run code or read the environment.

    Raises:
        Refused: they would; only the user may set this.
    """
    problems = [*find_config_problems(folder.path, trusts_remote_code=trusts_remote_code)]
    if (folder.adapter / CONFIG_NAME).is_file():
        problems += find_code_problems(folder.adapter)
    if problems:
        raise Refused(problems)


def find_difference(one: Trained, other: Trained) -> str | None:
    """Return the settings in which the bases of two runs differ; None where they share a base."""
    bases = [
        model_identity(replace(r.config, model=r.model), r.source, str(r.device))
        for r in (one, other)
    ]
    keys = [key for key in {**bases[0], **bases[1]} if bases[0].get(key) != bases[1].get(key)]
    return ", ".join("weights" if key == "digest" else key for key in keys) or None


def load_as_published(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load a saved adapter onto a model without changing its weights."""
    settings = PeftConfig.from_pretrained(str(folder))
    _initialise_nothing(settings)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=False, config=settings)


def _initialise_nothing(settings: Any) -> None:
    """Make PEFT initialise an adapter, which it then overwrites, without changing the base."""
    if settings.peft_type == "LORA":
        settings.init_lora_weights = True


def write_adapter(run: Trained, folder: Path) -> None:
    """Write a run's adapter, converted to the published base, into an existing folder.

    Raises:
        Refused: the base was quantised again after the subtraction, so there is no such adapter.
    """
    tensors = load_file(run.folder.adapter / SAFETENSORS_WEIGHTS_NAME)
    settings: Any = PeftConfig.from_pretrained(str(run.folder.adapter))
    if run.changes_the_base:
        if run.model.quantization != "none":
            raise Refused(
                [
                    f"{run.name}: lora.init={run.config.lora.init} re-quantised the base's "
                    "residual weights, so the update cannot be expressed as an adapter for the "
                    "original base; export a merged model: python -m finetune.export "
                    f"{run.folder.path} --merge"
                ]
            )
        tensors = _with_initial_part_removed(tensors, _initial_tensors(run))
        settings.r *= 2  # alpha: such that the scaling stays
        settings.lora_alpha *= math.sqrt(2) if settings.use_rslora else 2
    _initialise_nothing(settings)
    settings.base_model_name_or_path = run.source.location
    settings.revision = run.source.revision
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    settings.save_pretrained(str(folder))


def _initial_tensors(run: Trained) -> dict[str, torch.Tensor]:
    """Return the adapter before training, which depends on the base's weights only."""
    settings = PeftConfig.from_pretrained(str(run.folder.adapter))
    fresh = get_peft_model(run.load_base(), settings)
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(fresh)
    return {name: tensor.float().cpu() for name, tensor in tensors.items()}


def _with_initial_part_removed(
    tensors: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the update against the published weights, W + s (B A - B0 A0), in twice the rank.

    As PEFT's `subtract_mutated_init`, which forgets DoRA's magnitudes.
    """
    removed = dict(tensors)
    for name, tensor in tensors.items():
        if "lora_A" in name:
            removed[name] = torch.cat([tensor, initial[name]], dim=0)
        elif "lora_B" in name:
            removed[name] = torch.cat([tensor, -initial[name]], dim=1)
    return removed
