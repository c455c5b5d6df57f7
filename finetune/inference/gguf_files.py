"""GGUF files of exported models, written by llama.cpp's own converters where they are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from finetune.inference.portable import read_lora, write_plain_scaling
from finetune.inference.trained import Trained
from finetune.models import base_model
from finetune.problems import Refused

FOLDER = "LLAMA_CPP"  # environment variable: a checkout of llama.cpp
# What is converted -> script, command that llama.cpp's Python package installs, file, number type.
ADAPTER = ("convert_lora_to_gguf.py", "llama-convert-lora-to-gguf", "adapter.gguf", "f32")
MODEL = ("convert_hf_to_gguf.py", "llama-convert-hf-to-gguf", "model.gguf", "auto")


class NotConverted(Exception):
    """llama.cpp's converter failed; the message has its last line."""


def find_converter(environment: Mapping[str, str], *, is_adapter: bool) -> list[str]:
    """Return the command of llama.cpp's converter: from the folder LLAMA_CPP, or on the PATH.

    Raises:
        Refused: it is not there, or a package that it imports.
    """
    script, command, *_ = ADAPTER if is_adapter else MODEL
    if folder := environment.get(FOLDER):
        found = Path(folder).expanduser() / script
        if not found.is_file():
            raise Refused(
                [f"{FOLDER}={folder}: there is no {script} in it; set it to a llama.cpp checkout"]
            )
        return _by_this_python(found, is_adapter=is_adapter)
    path = environment.get("PATH")
    if on_path := shutil.which(script, path=path):
        return _by_this_python(Path(on_path), is_adapter=is_adapter)
    if on_path := shutil.which(command, path=path):
        return [on_path]
    raise Refused(
        [
            f"--gguf: llama.cpp's {script} is neither on the PATH nor in {FOLDER}; "
            f"git clone https://github.com/ggml-org/llama.cpp and set {FOLDER} to that folder"
        ]
    )


def _by_this_python(script: Path, *, is_adapter: bool) -> list[str]:
    """Return the command of a script.

    Raises:
        Refused: a package that it imports is missing; a checkout has its own gguf.
    """
    needed = [] if (script.resolve().parent / "gguf-py").is_dir() else ["gguf"]
    needed += [] if is_adapter else ["sentencepiece"]  # imported for every tokenizer
    if missing := [name for name in needed if find_spec(name) is None]:
        names = " ".join(missing)
        raise Refused([f"--gguf: llama.cpp's {script.name} needs {names}; pip install {names}"])
    return [sys.executable, str(script)]


def write_adapter_gguf(run: Trained, folder: Path, converter: Sequence[str]) -> None:
    """Write an exported adapter as `adapter.gguf` beside it.

    Raises:
        NotConverted: the converter fails.
    """
    with TemporaryDirectory() as temporary:
        base, source = Path(temporary) / "base", folder
        config = base_model.load_config(run.model, run.source)
        if hasattr(config, "quantization_config"):  # which concerns the base's weights alone
            del config.quantization_config
        config.save_pretrained(base)
        if not read_lora(folder).has_plain_scaling:
            source = Path(temporary) / "adapter"
            write_plain_scaling(folder, source)
        *_, name, numbers = ADAPTER
        _convert(converter, ["--base", str(base), "--outtype", numbers], source, folder / name)


def write_model_gguf(folder: Path, converter: Sequence[str]) -> None:
    """Write an exported model as `model.gguf` beside it.

    Raises:
        NotConverted: the converter fails.
    """
    *_, name, numbers = MODEL
    _convert(converter, ["--outtype", numbers], folder, folder / name)


def _convert(converter: Sequence[str], options: Sequence[str], source: Path, into: Path) -> None:
    command = [*converter, *options, "--outfile", str(into), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not into.is_file():
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        why = said[-1] if said else f"exit code {done.returncode}"
        raise NotConverted(f"llama.cpp's {Path(converter[-1]).name} failed: {why}")
