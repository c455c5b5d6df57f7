"""What vLLM, Ollama and llama.cpp load of an export; what they do not take is said."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from finetune.config.schema import LoraConfig, PeftConfig
from finetune.inference import gguf_files, modelfile, serving
from finetune.inference.modelfile import Export, find_base, write_modelfile
from finetune.inference.ollama_prompt import OllamaPrompt
from finetune.inference.portable import SavedLora, read_lora
from finetune.inference.trained import Trained, find_trained
from finetune.models import base_model
from finetune.problems import Refused
from tests.conftest import train_tiny
from tests.test_chat import full_copy
from tests.test_export import call

SHAPES = {
    f"base_model.model.model.layers.0.self_attn.q_proj.lora_{matrix}.weight": shape
    for matrix, shape in (("A", (4, 64)), ("B", (64, 4)))
}
PLAIN = SavedLora({"peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_rslora": False}, SHAPES)
# A stand-in for llama.cpp's scripts: writes its arguments and the adapter's settings.
CONVERTER = """\
import json, pathlib, sys
arguments = sys.argv[1:]
source, into = map(pathlib.Path, (arguments[-1], arguments[arguments.index("--outfile") + 1]))
found = {"arguments": arguments}
for name, file in (("adapter", source / "adapter_config.json"), ("model", source / "config.json")):
    if file.is_file():
        found[name] = json.loads(file.read_text())
if "--base" in arguments:
    base = pathlib.Path(arguments[arguments.index("--base") + 1])
    found["base"] = json.loads((base / "config.json").read_text())
into.write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, module_cache: None) -> Path:
    return train_tiny(tmp_path_factory.mktemp("run"), lora=LoraConfig(r=4))


@pytest.fixture(scope="module")
def rslora(tmp_path_factory: pytest.TempPathFactory, module_cache: None) -> Path:
    return train_tiny(tmp_path_factory.mktemp("rslora"), lora=LoraConfig(r=8, use_rslora=True))


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder LLAMA_CPP whose scripts are stand-ins."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    for script, *_ in (gguf_files.ADAPTER, gguf_files.MODEL):
        (folder / script).write_text(CONVERTER)
    monkeypatch.setenv(gguf_files.FOLDER, str(folder))
    monkeypatch.setattr(gguf_files, "find_spec", lambda _: "there")
    return folder


def named(run: Trained, path: str) -> Trained:
    """Return a run whose base came from the hub."""
    source = replace(run.source, location=path, revision="abc")
    return replace(run, model=replace(run.model, path=path), source=source)


def test_an_exported_adapter_has_the_layout_of_vllm(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files, tensors by PEFT's names with both matrices of each layer; nothing is refused."""
    assert call(monkeypatch, run, "--into", tmp_path / "out") == 0
    assert "not for" not in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= settings.keys()
    assert (settings["modules_to_save"], settings["bias"]) == (None, "none")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    layers = [f"self_attn.{n}_proj" for n in "qkvo"] + [
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    ]
    assert set(tensors) == {
        f"base_model.model.model.layers.{layer}.{name}.lora_{matrix}.weight"
        for layer in range(2) for name in layers for matrix in "AB"
    }  # fmt: skip
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {4}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--enable-lora --lora-modules {run.name}={tmp_path / 'out'}" in card


@pytest.mark.parametrize(
    ("changes", "shapes", "said"),
    [
        ({"peft_type": "ADALORA"}, {}, "LoRA adapters only, and this one is ADALORA"),
        ({"peft_type": "IA3"}, {}, "LoRA adapters only, and this one is IA3"),
        ({"use_dora": True}, {}, "lora.use_dora=true is not supported"),
        ({"modules_to_save": ["lm_head"]}, {}, "(modules_to_save) are not supported"),
        ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 9)}, "embed_tokens"),
        ({}, {"base_model.model.model.embed_tokens.weight": (9, 4)}, "other than lora_A and"),
        ({"bias": "all"}, {}, "tensors other than lora_A and lora_B"),
        ({"r": 1024}, {}, "its rank is 1024, and vLLM takes 512 at most"),
    ],
)
def test_what_vllm_refuses_is_said(
    changes: dict[str, Any], shapes: dict[str, tuple[int, ...]], said: str, run: Path
) -> None:
    """With the remedy, and before vLLM raises."""
    lora = SavedLora({**PLAIN.settings, **changes}, {**SHAPES, **shapes})
    use = serving.find_vllm_use(find_trained(run), "out", lora)
    assert use.command is None
    assert said in str(use.problem)
    assert str(use.problem).endswith("export a merged model with --merge")


