"""Quantised bases: made so at loading or found so, trained, resumed, evaluated, refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from finetune.config import methods
from finetune.config.schema import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from finetune.files import file_digest
from finetune.models import adapters, quantization
from finetune.models.base_model import (
    cast_parameters,
    find_model,
    load_base,
    load_config,
    load_tokenizer,
)
from finetune.models.precision import compute_dtype, pick_device
from finetune.models.shape import find_shape
from finetune.pipeline import memory_estimate, preflight, run_jobs
from finetune.pipeline.identity import find_inputs
from finetune.pipeline.jobs import Job
from finetune.tracking.run_folder import RunFolder
from finetune.training import grouping
from tests.test_grouping import job

TINY = ModelConfig(path="random://tiny")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TRAINING = TrainingConfig(
    max_length=400, batch_size=1, gradient_accumulation_steps=2, max_steps=4, checkpoint_every=2
)


def quantised(kind: str) -> ModelConfig:
    return replace(TINY, quantization=kind)


def write_checkpoint(folder: Path, settings: BitsAndBytesConfig | str) -> ModelConfig:
    """Write the tiny model as a checkpoint that is quantised already."""
    if isinstance(settings, str):
        base = load_base(quantised(settings), find_model(TINY), CPU)
    else:
        base = AutoModelForCausalLM.from_pretrained(
            find_model(TINY).location, quantization_config=settings
        )
    base.save_pretrained(folder)
    load_tokenizer(TINY, find_model(TINY)).save_pretrained(folder)
    return ModelConfig(path=str(folder))


def write_gptq(folder: Path, **settings: Any) -> ModelConfig:
    """Write a folder whose config says GPTQ; its weights are never looked at."""
    load_base(TINY, find_model(TINY), CPU).save_pretrained(folder)
    load_tokenizer(TINY, find_model(TINY)).save_pretrained(folder)
    path = folder / "config.json"
    own = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, **settings}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": own}))
    return ModelConfig(path=str(folder))


def logits(base: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = base(input_ids=torch.arange(20)[None]).logits
    return answer


def adapter(folder: Path) -> str:
    (file,) = folder.glob("*/adapter/adapter_model.safetensors")
    return file_digest(file)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_quantised_base_trains_resumes_and_is_evaluated(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On the CPU; a run that failed after its steps goes on from step 2 to the same bits."""
    settings: dict[str, Any] = {"model": quantised(kind), "training": TRAINING}
    asked = EvaluationConfig(limit=4, base=False)
    whole = job(tmp_path / "whole", **settings)
    killed = job(tmp_path / "killed", **settings, evaluation=asked)
    assert preflight.prepare(whole.config).problems == []
    assert run_jobs.run([whole]) == ["finished"]
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="finetune"):
        patch.setattr(run_jobs, "_save_trained", lambda *_: 1 / 0)
        assert run_jobs.run([killed]) == ["failed"]
    with caplog.at_level(logging.INFO, logger="finetune"):
        assert run_jobs.run([killed]) == ["finished"]
    assert "resuming at step" in caplog.text
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
    (path,) = tmp_path.glob("killed/*/evaluation/demo_science.json")
    scores = RunFolder(path.parents[1]).read_scores("demo_science")
    assert scores is not None
    assert scores.tuned.num_questions == 4
    (trained,) = tmp_path.glob("whole/*/training.json")
    assert json.loads(trained.read_text())["layout"] == "padding-free"


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_quantised_checkpoint_is_loaded_as_it_is(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Left at its default or set to the same, the setting gives the same base, and a line says so.

    The dtype it computes in is ours, whatever the card was that it was made on.
    """
    if kind == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model = write_checkpoint(tmp_path, settings)
    source = find_model(model)
    found = quantization.as_loaded(model, load_config(model, source))
    assert (found.quantization, found.double_quant) == (kind, kind != "int8")
    expected = logits(load_base(quantised(kind), find_model(TINY), CPU))
    with caplog.at_level(logging.INFO, logger="finetune"):
        for setting in ("none", kind):
            base = load_base(replace(model, quantization=setting), source, CPU)
            assert torch.equal(logits(base), expected)
    assert caplog.text.count(f"is quantised as {kind} already") == 2
    assert {layer.compute_dtype for layer in quantization.linears_4bit(base)} <= {torch.float32}
    assert quantization.is_castable(base) == (kind != "int8")


@pytest.mark.parametrize("init", ["pissa", "orthogonal", "olora"])
def test_an_initialisation_that_wants_floats_is_refused(tmp_path: Path, init: str) -> None:
    """PEFT would raise after the base was scored, at every try; OLoRA it dequantises for."""
    alone = job(tmp_path, model=quantised("nf4"), lora=LoraConfig(r=4, init=init))
    problems = preflight.prepare(alone.config).problems
    assert [f"lora.init is {init}, which needs weights in floats" in p for p in problems] == (
        [] if init == "olora" else [True]
    )


def test_weights_packed_as_floats_are_not_cast(tmp_path: Path) -> None:
    """Some 4-bit checkpoints store two weights in half a bf16; a cast would destroy them."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
    )
    model = write_checkpoint(tmp_path, settings)
    base = load_base(model, find_model(model), CPU)
    expected = logits(base)
    with cast_parameters(base, torch.float32):
        assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "checkpoint"])
