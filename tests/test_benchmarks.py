"""The training benchmark on a CUDA card, on a model of the shape of Mistral-7B."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.gpu
@pytest.mark.timeout(1800)
def test_the_reference_batch_is_measured_on_cuda() -> None:
    """Tokens a second and peak memory are printed, and the losses are stock's."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    command = [sys.executable, "benchmarks/training.py", "--quick", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "GiB at most" in done.stdout
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found[0]["what"] == "8 x 4 rows, nf4-bf16"
    assert all(comparison["equal"] for comparison in found)
