"""The benchmarks: what they compute, and on a CUDA card, on a model of the shape of Mistral-7B."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.mistral_shaped import write_mistral_shaped
from benchmarks.workers import Run, find_loss
from finetune.config.schema import ModelConfig
from finetune.models.base_model import find_model, load_base, load_tokenizer
from finetune.models.quantization import find_quantization
from finetune.models.shape import load_config

ROOT = Path(__file__).parents[1]


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("script", "first"),
    [
        ("training.py", "8 x 4 rows, nf4-bf16"),
        ("sweep.py", "a sweep of 2 runs with evaluation"),
    ],
)
def test_a_benchmark_runs_on_cuda(script: str, first: str) -> None:
    """Tokens a second and peak memory are printed; of training, the losses are the same."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    command = [sys.executable, f"benchmarks/{script}", "--quick", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert "GiB at most" in done.stdout
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found[0]["what"] == first
    if script == "training.py":  # a few questions to random weights turn at a breath
        assert all(comparison["equal"] for comparison in found)


def test_what_a_worker_loses_is_the_time_between_its_trainings() -> None:
    """And from the last one to its run's end; the start is counted separately."""
    first = Run("CPU 0", started=10.0, trained=19.0, ended=19.5, training=8.0)
    second = Run("CPU 0", started=20.0, trained=29.0, ended=29.25, training=8.0)
    assert find_loss([first, second]) == pytest.approx(1.25)
    assert find_loss([second]) == pytest.approx(0.25)


def test_the_model_for_cuda_has_the_shape_it_is_given(tmp_path: Path) -> None:
    """It is written in 4-bit and loads; here with sizes that a CPU takes."""
    tiny = ModelConfig(path="random://tiny")
    tokenizer = load_tokenizer(tiny, find_model(tiny))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    write_mistral_shaped(tmp_path, tokenizer, torch.device("cpu"), **sizes, **heads)
    shaped = ModelConfig(path=str(tmp_path))
    model = load_base(shaped, find_model(shaped), torch.device("cpu"))
    assert (model.config.vocab_size, model.config.hidden_size) == (len(tokenizer), 64)
    assert find_quantization(shaped, load_config(shaped)) == "nf4"
    assert torch.get_default_dtype() == torch.float32
