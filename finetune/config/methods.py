"""Fine-tuning methods (LoRA, AdaLoRA, IA3, prefix and prompt tuning, full): a table row each.

A method is added by its row and a YAML in `conf/peft/`. Nothing here imports torch; what builds
PEFT's settings imports PEFT when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, cast

from finetune.config.schema import ALL_LINEAR, LoraConfig, PeftConfig

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftConfig as PeftSettings


class Sizes(Protocol):
    """The sizes of a base that the number of trained parameters depends on, `shape.Shape`'s."""

    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def keys(self) -> int: ...
    @property
    def inner(self) -> int: ...
    @property
    def num_linear(self) -> int: ...
    @property
    def num_other(self) -> int: ...
    @property
    def targets(self) -> Mapping[str, tuple[int, int, int]]: ...  # name -> how many, in, out


@dataclass(frozen=True)
class Method:
    """A row: a method's settings, trained parameters, PEFT config, and restrictions."""

    name: str
    count: Callable[[PeftConfig, LoraConfig, Sizes], int]  # parameters that it trains
    # Returns PEFT's settings from ours and the optimizer steps of the training; None: there is no
    # adapter, the weights of the base are trained and saved as a model.
    build: Callable[[PeftConfig, LoraConfig, int], PeftSettings] | None = None
    lora: tuple[str, ...] = ()  # settings of `lora` that it takes
    takes_virtual_tokens: bool = False  # takes peft.num_virtual_tokens
    # Returns the model types that PEFT knows the target layers of; None: they are
    # lora.target_modules, or it has none.
    model_types: Callable[[], Collection[str]] | None = None
    shares_step: bool = False  # several adapters can be trained together over one base
    # Why gradient checkpointing cannot be used, and the remedy; None: it can be.
    checkpointing_problem: str | None = None
    merge_problem: str | None = None  # why it is not merged into the base; None: it can be

    @property
    def trains_base(self) -> bool:
        """True if the weights of the base model are trained, without an adapter."""
        return self.build is None


@dataclass(frozen=True)
class Initialisation:
    """A row: an initialisation of LoRA's matrices, `lora.init`."""

    name: str
    changes_base: bool = False  # subtracts the initial B A from the weights of the base
    fits_quantised: bool = True  # PEFT draws it on quantised weights
    fits_gptq: bool = True  # and on those of a GPTQ checkpoint
    needs_even_rank: bool = False


def build_settings(peft: PeftConfig, lora: LoraConfig, num_steps: int) -> PeftSettings:
    """Return PEFT's config of a method with an adapter.

    Args:
        peft: the method.
        lora: the settings of methods with a rank or target modules.
        num_steps: optimizer steps of the training, over which AdaLoRA shifts its ranks.
    """
    build = METHODS[peft.method].build
    assert build is not None, f"{peft.method} puts no adapter onto the base"
    return build(peft, lora, num_steps)


def lora_settings(lora: LoraConfig) -> PeftLoraConfig:
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        **lora_basics(lora),
        r=lora.r,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=cast(Any, True if lora.init == "default" else lora.init),
    )


def lora_basics(lora: LoraConfig) -> dict[str, Any]:
    """Return the arguments that PEFT's LoRA and AdaLoRA configs share."""
    return {
        "task_type": "CAUSAL_LM",
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": find_targets(lora),
    }


def find_targets(lora: LoraConfig) -> str | list[str]:
    """Return the layers as PEFT names them: all linear ones, or a list."""
    return ALL_LINEAR if lora.target_modules == [ALL_LINEAR] else lora.target_modules


def first_rank(rank: int) -> int:
    """Return AdaLoRA's initial rank: 1.5 times the target rank, as in its paper."""
    return rank + (rank + 1) // 2


def changes_base(init: str) -> bool:
    """Return whether an initialisation alters the base; PEFT allows suffixes (pissa_niter_16)."""
    names = tuple(name for name, row in INITIALISATIONS.items() if row.changes_base)
    return init.startswith(names)