def test_4bit_training_gradients_survive_an_evaluation(tmp_path: Path, kind: str) -> None:
    """Bitsandbytes repacks weights at an eval-mode forward on some CPUs; here it must not."""
    chosen = write_checkpoint(tmp_path, "nf4") if kind == "checkpoint" else quantised(kind)
    base = load_base(chosen, find_model(chosen), CPU)
    layers = quantization.linears_4bit(base)
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    model = adapters.attach(base, methods.lora_settings(LoraConfig(r=4)), seed=0)
    ids = torch.arange(20)[None]

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(grads)

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    assert torch.equal(before, gradient())
    assert before.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lora_is_trained_on_a_quantised_checkpoint(tmp_path: Path, kind: str) -> None:
    """Through checks and training; recorded, and to the bit the run on a base quantised here."""
    rest: dict[str, Any] = {"training": replace(TRAINING, max_steps=2)}
    model = write_checkpoint(tmp_path / "model", kind)
    found = job(tmp_path / "found", model=model, **rest)
    made = job(tmp_path / "made", model=quantised(kind), **rest)
    plan = preflight.prepare(found.config)
    assert plan.problems == []
    assert plan.limit.most == (8 if kind == "nf4" else 1)
    assert run_jobs.run([found]) == run_jobs.run([made]) == ["finished"]
    assert adapter(tmp_path / "found") == adapter(tmp_path / "made")
    (environment,) = tmp_path.glob("found/*/environment.json")
    assert json.loads(environment.read_text())["base"] == kind


def test_a_quantised_checkpoint_is_counted_as_what_it_is(tmp_path: Path) -> None:
    """Its weights take what they take in the file; its run's identity has the package's version."""
    place = memory_estimate.DeviceMemory("cpu", 4, 64 * memory_estimate.GIB)

    def weights(model: ModelConfig, **changes: Any) -> float:
        config = Config(model=replace(model, **changes))
        shape = find_shape(config.model)
        own = load_config(config.model, find_model(config.model))
        loaded = replace(config, model=quantization.as_loaded(config.model, own))
        return memory_estimate.estimate(loaded, shape, place).weights

    nf4 = write_checkpoint(tmp_path / "nf4", "nf4")
    assert weights(nf4) == weights(TINY, quantization="nf4") < weights(TINY)
    four, eight = (write_gptq(tmp_path / str(bits), bits=bits) for bits in (4, 8))
    assert weights(TINY, quantization="int8") < weights(eight) < weights(TINY)
    assert weights(four) == pytest.approx(weights(nf4), rel=0.05)


def prepared(folder: Path, **changes: Any) -> list[str]:
    return preflight.prepare(job(folder, **changes).config).problems


