"""The base model: found or named, converted once, verified, on the right dtype."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from finetune.config.schema import Config, DataConfig, EvaluationConfig, LoraConfig, ModelConfig
from finetune.models import adapters, base_model
from finetune.models.base_model import (
    find_model,
    find_tokenizer_problems,
    load_base,
    load_config,
    load_tokenizer,
)
from finetune.models.compatibility import HTTPError
from finetune.models.precision import compute_dtype
from finetune.pipeline import preflight
from finetune.pipeline.preflight import find_row_problems
from finetune.pipeline.session import Session
from tests.conftest import write_rows

TINY = ModelConfig(path="random://tiny")
CPU = torch.device("cpu")


def test_the_tiny_model_is_the_same_every_time() -> None:
    """Random weights are seeded, and its tokenizer gives back what it took."""
    first = load_base(TINY, find_model(TINY), CPU).state_dict()
    again = load_base(TINY, find_model(TINY), CPU).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    tokenizer = load_tokenizer(TINY, find_model(TINY))
    text = "Ünïcode and\nlines ### too"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "manifest"])
def test_a_harmed_cache_folder_is_made_again(harm: str) -> None:
    """A converted model is checked by digest each time it is found."""
    folder = Path(find_model(TINY).location)
    weights = folder / "model.safetensors"
    sound = weights.read_bytes()
    if harm == "flip":
        weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    elif harm == "truncate":
        weights.write_bytes(sound[:100])
    elif harm == "delete":
        weights.unlink()
    else:
        (folder / "manifest.json").write_text("{", encoding="utf-8")
    find_model(TINY)
    assert weights.read_bytes() == sound


def test_a_local_folder_is_known_by_its_content(tmp_path: Path) -> None:
    """The digest follows the weights, not the folder's name."""
    tiny = load_base(TINY, find_model(TINY), CPU)
    digests = []
    for name in ("a", "b"):
        tiny.save_pretrained(tmp_path / name)
        digests.append(find_model(ModelConfig(path=str(tmp_path / name))).digest)
    assert digests[0] == digests[1]
    with torch.no_grad():
        tiny.lm_head.weight[0, 0] += 1
    tiny.save_pretrained(tmp_path / "b")
    assert find_model(ModelConfig(path=str(tmp_path / "b"))).digest != digests[0]


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    """A folder without safetensors is refused."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickled weights are not loaded"):
        find_model(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "model.gguf"])
def test_a_pointer_of_git_lfs_is_no_model(tmp_path: Path, name: str) -> None:
    """A clone without LFS has pointers in place of the files; the command for them is named."""
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / file).write_text("{}", encoding="utf-8")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (tmp_path / name).write_text(pointer, encoding="utf-8")
    path = tmp_path / name if name.endswith(".gguf") else tmp_path
    with pytest.raises(FileNotFoundError, match=rf"model.path=.*{name} is a Git LFS pointer.*pull"):
        find_model(ModelConfig(path=str(path)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "there is no model folder"),
        ("nowhere", "not a hub id"),
        ("package://finetune/none.gguf", "there is no file"),
        ("owner/model", "is not on this machine.*hub cache.*cannot be reached"),
    ],
)
def test_a_missing_model_is_told_with_where_it_was_looked_for(
    path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what was looked for and where."""

    def down(*_: object, **__: object) -> None:
        raise HTTPError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", down)
    with pytest.raises(FileNotFoundError, match=message) as caught:
        find_model(ModelConfig(path=path))
    assert "\n" not in str(caught.value)


def test_dtype_auto_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 on a CPU; on a GPU bf16 where it has it, else fp16."""
    gpu = torch.device("cuda", 0)
    assert compute_dtype(TINY, CPU) == torch.float32
    for has, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **_: has)
        assert compute_dtype(TINY, gpu) == expected


def test_targets_are_checked_one_by_one_against_the_model() -> None:
    """A wrong name beside right ones, and a rank wider than its layer, are found."""
    model = base_model.load_meta_model(TINY, load_config(TINY, find_model(TINY)))
    (unknown,) = adapters.find_target_problems(model, LoraConfig(target_modules=["q_proj", "qprj"]))
    assert "no linear layer 'qprj'; did you mean 'q_proj'?" in unknown
    (wide,) = adapters.find_target_problems(model, LoraConfig(r=33))
    assert "lora.r is 33, but the layer k_proj has only 32 features; set lora.r to at most" in wide
    assert adapters.find_target_problems(model, LoraConfig(target_modules=["all-linear"])) == []


@pytest.mark.slow
def test_the_real_model_is_converted_and_speaks() -> None:
    """The package's GGUF file becomes a model that continues a sentence sensibly."""
    source = find_model(ModelConfig())
    model, tokenizer = load_base(ModelConfig(), source, CPU), load_tokenizer(ModelConfig(), source)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert "Paris" in tokenizer.decode(
        cast(Any, model).generate(ids, max_new_tokens=5, do_sample=False)[0]
    )


@pytest.mark.parametrize(
    ("embeddings", "added", "problem"),
    [
        (None, 0, None),
        (None, 1, "ids up to 259, and the base has embeddings for 259"),
        (300, 2, None),  # rounded up
        (258, 0, "ids up to 258, and the base has embeddings for 258"),
    ],
)
def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(
    tmp_path: Path, embeddings: int | None, added: int, problem: str | None
) -> None:
    """Before anything is loaded: for training, evaluation and the preview alike."""
    folder = tmp_path / "model"
    source = find_model(ModelConfig(path="random://tiny"))
    shutil.copytree(source.location, folder)
    tokenizer = load_tokenizer(ModelConfig(path="random://tiny"), source)
    tokenizer.add_tokens([f"<more{number}>" for number in range(added)])
    tokenizer.save_pretrained(folder)
    if embeddings is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = json.dumps({**config, "vocab_size": embeddings})
        (folder / "config.json").write_text(text, encoding="utf-8")
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Ask.", "output": "Say."}] * 4)
    config = Config(
        model=ModelConfig(path=str(folder)),
        data=DataConfig(path=str(rows)),
        evaluation=EvaluationConfig(tasks=[]),
        output_dir=str(tmp_path),
    )
    for problems in (preflight.prepare(config).problems, find_row_problems(config, Session())):
        assert len(problems) == (problem is not None)
        assert not problem or problem in problems[0]


def test_a_base_with_resized_embeddings_is_taken(tmp_path: Path) -> None:
    """Saving it again writes the number of its embeddings into its config."""
    given = ModelConfig(path="random://tiny")
    source = find_model(given)
    tokenizer = load_tokenizer(given, source)
    tokenizer.add_tokens(["<more>"])
    base = load_base(given, source, torch.device("cpu"))
    assert find_tokenizer_problems("x", tokenizer, base.config)
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(tmp_path)
    saved = ModelConfig(path=str(tmp_path))
    assert find_tokenizer_problems("x", tokenizer, load_config(saved, find_model(saved))) == []
