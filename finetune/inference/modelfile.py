"""An Ollama Modelfile of an exported model: base, adapter, and the training's prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finetune.config.paths import local_path
from finetune.inference import gguf_files
from finetune.inference.ollama_prompt import OllamaPrompt, build_prompt
from finetune.inference.portable import SavedLora, write_plain_scaling
from finetune.inference.serving import Use, merge_remedy
from finetune.inference.trained import Trained
from finetune.models import base_model

MODELFILE = "Modelfile"
PLAIN = "ollama"  # folder of an adapter whose scaling was changed
# Bases in Ollama's library, by their hub id; tags without a number type move between versions.
LIBRARY = {
    "mistralai/Mistral-7B-v0.1": "mistral:7b-text-q4_0",
    "unsloth/mistral-7b-bnb-4bit": "mistral:7b-text-q4_0",
    "mistralai/Mistral-7B-Instruct-v0.2": "mistral:7b-instruct-v0.2-q4_0",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral:7b-instruct-v0.3-q4_0",
    "meta-llama/Llama-3.2-1B": "llama3.2:1b-text-q4_K_M",
    "meta-llama/Llama-3.2-1B-Instruct": "llama3.2:1b",
    "meta-llama/Llama-3.2-3B-Instruct": "llama3.2:3b",
    "meta-llama/Llama-3.1-8B": "llama3.1:8b-text-q4_K_M",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3.1:8b",
    "Qwen/Qwen2.5-0.5B": "qwen2.5:0.5b-base",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5:0.5b",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2:135m",
}
# Model types whose safetensors adapters Ollama converts (its convert.go, ConvertAdapter).
CONVERTED = ("llama", "mistral", "gemma2")


@dataclass(frozen=True)
class Export:
    """An exported folder: of a complete model, or of an adapter and its base."""

    folder: Path
    lora: SavedLora | None  # None of a complete model
    has_gguf: bool = False
    ollama_base: str | None = None  # as typed


def write_modelfile(run: Trained, export: Export) -> Use:
    """Write the Modelfile, or return why there is none."""
    if (problem := _find_problem(run, export)) is not None:
        return Use("Ollama", None, problem)
    prompt = build_prompt(run.config.data.prompt_template, run.load_tokenizer())
    lines = _render_source(run, export) + _render_prompt(prompt)
    (export.folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Use("Ollama", f"ollama create {run.name} -f {MODELFILE} && ollama run {run.name}")


def find_base(run: Trained, typed: str | None) -> str | None:
    """Return the base for FROM: as typed, its file or folder, or its name in Ollama's library."""
    path = run.model.path
    if typed is not None or path in LIBRARY:
        return typed or LIBRARY[path]
    if path.endswith(".gguf"):
        return str(local_path(path).absolute())
    if run.source.revision is None and run.model.quantization == "none":
        return run.source.location
    return None


def _find_problem(run: Trained, export: Export) -> str | None:
    lora = export.lora
    if lora is None:
        return None
    if (problem := lora.find_problem()) is not None:
        return problem + merge_remedy(run)
    if find_base(run, export.ollama_base) is None:
        return (
            f"its name of {run.model.path} is not known; set it with --ollama-base NAME, such as "
            "mistral:7b-text"
        )
    if export.has_gguf:
        return None
    kind = base_model.load_config(run.model, run.source).model_type
    if kind not in CONVERTED:
        return f"it converts adapters of {', '.join(CONVERTED)} only, not of {kind}; add --gguf"
    # It takes a matrix for a transposed one where the rank is the larger dimension.
    if any(min(shape) < lora.rank for shape in lora.shapes.values()):
        return f"the rank {lora.rank} is larger than a layer; add --gguf"
    return None


def _render_source(run: Trained, export: Export) -> list[str]:
    """Return FROM and ADAPTER; an adapter of rsLoRA is written again, with Ollama's scaling."""
    *_, model_file, _ = gguf_files.MODEL
    *_, adapter_file, _ = gguf_files.ADAPTER
    lora = export.lora
    if lora is None:
        return [f"FROM ./{model_file}" if export.has_gguf else "FROM ."]
    adapter = "."
    if export.has_gguf:
        adapter = f"./{adapter_file}"
    elif not lora.has_plain_scaling:
        write_plain_scaling(export.folder, export.folder / PLAIN)
        adapter = f"./{PLAIN}"
    return [f"FROM {find_base(run, export.ollama_base)}", f"ADAPTER {adapter}"]


def _render_prompt(prompt: OllamaPrompt) -> list[str]:
    lines = [] if prompt.note is None else [f"# {prompt.note}"]
    for key, text in (("TEMPLATE", prompt.template), ("SYSTEM", prompt.system)):
        if text is None:
            continue
        if '"""' in f'""{text}""':
            lines.append(f"# {key} is left out: its quotes would end the text in a Modelfile")
        else:
            lines.append(f'{key} """{text}"""')
    if prompt.stop is not None and not re.search(r'["\r\n]', prompt.stop):
        lines.append(f'PARAMETER stop "{prompt.stop}"')
    return lines
