"""Refuse run folders from somebody else that would run code, show secrets or use servers.

Their files are read by chat, export, rerun and sync; what these would run, show or send has to be
typed on the command line.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from finetune.config.foreign_configs import find_syntax_problem, read_small
from finetune.config.foreign_values import (
    find_reason_to_type,
    reads_elsewhere,
    shortened,
    single_values,
)
from finetune.config.grammar import find_override
from finetune.config.hydra_overrides import is_hydra

# Settings whose values are printed, and published with an exported model.
SHOWN = (("peft", "method"), ("data", "prompt_template"), ("lora", "init"))
TRUST = "model.trust_remote_code"


def find_config_problems(run: Path, *, trusts_remote_code: bool) -> Iterator[str]:
    """Yield settings of a run's config.yaml that only the user may set; it may be missing.

    Args:
        run: the run's folder.
        trusts_remote_code: whether the user typed --trust-remote-code.
    """
    path = run / "config.yaml"
    try:
        text = read_small(path)
        fault = find_syntax_problem(text)
        if fault is not None:
            yield f"{path}: {fault}"
            return
        settings = yaml.load(text, Loader=get_yaml_loader())  # noqa: S506  # as OmegaConf reads it
    except (OSError, ValueError, yaml.YAMLError):
        return  # reported where the settings are read
    trust = _value(settings, "model", "trust_remote_code")
    if trust not in (None, False) and not trusts_remote_code:
        model = shortened(_value(settings, "model", "path"))
        yield (
            f"{path}: {TRUST}={shortened(trust)} runs Python code of the model {model}; if you "
            "trust it, add --trust-remote-code"
        )
    for section, key in SHOWN:
        value = _value(settings, section, key)
        if isinstance(value, str) and reads_elsewhere(value):
            yield (
                f"{path}: {section}.{key}={shortened(value)} would show what it reads from the "
                "environment; write the value out in this file"
            )


def _value(settings: Any, section: str, key: str) -> Any:
    below = settings.get(section) if isinstance(settings, Mapping) else None
    return below.get(key) if isinstance(below, Mapping) else below


def find_link_problems(run: Path) -> Iterator[str]:
    """Yield links among the exported files that lead out of the run's folder.

    A copy would publish their targets.
    """
    root = os.path.realpath(run)  # Path.resolve raises on a loop of links
    places = [run / name for name in ("prompt.jinja", "chat_template.jinja", "adapter", "model")]
    for path in (file for place in places for file in (place, *sorted(place.rglob("*")))):
        real = os.path.realpath(path)
        if not Path(real).is_relative_to(root):
            yield f"{path}: links to {real}, out of the run's folder; copy it there"


def find_rerun_problems(
    recorded: Sequence[Any], typed: Sequence[str], command: str
) -> Iterator[str]:
    """Yield overrides that have to be typed again for a rerun, and typed ones that it lacks.

    Args:
        recorded: the run's overrides.
        typed: those that the user has typed again.
        command: that reruns the run.
    """
    for override in typed:
        if override not in recorded:
            yield f"{override} is not an override of the run, which a rerun repeats; leave it out"
    for override in recorded:
        reason = None if override in typed else _find_override_reason(override)
        if reason is not None:
            again = f"{command} {shlex.quote(str(override))}"
            yield f"{shortened(override)} {reason}; if you trust it, type it again: {again}"


def find_settings_to_type(
    settings: Mapping[str, Any], overrides: Sequence[str], typed: Sequence[str]
) -> Iterator[str]:
    """Yield, as overrides, the settings of a config.yaml that only the command line may ask for.

    Args:
        settings: of the run, by their dotted names.
        overrides: of the run; what they ask for is theirs to be typed again.
        typed: overrides that the user has typed again.
    """
    asked = [one for one in overrides if _find_override_reason(one) is not None]
    keys = {one.lstrip("+").partition("=")[0] for one in (*asked, *typed)}
    for name, value in settings.items():
        if name not in keys and any(find_reason_to_type(name, v) for v in single_values(value)):
            yield f"{name}={value}"


def _find_override_reason(typed: Any) -> str | None:
    if not isinstance(typed, str) or typed.startswith("-"):
        return "is an option of the command, not an override"
    override = find_override(typed)
    if override is None:
        return None  # the rerun refuses it
    if is_hydra(override):
        return "changes Hydra's own config"
    key = override.key_or_group
    reasons = (find_reason_to_type(key, value) for value in single_values(override))
    return next((reason for reason in reasons if reason is not None), None)