@pytest.mark.parametrize(("rank", "limit"), [(4, None), (16, None), (17, 32), (64, 64), (300, 320)])
def test_vllm_is_given_the_rank_that_it_needs(rank: int, limit: int | None, run: Path) -> None:
    """Above its default of 16, the smallest of those that it accepts."""
    trained = named(find_trained(run), "owner/base")
    lora = SavedLora({**PLAIN.settings, "r": rank}, SHAPES)
    command = str(serving.find_vllm_use(trained, "me/mine", lora).command)
    assert command.startswith("vllm serve owner/base --revision abc --enable-lora ")
    assert (f"--max-lora-rank {limit} " in command) == (limit is not None)
    assert command.endswith(f"--lora-modules {run.name}=me/mine")
    assert serving.find_vllm_use(trained, "me/mine", None).command == "vllm serve me/mine"


@pytest.mark.parametrize(
    ("path", "typed", "expected"),
    [
        ("mistralai/Mistral-7B-v0.1", None, "mistral:7b-text-q4_0"),
        ("unsloth/mistral-7b-bnb-4bit", None, "mistral:7b-text-q4_0"),
        ("unsloth/mistral-7b-bnb-4bit", "mistral:7b-text-fp16", "mistral:7b-text-fp16"),
        ("owner/unknown", "mine:latest", "mine:latest"),
        ("owner/unknown", None, None),
        ("/models/a.gguf", None, "/models/a.gguf"),
    ],
)
def test_the_base_is_named_as_ollama_names_it(
    path: str, typed: str | None, expected: str | None, run: Path
) -> None:
    """By its library, by the option, or by its file; else nothing is guessed."""
    assert find_base(named(find_trained(run), path), typed) == expected


def test_a_modelfile_has_base_adapter_and_prompt(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local base is its folder; of a merged and a full model the folder itself."""
    assert call(monkeypatch, run, "--into", tmp_path / "adapter") == 0
    lines = (tmp_path / "adapter" / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {find_trained(run).source.location}", "ADAPTER ."]
    assert lines[2] == 'TEMPLATE """{{ if .System }}{{ .System }}'
    assert lines[-1].startswith('SYSTEM """Below is an instruction that describes a task.')
    assert call(monkeypatch, run, "--into", tmp_path / "named", "--ollama-base", "llama2:7b") == 0
    assert (tmp_path / "named" / "Modelfile").read_text().startswith("FROM llama2:7b\nADAPTER .\n")
    full = full_copy(run, tmp_path / "full")
    for path, *merge in ((run, "--merge"), (full,)):
        into = tmp_path / f"whole-{path.name}"
        assert call(monkeypatch, path, *merge, "--into", into) == 0
        assert (into / "Modelfile").read_text().startswith('FROM .\nTEMPLATE """')


def test_an_adapter_of_rslora_gets_the_scaling_of_ollama(
    tmp_path: Path, rslora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ollama divides alpha by r: B is multiplied instead, for the same update."""
    into = tmp_path / "out"
    assert call(monkeypatch, rslora, "--into", into) == 0
    assert "ADAPTER ./ollama\n" in (into / "Modelfile").read_text()
    updates = []
    for folder in (into, into / "ollama"):
        lora = read_lora(folder)
        scaling = lora.settings["lora_alpha"] / (8 if lora.has_plain_scaling else 8**0.5)
        tensors = load_file(folder / "adapter_model.safetensors")
        names = sorted(name for name in tensors if "lora_A" in name)
        updates.append(
            [scaling * tensors[n.replace("lora_A", "lora_B")] @ tensors[n] for n in names]
        )
        assert isinstance(lora.settings["lora_alpha"], int)
    assert updates[0][0].abs().max() > 1e-3
    for one, other in zip(*updates, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-8)
    assert stat.S_IMODE((into / "ollama" / "adapter_model.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("a {{ x }}", "</s>", ['TEMPLATE """a {{ x }}"""', 'PARAMETER stop "</s>"']),
        ('a """\nFROM evil', None, ["# TEMPLATE is left out: its quotes would end the text in"]),
        ('say "', None, ["# TEMPLATE is left out: its quotes would end the text in"]),
        ("a", '"\nFROM evil', ['TEMPLATE """a"""']),
    ],
)
def test_a_prompt_adds_no_line_to_a_modelfile(
    text: str, stop: str | None, expected: list[str]
) -> None:
    """Its run may be a stranger's: what would end the quoted text is left out, and this is said."""
    lines = modelfile._render_prompt(OllamaPrompt(text, stop=stop))
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