@pytest.mark.parametrize(
    ("kind", "setting", "said"),
    [
        ("nf4", "int8", "is quantised as nf4 already; set model.quantization=none"),
        ("nf4", "gptq", "is quantised as nf4 already"),
        ("gptq", "nf4", "is quantised as gptq already"),
        (
            "plain",
            "gptq",
            "is not a GPTQ checkpoint, and a base is not quantised so while it loads; use",
        ),
        ("gptq", "gptq", "which needs gptqmodel and optimum; pip install gptqmodel optimum"),
        ("gptq", "none", "which needs gptqmodel and optimum; pip install gptqmodel optimum"),
        ("awq", "none", "is quantised as awq, which is not among none, nf4, fp4, int8, gptq"),
    ],
)
def test_what_a_checkpoint_is_not_is_refused(
    tmp_path: Path, kind: str, setting: str, said: str
) -> None:
    """One line with the remedy, before a weight is loaded."""
    folder = tmp_path / "model"
    if kind == "nf4":
        model = write_checkpoint(folder, "nf4")
    else:
        model = write_gptq(folder, quant_method=kind) if kind != "plain" else TINY
    (problem,) = prepared(tmp_path, model=replace(model, quantization=setting))
    assert said in problem
    assert "\n" not in problem


def test_a_gptq_base_is_scored_in_its_own_dtype(tmp_path: Path) -> None:
    """Its layers cannot be cast, which is said before the start."""
    model = write_gptq(tmp_path / "model")
    problems = prepared(tmp_path, model=model, evaluation=EvaluationConfig(dtype="bf16"))
    assert any("set evaluation.dtype=auto" in problem for problem in problems)


def test_a_gptq_checkpoint_is_known_and_asks_for_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its packages there it still needs a CUDA device; its run is trained alone.

    The loading itself is not tried here: neither the packages nor a card are at hand.
    """
    model = write_gptq(tmp_path / "model", bits=4, group_size=32)
    config = load_config(model, find_model(model))
    assert quantization.find_quantization(model, config) == "gptq"
    assert quantization.gptq_bytes(config) == 0.5 + 2.5 / 32
    monkeypatch.setattr(quantization, "find_spec", lambda _: "there")
    (problem,) = quantization.find_problems(model, config, CPU)
    assert "needs a CUDA device" in problem
    assert quantization.find_problems(model, config, GPU) == []
    assert quantization.build_settings(model, config, torch.float16) is None
    quantization.fit_checkpoint(config, torch.float16)
    assert config.quantization_config["backend"] == "auto_trainable"
    alone = Config(model=quantization.as_loaded(model, config), data=DataConfig(path="rows"))
    assert "model.quantization is gptq, whose kernels" in str(grouping.find_obstacle(alone))


@pytest.mark.parametrize(
    ("card", "capability", "expected"),
    [
        ("P100", (6, 0), torch.float16),
        ("T4", (7, 5), torch.float16),
        ("RTX 4060 Ti", (8, 9), torch.bfloat16),
        ("H100", (9, 0), torch.bfloat16),
    ],
)
def test_a_card_computes_in_what_it_has_itself(
    card: str, capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 from Ampere on; older cards only emulate it, and get fp16, also in 4-bit layers."""

    class Properties:
        name = card
        major, minor = capability

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert pick_device("auto") == GPU
    assert compute_dtype(TINY, GPU) == expected
    assert compute_dtype(TINY, CPU) == torch.float32
    config = load_config(TINY, find_model(TINY))
    dtype = compute_dtype(TINY, GPU)
    settings = quantization.build_settings(quantised("nf4"), config, dtype)
    assert settings is not None
    assert settings.bnb_4bit_compute_dtype == expected


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_quantised_base_trains_and_is_evaluated_on_cuda(
    tmp_path: Path, kind: str, optimizer: str
) -> None:
    """With the 8-bit optimizers, in the card's own dtype; the loss falls."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    training = replace(TRAINING, max_steps=12, device="cuda")
    on_cuda: Job = job(
        tmp_path,
        model=quantised(kind),
        training=training,
        optimizer=OptimizerConfig(name=optimizer, lr=1e-2),
        evaluation=EvaluationConfig(limit=4),
    )
    assert preflight.prepare(on_cuda.config).problems == []
    assert run_jobs.run([on_cuda]) == ["finished"]
    losses = losses_of(tmp_path)
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert find_inputs(on_cuda.config).device == str(GPU)


def losses_of(folder: Path) -> list[float]:
    (log,) = folder.glob("*/events.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return [event["value"] for event in events if event.get("key") == "train/loss"]
