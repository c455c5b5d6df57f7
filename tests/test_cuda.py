"""On a CUDA card, as a user runs it: killed and gone on with, run again, in fp16."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.tracking.events import read_events
from tests.conftest import TINY, last_of_each

pytestmark = pytest.mark.gpu

SETTINGS = last_of_each(
    (
        *TINY, "evaluation=none", "data.num_examples=64", "training.epochs=3",
        "training.batch_size=2", "training.gradient_accumulation_steps=2", "lora.dropout=0.1",
        "training.checkpoint_every=5", "training.device=cuda", "optimizer.lr=0.003",
    )
)  # fmt: skip


@pytest.fixture(autouse=True)
def a_card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


def command(folder: Path, *overrides: str, module: str = "finetune") -> subprocess.Popen[str]:
    """Start it in a folder of its own."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", module, *last_of_each(overrides)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    told, _ = process.communicate(timeout=500)
    assert process.returncode == 0, told
    return told


def run_in(folder: Path) -> Path:
    (run,) = folder.glob("outputs/*/config.yaml")
    return run.parent


def losses(folder: Path) -> list[float]:
    events = read_events(run_in(folder) / "events.jsonl")
    return [event["value"] for event in events if event.get("key") == "train/loss"]


@pytest.mark.parametrize(
    "model",
    [
        ("model.dtype=fp32",),
        ("model.dtype=bf16", "model.quantization=nf4", "optimizer.name=adamw_8bit"),
        ("model.dtype=fp16", "model.quantization=nf4"),
        ("model.dtype=bf16", "lora.use_dora=true"),
        ("model.dtype=bf16", "training.gradient_checkpointing=true"),
    ],
    ids=" ".join,
)
def test_a_training_killed_on_a_card_ends_with_the_same_adapter(
    tmp_path: Path, model: tuple[str, ...]
) -> None:
    """Bit for bit, wherever the kill fell."""
    settings = (*SETTINGS, *model)
    finished(command(tmp_path / "whole", *settings))
    killed = command(tmp_path / "killed", *settings)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "killed").glob("outputs/*/checkpoints/step-*")):
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    finished(command(tmp_path / "killed", *settings))
    status = json.loads((run_in(tmp_path / "killed") / "status.json").read_text())
    assert status["state"] == "finished"
    one, other = (
        load_file(run_in(tmp_path / name) / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "killed")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_a_rerun_on_a_card_is_the_same(tmp_path: Path) -> None:
    """Of weights and of scores."""
    finished(command(tmp_path, *SETTINGS, "evaluation=demo", "evaluation.limit=12"))
    told = finished(command(tmp_path, str(run_in(tmp_path)), module="finetune.rerun"))
    assert "identical" in told, told


def test_fp16_on_a_card_learns_as_bf16_does(tmp_path: Path) -> None:
    """Over a base in 4-bit; nothing diverges."""
    base = ("model.quantization=nf4", "optimizer.name=adamw_8bit")
    for dtype in ("fp16", "bf16"):
        finished(command(tmp_path / dtype, *SETTINGS, *base, f"model.dtype={dtype}"))
    fp16, bf16 = losses(tmp_path / "fp16"), losses(tmp_path / "bf16")
    assert fp16[-1] < fp16[0]
    assert fp16 == pytest.approx(bf16, abs=0.05)