@pytest.mark.parametrize(
    ("path", "kind", "lora", "has_gguf", "said"),
    [
        ("owner/unknown", "llama", PLAIN, False, "of owner/unknown is not known; set it with"),
        ("Qwen/Qwen2.5-0.5B", "qwen2", PLAIN, False, "not of qwen2; add --gguf"),
        ("Qwen/Qwen2.5-0.5B", "qwen2", PLAIN, True, None),
        ("mistralai/Mistral-7B-v0.1", "mistral", PLAIN, False, None),
        (
            "mistralai/Mistral-7B-v0.1",
            "mistral",
            SavedLora({**PLAIN.settings, "r": 128}, {"a": (128, 64)}),
            False,
            "other than lora_A",
        ),
        (
            "mistralai/Mistral-7B-v0.1",
            "mistral",
            SavedLora({**PLAIN.settings, "r": 128}, dict.fromkeys(SHAPES, (128, 64))),
            False,
            "the rank 128 is larger than a layer; add --gguf",
        ),
        (
            "mistralai/Mistral-7B-v0.1",
            "mistral",
            SavedLora({**PLAIN.settings, "use_dora": True}, SHAPES),
            False,
            "lora.use_dora=true is not supported; export a merged model with --merge",
        ),
    ],
)
def test_what_ollama_cannot_load_has_no_modelfile(
    path: str, kind: str, lora: SavedLora, has_gguf: bool, said: str | None,
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The reason and the remedy are printed instead."""
    trained = find_trained(run)
    monkeypatch.setattr(base_model, "load_config", lambda *_: AutoConfig.for_model(kind))
    monkeypatch.setattr(Trained, "load_tokenizer", lambda _: None)
    use = write_modelfile(named(trained, path), Export(tmp_path, lora, has_gguf))
    assert (tmp_path / "Modelfile").exists() == (said is None)
    assert (said or "None") in str(use.problem)


def test_what_an_export_is_not_for_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    module_cache: None,
) -> None:  # fmt: skip
    """And stands in the card; the adapter is exported all the same."""
    run = train_tiny(tmp_path / "runs", peft=PeftConfig("ia3"))
    assert call(monkeypatch, run, "--into", tmp_path / "out") == 0
    said = capsys.readouterr().out
    why = "it takes LoRA adapters only, and this one is IA3; export a merged model with --merge"
    assert f"not for vLLM: {why}\nnot for Ollama: {why}\n" in said
    assert f"- not for vLLM: `{why}`" in (tmp_path / "out" / "README.md").read_text()
    assert call(monkeypatch, run, "--into", tmp_path / "gguf", "--gguf") == 2
    assert capsys.readouterr().err.startswith("--gguf: llama.cpp: it takes LoRA adapters only")


def test_gguf_files_are_written_by_the_converters_of_llama_cpp(
    tmp_path: Path, run: Path, rslora: Path, llama_cpp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter with its base's config, in the plain scaling; the merged model; and in use."""
    for path, alpha in ((run, 16), (rslora, 8)):
        into = tmp_path / path.name
        assert call(monkeypatch, path, "--into", into, "--gguf") == 0
        found = json.loads((into / "adapter.gguf").read_text())
        assert found["base"]["architectures"] == ["LlamaForCausalLM"]
        assert found["adapter"]["lora_alpha"] == alpha
        assert not found["adapter"]["use_rslora"]
        assert "ADAPTER ./adapter.gguf\n" in (into / "Modelfile").read_text()
        assert "--lora adapter.gguf" in (into / "README.md").read_text()
        assert not (into / "ollama").exists()
    assert call(monkeypatch, run, "--into", tmp_path / "merged", "--gguf", "--merge") == 0
    found = json.loads((tmp_path / "merged" / "model.gguf").read_text())
    assert found["model"]["architectures"] == ["LlamaForCausalLM"]
    assert found["arguments"][:2] == ["--outtype", "auto"]
    assert (tmp_path / "merged" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")


def test_the_config_of_a_quantised_base_is_converted_without_its_quantisation(
    tmp_path: Path, run: Path, llama_cpp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's converter would look for weights to dequantise."""
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": "bitsandbytes"})
    monkeypatch.setattr(base_model, "load_config", lambda *_: config)
    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder)
    converter = gguf_files.find_converter(os.environ, is_adapter=True)
    gguf_files.write_adapter_gguf(find_trained(run), folder, converter)
    assert "quantization_config" not in json.loads((folder / "adapter.gguf").read_text())["base"]


@pytest.mark.parametrize("name", ["convert_lora_to_gguf.py", "llama-convert-lora-to-gguf"])
def test_a_converter_is_found_on_the_path(name: str, tmp_path: Path) -> None:
    """The script runs by this Python, a command by itself; LLAMA_CPP comes first."""
    (tmp_path / name).write_text(CONVERTER)
    (tmp_path / name).chmod(0o755)
    found = gguf_files.find_converter({"PATH": str(tmp_path)}, is_adapter=True)
    python = [sys.executable] if name.endswith(".py") else []
    assert found == [*python, str(tmp_path / name)]


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (None, "convert_lora_to_gguf.py is neither on the PATH nor in LLAMA_CPP; git clone"),
        ("nowhere", "LLAMA_CPP=nowhere: there is no convert_lora_to_gguf.py in it; set it to"),
    ],
)
def test_a_missing_converter_is_refused_at_once(
    folder: str | None, said: str, tmp_path: Path, run: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line with the remedy, exit code 2, before anything is written."""
    monkeypatch.delenv(gguf_files.FOLDER, raising=False)
    if folder is not None:
        monkeypatch.setenv(gguf_files.FOLDER, folder)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call(monkeypatch, run, "--into", tmp_path / "out", "--gguf") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("has_gguf", "is_adapter", "missing"),
    [
        (False, True, "gguf"),
        (True, True, None),
        (False, False, "gguf sentencepiece"),
        (True, False, "sentencepiece"),
    ],
)
def test_what_a_converter_imports_is_refused_before_a_merge(
    has_gguf: bool, is_adapter: bool, missing: str | None, llama_cpp: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A checkout has a gguf of its own; sentencepiece is imported for every model."""
    monkeypatch.setattr(gguf_files, "find_spec", lambda _: None)
    if has_gguf:
        (llama_cpp / "gguf-py").mkdir()
    if missing is None:
        assert gguf_files.find_converter(os.environ, is_adapter=is_adapter)
        return
    with pytest.raises(Refused, match=f"needs {missing}; pip install {missing}"):
        gguf_files.find_converter(os.environ, is_adapter=is_adapter)


def test_a_converter_that_fails_leaves_nothing(
    tmp_path: Path, run: Path, llama_cpp: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line with the end of what it said, exit code 1."""
    (llama_cpp / gguf_files.ADAPTER[0]).write_text("raise SystemExit('Model X is not supported')")
    assert call(monkeypatch, run, "--into", tmp_path / "out", "--gguf") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "export aborted: llama.cpp's convert_lora_to_gguf.py failed: Model X is not supported"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ollama-base", "a b"], "--ollama-base 'a b' is no name; write it as mistral:7b"),
        (["--ollama-base", "a\nSYSTEM x"], "is no name"),
        (["--ollama-base", "a", "--merge"], "leave out --merge, or --ollama-base"),
    ],
)
def test_a_base_that_is_no_name_is_refused(
    arguments: list[str], said: str, tmp_path: Path, run: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It would become a line of the Modelfile."""
    assert call(monkeypatch, run, "--into", tmp_path / "out", *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_full_run_has_no_base_to_name(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option would have no effect."""
    full = full_copy(run, tmp_path / "full")
    assert call(monkeypatch, full, "--into", tmp_path / "out", "--ollama-base", "a") == 2
    assert "--ollama-base is for an adapter, and this run has none" in capsys.readouterr().err


def test_the_help_says_what_each_export_is_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs by their names."""
    assert call(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("PEFT", "vLLM", "Ollama", "llama.cpp", "transformers"))


@pytest.mark.slow
@pytest.mark.skipif(gguf_files.FOLDER not in os.environ, reason="no checkout of llama.cpp")
def test_the_adapter_of_llama_cpp_is_the_runs(
    tmp_path: Path, rslora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By llama.cpp's own script: its tensors make the same update, in its order of heads."""
    from gguf import GGUFReader

    assert call(monkeypatch, rslora, "--into", tmp_path / "out", "--gguf") == 0
    reader = GGUFReader(tmp_path / "out" / "adapter.gguf")
    made = {t.name: torch.tensor(t.data.copy()) for t in reader.tensors}
    assert float(reader.fields["adapter.lora.alpha"].contents()) == 8
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    scaling = 16 / 8**0.5
    for ours, theirs in (
        ("self_attn.v", "attn_v"),
        ("mlp.down", "ffn_down"),
        ("self_attn.k", "attn_k"),
    ):
        a, b = (
            tensors[f"base_model.model.model.layers.1.{ours}_proj.lora_{m}.weight"] for m in "AB"
        )
        update = scaling * b @ a
        if theirs == "attn_k":  # two heads, whose rotary halves alternate in llama.cpp
            update = update.view(2, 2, 8, 64).transpose(1, 2).reshape(32, 64)
        found = made[f"blk.1.{theirs}.weight.lora_b"] @ made[f"blk.1.{theirs}.weight.lora_a"]
        assert torch.allclose(found, update, rtol=1e-5, atol=1e-7)
