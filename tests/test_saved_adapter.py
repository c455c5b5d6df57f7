"""Adapters from outside: scored as PEFT loads them, taken off without a trace, or refused early."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from finetune.config.schema import ModelConfig
from finetune.evaluation.loglikelihood import SharedContextLM
from finetune.models import adapters, saved_adapter
from finetune.models.base_model import (
    find_model,
    load_base,
    load_config,
    load_meta_model,
    load_tokenizer,
)

CPU = torch.device("cpu")
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}


def lora(**changes: Any) -> peft.PeftConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **changes})


SETTINGS: dict[str, peft.PeftConfig] = {
    "lora on the head": lora(target_modules=["q_proj", "lm_head"]),
    "lora on the embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "saved head": lora(modules_to_save=["lm_head"]),
    "saved head and embedding": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "saved tied": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "some layers": lora(
        layers_to_transform=[1], rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 7}
    ),
    "some tokens": lora(trainable_token_indices=[3, 5]),
    "dora": lora(use_dora=True),
    "lora with bias": lora(lora_bias=True),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"], init_weights=False),
    "p-tuning": peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tied(module_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Llama whose head is its embedding, with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("tied")
    tiny = ModelConfig(path="random://tiny")
    load_tokenizer(tiny, find_model(tiny)).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=270, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            tie_word_embeddings=True, attention_bias=True,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_adapter(base: Path, settings: peft.PeftConfig, folder: Path) -> Path:
    """Save an adapter of random values, as a script with PEFT alone would."""
    torch.manual_seed(1)
    adapted: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05
    adapted.save_pretrained(folder)
    return folder


def log_likelihood(model: Any, tokens: list[int], rest: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens + rest])).logits[0]
    logits = logits[-len(tokens + rest) :].log_softmax(-1)[len(tokens) - 1 : -1]
    return float(logits[range(len(rest)), rest].sum())


@pytest.mark.parametrize("case", SETTINGS)
def test_it_is_scored_as_peft_loads_it(case: str, tied: Path, tmp_path: Path) -> None:
    """Tied head or not: PEFT's log-likelihoods, and afterwards the base is what it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's on tied weights and saved embeddings
        folder = save_adapter(tied, SETTINGS[case], tmp_path / "adapter")
        model = ModelConfig(path=str(tied))
        source = find_model(model)
        meta = load_meta_model(model, load_config(model, source))
        assert saved_adapter.find_problems(meta, folder) == []
        tokenizer, base = load_tokenizer(model, source), load_base(model, source, CPU)
        requests = [(f"Question {i}", " yes" * (i + 1)) for i in range(3)]
        tokens = [[tokenizer(text)["input_ids"] for text in request] for request in requests]
        bare = [log_likelihood(base, *pair) for pair in tokens]
        stock = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tied), str(folder)
        ).eval()
        adapted = adapters.load(base, folder)
        asked = [Instance("loglikelihood", {}, request, i) for i, request in enumerate(requests)]
        ours = [answer for answer, _ in SharedContextLM(adapted, tokenizer).loglikelihood(asked)]
    expected = [log_likelihood(stock, *pair) for pair in tokens]
    assert ours == pytest.approx(expected, abs=1e-3)
    assert ours != pytest.approx(bare, abs=1e-3)
    adapters.take_off(adapted)
    assert [log_likelihood(base, *pair) for pair in tokens] == bare
    head: Any = base.get_output_embeddings()
    assert head.weight is base.get_input_embeddings().weight


def test_trained_biases_cost_the_base_its_place_in_memory(tied: Path, tmp_path: Path) -> None:
    """They stand in the base's own layers, so that the next run loads it again."""
    model = ModelConfig(path=str(tied))
    base = load_base(model, find_model(model), CPU)
    for settings, changes in ((lora(bias="all"), True), (lora(), False)):
        folder = save_adapter(tied, settings, tmp_path / str(changes))
        adapted = adapters.load(base, folder)
        assert adapters.changes_base(adapted) is changes
        adapters.take_off(adapted)


def test_a_pointer_of_git_lfs_is_no_adapter(tied: Path, tmp_path: Path) -> None:
    """A clone without LFS has one in place of the weights; the command for them is named."""
    folder = save_adapter(tied, lora(), tmp_path / "adapter")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (folder / "adapter_model.safetensors").write_text(pointer, encoding="utf-8")
    with pytest.raises(ValueError, match=r"model.adapter=.*adapter_model.* Git LFS pointer.*pull"):
        adapters.saved_digest(folder)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("another width", "does not fit the model: its base_model.model"),
        ("other layers", "does not fit the model: Target modules"),
        ("tensors gone", "is incomplete: 2 of 4 tensors that its settings ask for are missing"),
        ("layers gone", "does not fit the model: 2 of its tensors belong to no layer of it"),
        ("no config", "adapter_config.json cannot be read"),
        ("cannot be removed", "type ADAPTION_PROMPT, which PEFT cannot remove from"),
    ],
)
def test_one_that_does_not_fit_is_refused_before_weights_are_loaded(
    harm: str, said: str, tied: Path, tmp_path: Path
) -> None:
    """The model's shapes are enough to see it."""
    settings: peft.PeftConfig = lora()
    if harm == "cannot be removed":
        settings = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    folder = save_adapter(tied, settings, tmp_path / "adapter")
    config = folder / "adapter_config.json"
    if harm == "no config":
        config.write_text("[]", encoding="utf-8")
    if harm == "other layers":
        text = config.read_text(encoding="utf-8").replace("q_proj", "c_attn")
        config.write_text(text, encoding="utf-8")
    model = ModelConfig(path=str(tied))
    shape = load_config(model, find_model(model))
    if harm == "tensors gone":
        weights = folder / "adapter_model.safetensors"
        saved = load_file(weights)
        save_file({n: t for n, t in saved.items() if ".layers.0." in n}, weights)
    if harm == "layers gone":
        shape.num_hidden_layers = 1
    if harm == "another width":
        shape.hidden_size, shape.num_attention_heads = 32, 2
    (problem,) = saved_adapter.find_problems(load_meta_model(model, shape), folder)
    assert problem.startswith(f"model.adapter={folder}")
    assert said in problem
    assert "\n" not in problem
