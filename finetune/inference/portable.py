"""Adapters for other programs than PEFT: Ollama, llama.cpp and vLLM take plain LoRA only.

Ollama and llama.cpp know one scaling, alpha / r; an adapter of rsLoRA is rewritten for them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# As PEFT names the two matrices of a linear layer, and as the other programs look them up.
LORA_KEY = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")


@dataclass(frozen=True)
class SavedLora:
    """The settings of an exported adapter, and the shapes of its tensors by their names."""

    settings: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def rank(self) -> int:
        return int(self.settings["r"])

    @property
    def has_plain_scaling(self) -> bool:
        return not self.settings.get("use_rslora")

    def find_problem(self) -> str | None:
        """Return why only PEFT can load it; None of plain LoRA on linear layers."""
        kind = self.settings["peft_type"]
        if kind != "LORA":
            return f"it takes LoRA adapters only, and this one is {kind}"
        if self.settings.get("use_dora"):
            return "lora.use_dora=true is not supported"
        if self.settings.get("modules_to_save"):
            return "fully trained modules (modules_to_save) are not supported"
        other = [name for name in self.shapes if not LORA_KEY.fullmatch(name)]
        if other or self.settings.get("bias", "none") != "none":
            return f"tensors other than lora_A and lora_B are not supported ({other[:1]})"
        return None


def read_lora(folder: Path) -> SavedLora:
    """Read an exported adapter's settings and shapes, without its weights."""
    settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        names = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return SavedLora(settings, shapes)


def write_plain_scaling(folder: Path, into: Path) -> None:
    """Write an adapter with rsLoRA's scaling multiplied into B, so that alpha / r is 1."""
    lora = read_lora(folder)
    scaling = lora.settings["lora_alpha"] / math.sqrt(lora.rank)
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    scaled = {name: t * scaling if ".lora_B." in name else t for name, t in tensors.items()}
    settings = {**lora.settings, "use_rslora": False, "lora_alpha": lora.rank}
    into.mkdir(parents=True, exist_ok=True)
    save_file(scaled, into / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    (into / CONFIG_NAME).write_text(json.dumps(settings, indent=2), encoding="utf-8")
