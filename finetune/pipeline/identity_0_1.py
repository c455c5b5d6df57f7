"""The identity that release 0.1 gave a run, so that its finished runs are found again.

It digested whole sections of settings. Nothing is added here: a run with a newer setting that
is not at its default cannot be that old.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.config.schema import Config, SourceConfig, changed_settings
from finetune.files import digest

# The settings of release 0.1 that entered an identity by their values, by section.
FIELDS = {
    "model": ("quantization", "double_quant", "attn_implementation", "trust_remote_code"),
    "peft": ("method", "num_virtual_tokens"),
    "lora": ("r", "alpha", "dropout", "target_modules", "use_rslora", "use_dora", "init"),
    "optimizer": (
        "name", "lr", "weight_decay", "scheduler", "warmup_ratio", "max_grad_norm",
    ),
    "data": (
        "split", "subset", "columns", "num_examples", "validation_fraction", "mask_prompt",
    ),
    "training": (
        "epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "max_length",
        "sequence_packing", "use_liger_kernel", "validate_every", "early_stopping", "seed",
    ),
}  # fmt: skip
SOURCE_FIELDS = ("split", "subset", "columns")
RESOLVED = ("precision", "processes", "fsdp")
PLACES = {"path": None, "revision": None}
NEUTRAL = dict.fromkeys(
    ("gradient_checkpointing", "device", "checkpoint_every", "keep_checkpoints")
)


def find_identity(config: Config, named: Mapping[str, Any]) -> str | None:
    """Return the identity that release 0.1 would have given a run; None where it had no such run.

    Args:
        config: its settings.
        named: what its identity of today is the digest of.
    """
    sections = {name: getattr(config, name) for name in FIELDS}
    if any(
        changed_settings(values).keys() - set(FIELDS[name]) for name, values in sections.items()
    ):
        return None
    old = {name: _values(values, FIELDS[name]) for name, values in sections.items()}
    training = {name: value for name, value in named["training"].items() if name in RESOLVED}
    return digest(
        {
            **old,
            "model": {
                **PLACES, **old["model"],
                "digest": named["model"]["digest"], "dtype": named["model"]["dtype"],
            },
            "adapter": named["adapter"],
            "data": _data(config, old["data"], named["data"]),
            "training": {
                **old["training"], **NEUTRAL, **training,
                "data_seed": named["training"]["order_seed"],
            },
            "versions": named["versions"],
        }
    )  # fmt: skip


def _values(values: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(values, name) for name in names}


def _data(config: Config, old: dict[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    data = {**PLACES, **_without_subset(old), "prompt_template": named["prompt_template"]}
    if not config.data.mix:
        return {**data, "digest": named["digest"]}
    filled = config.data.sources().values()
    mix = zip(filled, named["mix"], strict=True)
    return {**data, "mix": [_source(source, now) for source, now in mix]}


def _source(source: SourceConfig, named: Mapping[str, Any]) -> dict[str, Any]:
    values = _without_subset(_values(source, SOURCE_FIELDS))
    return {**PLACES, **values, "weight": named["weight"], "digest": named["digest"]}


def _without_subset(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != "subset" or v is not None}
