"""How other programs load an exported model: their commands, or why they cannot."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from finetune.config.methods import METHODS
from finetune.inference.portable import SavedLora
from finetune.inference.trained import Trained

# vLLM's --max-lora-rank (vllm/config/lora.py, MaxLoRARanks); without it 16.
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Use:
    """One program that an export is for: its command, or why it is not for it."""

    program: str
    command: str | None
    problem: str | None = None


def merge_remedy(run: Trained) -> str:
    """Return the end of a problem that merging solves; empty of methods that do not merge."""
    method = METHODS[run.config.peft.method]
    return "; export a merged model with --merge" if method.merge_problem is None else ""


def find_vllm_use(run: Trained, place: str, lora: SavedLora | None) -> Use:
    """Return vLLM's command.

    Args:
        run: that is exported.
        place: the export's folder, or OWNER/NAME of the hub.
        lora: the adapter; None of a complete model.
    """
    if lora is None:
        return Use("vLLM", f"vllm serve {shlex.quote(place)}")
    problem = lora.find_problem()
    if problem is None and lora.rank > VLLM_RANKS[-1]:
        problem = f"its rank is {lora.rank}, and vLLM takes {VLLM_RANKS[-1]} at most"
    if problem is not None:
        return Use("vLLM", None, problem + merge_remedy(run))
    words = ["vllm", "serve", run.source.location]
    if run.source.revision is not None:
        words += ["--revision", run.source.revision]
    words.append("--enable-lora")
    if lora.rank > VLLM_RANKS[0]:
        words += ["--max-lora-rank", str(min(r for r in VLLM_RANKS if r >= lora.rank))]
    words += ["--lora-modules", f"{run.name}={place}"]
    return Use("vLLM", shlex.join(words))


def find_llama_cpp_use(lora: SavedLora | None) -> Use:
    """Return llama.cpp's command for an export that has a GGUF file."""
    if lora is None:
        return Use("llama.cpp", "llama-cli -m model.gguf")
    return Use("llama.cpp", "llama-cli -m BASE.gguf --lora adapter.gguf")
