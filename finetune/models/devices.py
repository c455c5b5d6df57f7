"""GPUs: the one that a process sees, and whether the installed packages have kernels for it.

Nothing here imports torch: a process chooses its GPU before torch looks for any, and a
capability (major, minor) and a build's list of architectures are plain values.
"""

from __future__ import annotations

import glob
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

VISIBLE = "CUDA_VISIBLE_DEVICES"
GPU_FILES = ("/dev/nvidia*", "/dev/kfd", "/dev/dxg", "/proc/driver/nvidia/version")
LIST_SECONDS = 10.0  # a driver that hangs is no reason to wait for ever
Capability = tuple[int, int]

# Oldest compute capability of formats, kernels and builds.
OLDEST_BF16 = (8, 0)  # Ampere; older GPUs emulate it
OLDEST_FLASH = (8, 0)  # flash-attn's kernels refuse a P100 or a T4
OLDEST_TRITON = (7, 0)  # Volta; Liger's kernels are written in it
OLDEST_INT8 = (7, 5)  # Turing; LLM.int8, by bitsandbytes' documentation
OLDEST_CUDA_13 = (7, 5)  # of torch's builds for CUDA 13, which PyPI has
OLDEST_CUDA_12_6 = (5, 0)
# Advice on builds: the same in refusals and docs/howto/gpus.md, which a test holds together.
INSTALL_CUDA_12_6 = "pip install 'torch<2.15' --index-url https://download.pytorch.org/whl/cu126"
DRIVERS = {13: 580, 12: 525}  # CUDA's major version -> oldest driver of NVIDIA's
GUIDE = "docs/howto/gpus.md"


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it."""

    name: str
    uuid: str


def find_gpu_files() -> list[str]:
    """Return the files by which a driver shows that the machine has GPUs, of any maker."""
    return sorted(path for pattern in GPU_FILES for path in glob.glob(pattern))


def list_gpus() -> list[Gpu]:
    """Return the machine's NVIDIA GPUs; none where nvidia-smi is missing or does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        done = subprocess.run(
            [command, "-L"], capture_output=True, text=True, timeout=LIST_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return read_gpus(done.stdout)


def read_gpus(listing: str) -> list[Gpu]:
    """Return the GPUs of `nvidia-smi -L`; of a GPU that MIG divides, its first instance."""
    gpus: list[Gpu] = []
    for line in listing.splitlines():
        part = re.match(r"\s+MIG .+\(UUID: (MIG-\S+)\)", line)
        if found := re.match(r"GPU \d+: (.+) \(UUID: (\S+)\)", line):
            gpus.append(Gpu(*found.groups()))
        elif part and gpus and gpus[-1].uuid.startswith("GPU-"):
            gpus[-1] = Gpu(gpus[-1].name, part[1])
    return gpus


def see_one_gpu(
    environment: Mapping[str, str], find: Callable[[], Sequence[Gpu]] = list_gpus
) -> dict[str, str]:
    """Return what to add to a process's environment so that it sees one GPU.

    The Trainer would spread a batch over all that it sees, which TRL refuses.

    Args:
        environment: of the process; GPUs that it names already are kept to the first one.
        find: lists the machine's GPUs.
    """
    if VISIBLE in environment:
        first = environment[VISIBLE].split(",")[0].strip()
        return {VISIBLE: first}
    gpus = find()
    if gpus and len({gpu.name for gpu in gpus}) == 1:
        return {VISIBLE: gpus[0].uuid}
    return {VISIBLE: "0"}  # by CUDA's own order, the fastest first


def has_kernels(capability: Capability, architectures: Sequence[str]) -> bool:
    """Return whether a build runs on a GPU: by its machine code, or by PTX that is compiled there.

    Args:
        capability: of the GPU.
        architectures: as torch.cuda.get_arch_list gives them, such as sm_80 and compute_90.
    """
    return any(_runs_on(capability, architecture) for architecture in architectures)


def _runs_on(capability: Capability, architecture: str) -> bool:
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if found is None:
        return True  # of another maker's GPUs
    kind, suffix = found[1], found[4]
    built = int(found[2]), int(found[3])
    if suffix == "a":  # for one architecture only
        return built == capability
    if kind == "compute" and not suffix:
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]


def find_kernel_problems(
    name: str, capability: Capability, architectures: Sequence[str]
) -> list[str]:
    """Return why the installed torch cannot compute on a GPU, with the builds that can."""
    if not architectures or has_kernels(capability, architectures):
        return []
    if OLDEST_CUDA_12_6 <= capability < OLDEST_CUDA_13:
        remedy = (
            "torch's builds for CUDA 12.6 have them, up to torch 2.14: "
            f"{INSTALL_CUDA_12_6} ({GUIDE})"
        )
    elif capability < OLDEST_CUDA_12_6:
        remedy = "no build of a supported torch has them"
    else:
        remedy = "a newer build of torch has them: https://pytorch.org/get-started/locally"
    return [
        f"training.device: the installed torch has no kernels for {name} (compute capability "
        f"{render(capability)}), only for {', '.join(architectures)}; {remedy}; "
        "or set training.device=cpu"
    ]


def are_hidden(environment: Mapping[str, str]) -> bool:
    """Return whether CUDA_VISIBLE_DEVICES hides all GPUs."""
    return environment.get(VISIBLE, "0").split(",")[0].strip() in ("", "-1")


def describe_missing(environment: Mapping[str, str], gpus: Sequence[Gpu], cuda: str | None) -> str:
    """Return why torch sees no GPU, with the remedy.

    Args:
        environment: of the process.
        gpus: of the machine, as nvidia-smi lists them.
        cuda: version that the installed torch is built for; None of a build without CUDA.
    """
    if not gpus:
        return "this machine has no CUDA device; use one that has"
    if are_hidden(environment):
        return f"{VISIBLE}={environment[VISIBLE]} hides {gpus[0].name}; unset it"
    if cuda is None:
        return (
            f"the installed torch is built without CUDA, so that it cannot use {gpus[0].name}; "
            f"install a build for CUDA ({GUIDE})"
        )
    driver = DRIVERS.get(int(cuda.partition(".")[0]), max(DRIVERS.values()))
    return (
        f"the installed torch is built for CUDA {cuda}, and the driver of {gpus[0].name} does not "
        f"start it; install a driver from {driver} on, or torch's builds for CUDA 12.6: "
        f"{INSTALL_CUDA_12_6} ({GUIDE})"
    )


def render(capability: Capability) -> str:
    return ".".join(map(str, capability))
