"""GPUs, pretended: one is seen by a process, and kernels for it are looked for before the start."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import Config, ModelConfig
from finetune.models import base_model, devices, kernels, quantization
from finetune.models.devices import Gpu, find_kernel_problems, has_kernels, read_gpus, see_one_gpu
from finetune.pipeline import preflight
from finetune.pipeline.session import Session
from finetune.sweeps import worker_process
from finetune.sweeps.seats import Seat

CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((6, 0), CUDA_12_6, True),
        ((6, 1), CUDA_12_6, True),  # a GTX 1080 runs a P100's code
        ((6, 0), ["sm_61"], False),
        ((6, 0), CUDA_13, False),
        ((7, 0), CUDA_13, False),
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # an RTX 4090 runs sm_86
        ((9, 0), CUDA_13, True),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),  # code of one architecture only
        ((10, 3), ["sm_100f"], True),
        ((12, 0), CUDA_12_6, False),
        ((12, 0), [*CUDA_12_6, "compute_90"], True),  # compiled by the driver
        ((12, 1), CUDA_13, True),
        ((11, 0), ["compute_120"], False),
        ((3, 7), CUDA_12_6, False),
        ((9, 0), ["gfx90a"], True),
        ((9, 0), [], False),
    ],
)
def test_kernels_are_found_as_cuda_finds_them(
    capability: tuple[int, int], architectures: list[str], expected: bool
) -> None:
    """Machine code of the same major and no later minor version, or older PTX."""
    assert has_kernels(capability, architectures) is expected


@pytest.mark.parametrize(
    ("name", "capability", "architectures", "remedy"),
    [
        ("Tesla P100-PCIE-16GB", (6, 0), CUDA_13, "for CUDA 12.6 have them, up to torch 2.14"),
        ("Tesla V100", (7, 0), CUDA_13, "for CUDA 12.6 have them, up to torch 2.14"),
        ("Tesla K80", (3, 7), CUDA_12_6, "no build of a supported torch"),
        ("RTX 5090", (12, 0), CUDA_12_6, "a newer build of torch"),
    ],
)  # fmt: skip
def test_a_card_without_kernels_is_refused_with_the_builds_that_have_them(
    name: str, capability: tuple[int, int], architectures: list[str], remedy: str
) -> None:
    """One line: the card, its capability, what the installed torch has, what to install."""
    (problem,) = find_kernel_problems(name, capability, architectures)
    assert problem.startswith("training.device: the installed torch has no kernels for " + name)
    assert f"compute capability {capability[0]}.{capability[1]}" in problem
    assert remedy in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("environment", "gpus", "cuda", "said"),
    [
        ({}, [], "13.0", "this machine has no CUDA device; use one that has"),
        ({devices.VISIBLE: ""}, ["Tesla T4"], "13.0", "CUDA_VISIBLE_DEVICES= hides Tesla T4"),
        ({devices.VISIBLE: "-1"}, ["Tesla T4"], "13.0", "=-1 hides Tesla T4; unset it"),
        ({}, ["Tesla T4"], None, "built without CUDA, so that it cannot use Tesla T4"),
        ({devices.VISIBLE: "0"}, ["Tesla T4"], "13.0", "install a driver from 580 on, or torch's"),
        ({}, ["Tesla P100"], "12.6", "install a driver from 525 on, or torch's"),
        ({}, ["Future"], "14.1", "install a driver from 580 on, or torch's"),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_does_not_see_has_its_reason(
    environment: dict[str, str],
    gpus: list[str],
    cuda: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None there, hidden, a build for CPUs, or a driver that is too old; in the refusal too."""
    found = [Gpu(name, "GPU-1") for name in gpus]
    assert said in devices.describe_missing(environment, found, cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "list_gpus", lambda: found)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(os, "environ", {**os.environ, devices.VISIBLE: "0", **environment})
    config = Config(model=ModelConfig(path="random://tiny"))
    config.training.device = "cuda"
    (problem,) = preflight._find_device_problems(config, Session())
    assert problem.startswith("training.device is cuda, and ")
    assert said in problem