def _adalora_settings(_: PeftConfig, lora: LoraConfig, num_steps: int) -> PeftSettings:
    """Keep the initial ranks for a tenth of the steps, and the final ones for the last third."""
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        **lora_basics(lora),
        target_r=lora.r,
        init_r=first_rank(lora.r),
        total_step=num_steps,
        tinit=num_steps // 10,
        tfinal=num_steps // 3,
    )


def _ia3_settings(*_: Any) -> PeftSettings:
    from peft import IA3Config

    return IA3Config(task_type="CAUSAL_LM")


def _ia3_model_types() -> Collection[str]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

    return list(TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)


def _prefix_settings(peft: PeftConfig, *_: Any) -> PeftSettings:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=peft.num_virtual_tokens)


def _prompt_settings(peft: PeftConfig, *_: Any) -> PeftSettings:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=peft.num_virtual_tokens)


def target_sizes(lora: LoraConfig, sizes: Sizes) -> list[tuple[int, int, int]]:
    """Return how many layers there are of each target, with their inputs and outputs."""
    names = sizes.targets if lora.target_modules == [ALL_LINEAR] else lora.target_modules
    return [sizes.targets[name] for name in names]


def _count_lora(_: PeftConfig, lora: LoraConfig, sizes: Sizes) -> int:
    return sum(count * lora.r * (a + b) for count, a, b in target_sizes(lora, sizes))


def _count_adalora(_: PeftConfig, lora: LoraConfig, sizes: Sizes) -> int:
    """Count at the initial rank, with a singular value for each rank."""
    rank = first_rank(lora.r)
    return sum(count * rank * (a + b + 1) for count, a, b in target_sizes(lora, sizes))


def _count_ia3(_: PeftConfig, __: LoraConfig, sizes: Sizes) -> int:
    """Count a factor for each key and value, and each input of the MLP's last layer."""
    return sizes.layers * (2 * sizes.keys + sizes.inner)


def _count_prefix(peft: PeftConfig, _: LoraConfig, sizes: Sizes) -> int:
    """Count keys and values of every layer."""
    return peft.num_virtual_tokens * sizes.layers * 2 * sizes.keys


def _count_prompt(peft: PeftConfig, _: LoraConfig, sizes: Sizes) -> int:
    return peft.num_virtual_tokens * sizes.hidden


def _count_all(_: PeftConfig, __: LoraConfig, sizes: Sizes) -> int:
    return sizes.num_linear + sizes.num_other


_NOT_IN_WEIGHTS = "changes no weights of the base model; leave out --merge"

METHODS = {
    row.name: row
    for row in (
        Method(
            "lora",
            count=_count_lora,
            build=lambda _, lora, __: lora_settings(lora),
            lora=tuple(field.name for field in fields(LoraConfig)),
            shares_step=True,
        ),
        Method(
            "adalora",
            count=_count_adalora,
            build=_adalora_settings,
            lora=("r", "alpha", "dropout", "target_modules"),
        ),
        Method("ia3", count=_count_ia3, build=_ia3_settings, model_types=_ia3_model_types),
        Method(
            "prefix_tuning",
            count=_count_prefix,
            build=_prefix_settings,
            takes_virtual_tokens=True,
            checkpointing_problem="recomputing loses the prefix: set it to false, or use "
            "peft=prompt_tuning",
            merge_problem=_NOT_IN_WEIGHTS,
        ),
        Method(
            "prompt_tuning",
            count=_count_prompt,
            build=_prompt_settings,
            takes_virtual_tokens=True,
            merge_problem=_NOT_IN_WEIGHTS,
        ),
        Method(
            "full", count=_count_all, merge_problem="has no adapter to merge; leave out --merge"
        ),
    )
}

INITIALISATIONS = {
    row.name: row
    for row in (
        Initialisation("default"),
        Initialisation("gaussian"),
        Initialisation("orthogonal", fits_quantised=False, fits_gptq=False, needs_even_rank=True),
        Initialisation("olora", changes_base=True, fits_gptq=False),
        Initialisation("pissa", changes_base=True, fits_quantised=False, fits_gptq=False),
    )
}
