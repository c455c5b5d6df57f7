"""The reference experiment on its own checkpoint, which bitsandbytes has quantised already."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors import safe_open

from benchmarks.mistral_shaped import write_mistral_shaped
from finetune.config.overrides import compose_job
from finetune.config.schema import Config, ModelConfig
from finetune.inference.merging import write_merged
from finetune.inference.trained import find_trained
from finetune.models import quantization, shape
from finetune.models.base_model import find_model, load_base, load_tokenizer
from finetune.pipeline import preflight, run_jobs
from finetune.pipeline.jobs import Job
from tests.test_quantization import losses_of

CHECKPOINT = "model=mistral_7b_unsloth_4bit"
# Tensors of one linear layer in nf4 with double quantisation, below its name.
QUANTISED = {
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
    "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
}  # fmt: skip
SETTINGS = {  # of the checkpoint, as transformers 4 wrote them
    "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0,
    "load_in_4bit": True, "load_in_8bit": False, "quant_method": "bitsandbytes",
}  # fmt: skip


def write_checkpoint(folder: Path) -> Path:
    """Write a small Mistral in the layout of unsloth/mistral-7b-bnb-4bit."""
    tiny = ModelConfig(path="random://tiny")
    tokenizer = load_tokenizer(tiny, find_model(tiny))
    tokenizer.padding_side, tokenizer.model_max_length = "left", 32768
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    write_mistral_shaped(folder, tokenizer, torch.device("cpu"), **sizes, **heads)
    file = folder / "config.json"
    newer = ("dtype", "rope_parameters", "layer_types")
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in newer}
    earlier = {"torch_dtype": "bfloat16", "rope_theta": 10000.0, "sliding_window": 4096}
    file.write_text(json.dumps({**config, **earlier, "quantization_config": SETTINGS}))
    return folder


def compose(folder: Path, model: Path, *overrides: str) -> Config:
    return compose_job(
        [
            "experiment=mistral_alpaca_arc", CHECKPOINT, f"model.path={model}", "data=demo",
            "data.num_examples=8", "training.max_steps=2", "training.max_length=400",
            "training.device=cpu", "evaluation=none", f"output_dir={folder}", *overrides,
        ]
    )  # fmt: skip


def test_the_reference_trains_on_its_own_checkpoint(tmp_path: Path) -> None:
    """With the prompts masked and learned too, and merged; its layers stay as they are."""
    model = write_checkpoint(tmp_path / "model")
    with safe_open(model / "model.safetensors", "pt") as file:
        names = file.keys()
        assert {name.partition("_proj.")[2] for name in names if "_proj." in name} == QUANTISED
    losses = []
    for masked in ("true", "false"):
        config = compose(tmp_path / masked, model, f"data.mask_prompt={masked}")
        assert preflight.prepare(config).problems == []
        yaml = OmegaConf.to_yaml(OmegaConf.structured(config))
        assert run_jobs.run([Job(config, yaml, [], {})]) == ["finished"]
        losses.append(losses_of(tmp_path / masked))
        (environment,) = (tmp_path / masked).glob("*/environment.json")
        assert json.loads(environment.read_text())["base"] == "nf4"
    assert losses[0] != losses[1]
    (run,) = (tmp_path / "false").iterdir()
    check = write_merged(find_trained(run), tmp_path / "merged")
    assert check.largest < 1e-5  # 7e-5 where the checkpoint's bf16 rounds what is dequantised
    base = load_base(config.model, find_model(config.model), torch.device("cpu"))
    layers = quantization.linears_4bit(base)
    assert len(layers) == 14
    assert {(o.weight.quant_type, o.compute_dtype, o.weight.quant_state.dtype) for o in layers} == {
        ("nf4", torch.float32, torch.float32)
    }


def test_the_option_has_the_shape_and_the_quantisation_of_its_checkpoint(tmp_path: Path) -> None:
    """So finetune.memory knows both without the hub; a config of the checkpoint agrees."""
    option = compose_job([CHECKPOINT]).model
    written = ModelConfig(path=str(write_checkpoint(tmp_path)))
    found = [quantization.as_loaded(one, shape.load_config(one)) for one in (option, written)]
    assert [(one.quantization, one.double_quant) for one in found] == [("nf4", True)] * 2
    counted = shape.find_shape(option)
    assert counted.num_linear + counted.num_other == 7_241_732_096