@pytest.mark.parametrize(
    ("device", "visible", "gpus", "warnings"),
    [
        ("auto", "0", ["Tesla T4"], 1),
        ("auto", "", ["Tesla T4"], 0),  # hidden on purpose
        ("auto", "0", [], 0),
        ("cpu", "0", ["Tesla T4"], 0),
    ],
)
def test_a_gpu_that_auto_leaves_unused_is_said_once(
    device: str,
    visible: str,
    gpus: list[str],
    warnings: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However many jobs are checked: hours on a CPU would be a surprise."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "list_gpus", lambda: [Gpu(name, "GPU-1") for name in gpus])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv(devices.VISIBLE, visible)
    config, session = Config(model=ModelConfig(path="random://tiny")), Session()
    config.training.device = device
    with caplog.at_level("WARNING", logger="finetune"):
        assert [preflight._find_device_problems(config, session) for _ in range(3)] == [[]] * 3
    said = "training.device=auto trains on the CPU: the installed torch is built for CUDA 13.0"
    assert caplog.text.count(said) == warnings


def test_the_advice_stands_in_one_place() -> None:
    """Refusals and the README name the page, which has their command and their drivers."""
    root = Path(__file__).parents[1]
    page = (root / devices.GUIDE).read_text(encoding="utf-8")
    assert devices.INSTALL_CUDA_12_6 in page
    assert all(f"| {driver} |" in page for driver in devices.DRIVERS.values())
    assert devices.GUIDE in (root / "README.md").read_text(encoding="utf-8")
    (problem,) = find_kernel_problems("Tesla P100", (6, 0), CUDA_13)
    assert devices.INSTALL_CUDA_12_6 in problem
    assert devices.GUIDE in problem


def test_a_card_with_kernels_and_a_build_without_a_list_pass() -> None:
    """Torch for the CPU lists none."""
    assert find_kernel_problems("H100", (9, 0), CUDA_13) == []
    assert find_kernel_problems("H100", (9, 0), []) == []


@pytest.fixture
def p100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a P100 under torch's build for CUDA 13."""
    pretended: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "Tesla P100",
        "get_device_capability": lambda *_: (6, 0),
        "get_arch_list": lambda: CUDA_13,
        "is_bf16_supported": lambda **_: False,
    }
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_the_check_of_a_job_asks_torch(device: str, p100: None) -> None:
    """Before a weight is loaded; on the CPU nothing is asked."""
    config = Config(model=ModelConfig(path="random://tiny"))
    config.training.device = device
    (problem,) = preflight._find_device_problems(config, Session())
    assert "no kernels for Tesla P100" in problem
    config.training.device = "cpu"
    assert preflight._find_device_problems(config, Session()) == []


def test_liger_and_int8_want_newer_cards(p100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton from 7.0 on, LLM.int8 from 7.5 on."""
    monkeypatch.setattr(kernels, "find_spec", lambda _: True)
    tiny = ModelConfig(path="random://tiny")
    config = base_model.load_config(tiny, base_model.find_model(tiny))
    meta = base_model.load_meta_model(tiny, config)
    (problem,) = kernels.find_liger_problems(meta, GPU)
    assert "needs compute capability 7.0 (Triton), and the GPU has 6.0" in problem
    tiny.quantization = "int8"
    (problem,) = quantization.find_problems(tiny, config, GPU)
    assert problem.startswith("model.quantization is int8, which needs compute capability 7.5")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert quantization.find_problems(tiny, config, GPU) == []
    for name in ("nf4", "fp4", "none"):
        tiny.quantization = name
        assert quantization.find_problems(tiny, config, GPU) == []


LISTING = """\
GPU 0: Tesla T4 (UUID: GPU-aaaa-1)
GPU 1: Tesla T4 (UUID: GPU-bbbb-2)
"""
DIVIDED = """\
GPU 0: NVIDIA A100 (UUID: GPU-cccc)
  MIG 1g.5gb      Device  0: (UUID: MIG-dddd)
  MIG 1g.5gb      Device  1: (UUID: MIG-eeee)
"""


def test_gpus_are_read_from_nvidia_smi() -> None:
    """Names and UUIDs; of a divided GPU its first instance."""
    assert read_gpus(LISTING) == [Gpu("Tesla T4", "GPU-aaaa-1"), Gpu("Tesla T4", "GPU-bbbb-2")]
    assert read_gpus(DIVIDED) == [Gpu("NVIDIA A100", "MIG-dddd")]
    assert read_gpus("NVIDIA-SMI has failed\n") == []


@pytest.mark.parametrize(
    ("before", "listing", "expected"),
    [
        (None, LISTING, "GPU-aaaa-1"),
        (None, DIVIDED, "MIG-dddd"),
        (None, "", "0"),
        (None, LISTING.replace("1: Tesla T4", "1: Tesla P100"), "0"),  # CUDA's first is the fastest
        ("1", LISTING, "1"),
        ("1,0", LISTING, "1"),
        ("GPU-bbbb-2, GPU-aaaa-1", LISTING, "GPU-bbbb-2"),
        ("", LISTING, ""),
        ("-1", LISTING, "-1"),
    ],
)
def test_a_process_sees_one_gpu(before: str | None, listing: str, expected: str) -> None:
    """By UUID where the cards are alike; what was narrowed already is kept to its first."""
    environment = {} if before is None else {devices.VISIBLE: before}
    seen = see_one_gpu(environment, lambda: read_gpus(listing))
    assert seen == {devices.VISIBLE: expected}
    assert see_one_gpu(seen, lambda: pytest.fail("asked again")) == seen


def test_a_driver_that_fails_or_hangs_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi may be there without a working driver."""
    monkeypatch.setattr("shutil.which", lambda _: "nvidia-smi")
    for error in (OSError(), subprocess.TimeoutExpired("nvidia-smi", 1)):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(subprocess, "run", fail)
        assert devices.list_gpus() == []


def test_the_worker_narrows_before_it_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable stands when the libraries are first touched."""
    monkeypatch.setenv(devices.VISIBLE, "3,1")
    seen: list[str] = []
    monkeypatch.setattr(
        worker_process, "quieten_libraries", lambda **_: seen.append(os.environ[devices.VISIBLE])
    )
    monkeypatch.setattr(worker_process, "_load_verbs", dict)
    for seat in (Seat(), Seat({devices.VISIBLE: "1"})):
        worker_process._begin(seat, is_quiet=True)
    assert seen == ["3", "1"]
