"""Hydra's launchers are refused with the settings of workers that replace them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import finetune
from finetune.config import hydra_launchers
from finetune.config.hydra_launchers import find_composed_problem, find_launcher_problem
from finetune.config.overrides import find_override_problems
from finetune.config.schema import register

GLOBAL = "# @package _global_\n"
# As typed -> what to write instead; empty: nothing.
REPLACED = {
    "hydra/launcher=joblib": "workers.num=N",
    "hydra/launcher=basic": "",
    "hydra/launcher=submitit_local": "workers.num=N",
    "hydra/launcher=submitit_slurm": hydra_launchers.SLURM,
    "+hydra/launcher=ray": hydra_launchers.RAY,
    "hydra/launcher=joblib,ray": f"workers.num=N or {hydra_launchers.RAY}",
    "hydra/launcher=mine": "workers=local, workers=slurm or workers=ray",
    "hydra.launcher=joblib": "workers.num=N",
    "hydra.launcher.n_jobs=4": "workers.num=4",
    "hydra.launcher.n_jobs=-1": "",
    "hydra.launcher.backend=loky": "",
    "hydra.launcher._target_=os.system": "",
    "hydra.launcher.partition=gpu": "workers.partition=gpu",
    "hydra.launcher.account='a b'": "workers.account=a b",
    "hydra.launcher.gres='gpu:1'": "workers.gres=gpu:1",
    "hydra.launcher.timeout_min=90": "workers.time=1:30:00",
    "hydra.launcher.cpus_per_task=8": "workers.threads=8",
    "hydra.launcher.gpus_per_node=2": "workers.gpus_per_worker=2",
    "hydra.launcher.mem_gb=32": "\"workers.extra=['--mem=32G']\"",
    "hydra.launcher.setup=[module load cuda]": "",
    "+hydra.launcher.additional_parameters={gres: 'gpu:1', mail_user: me, qos: high}": (
        "workers.gres=gpu:1 \"workers.extra=['--mail-user=me','--qos=high']\""
    ),
    "hydra.launcher={n_jobs: 2, x: {_target_: os.system}}": "workers.num=2",
    "+hydra.launcher.ray.init.address=auto": "workers.address=auto",
    "hydra.launcher.ray={init: {address: null}, remote: {num_gpus: 1}}": (
        "workers.gpus_per_worker=1"
    ),
}

register()


@pytest.mark.parametrize("typed", REPLACED)
def test_a_typed_launcher_is_refused_with_what_replaces_it(typed: str) -> None:
    """A launcher, several, and each parameter that workers have."""
    written = REPLACED[typed]
    remedy = f"write {written} instead" if written else "leave it out"
    assert find_override_problems([typed], multirun=True) == [
        f"{typed}: Hydra's launchers are not used, workers run the jobs; {remedy}"
    ]


@pytest.mark.parametrize(
    ("launch", "parameters"),
    [
        ("local", {"n_jobs": 4, "cpus_per_task": 2, "gpus_per_node": 1}),
        ("ray", {"ray": {"init": {"address": "ray://head:10001"}, "remote": {"num_cpus": 2}}}),
        (
            "slurm",
            {"partition": "gpu", "account": "me", "gres": "gpu:a100:1", "timeout_min": 600}
            | dict.fromkeys(hydra_launchers.OPTIONS, "2")
            | {"exclude": "node1,node[3-5]", "additional_parameters": {"mail-user": "me@there"}},
        ),
    ],
)  # fmt: skip
def test_what_is_to_be_written_can_be_typed(launch: str, parameters: dict[str, Any]) -> None:
    """In a shell; the settings of `workers` take it."""
    problem = find_launcher_problem("hydra.launcher", parameters)
    written = re.search(r"; write (.*) instead", str(problem))
    assert written is not None
    typed = [f"workers={launch}", *shlex.split(written[1])]
    assert find_override_problems(typed, multirun=False) == []


@pytest.mark.parametrize(
    "launcher", [name for name, line in hydra_launchers.LAUNCHERS.items() if line]
)
@pytest.mark.parametrize("start", ["override hydra/launcher", "override /hydra/launcher"])
def test_a_file_that_chooses_a_launcher_gets_the_same_line(
    tmp_path: Path, launcher: str, start: str
) -> None:
    """In its defaults list, in Hydra's section, in its grid."""
    for name, content in {
        "defaults": {"defaults": [{start: launcher}]},
        "section": {"hydra": {"launcher": {"n_jobs": 4, "timeout": 3}}},
        "grid": {"hydra": {"sweeper": {"params": {"hydra/launcher": launcher}}}},
    }.items():
        folder = tmp_path / name
        (folder / "experiment").mkdir(parents=True)
        (folder / "experiment" / "e.yaml").write_text(GLOBAL + yaml.safe_dump(content))
        (problem,) = find_override_problems(["experiment=e"], multirun=True, config_dir=str(folder))
        line = "workers.num=4" if name == "section" else hydra_launchers.LAUNCHERS[launcher]
        assert problem.endswith(f"workers run the jobs; write {line} instead")


def test_a_launcher_of_an_installed_packages_config_is_refused() -> None:
    """Its files are not read before Hydra composes them."""
    chosen = {
        "launcher": {"_target_": "x.Launcher"},
        "runtime": {"choices": {"hydra/launcher": "joblib"}},
    }
    problem = find_composed_problem(OmegaConf.create(chosen))
    assert problem is not None
    assert problem.startswith("hydra/launcher=joblib: ")
    assert problem.endswith("write workers.num=N instead")


@pytest.mark.parametrize(
    "key", ["hydra.launchers", "hydra/launcher_x.n_jobs", "launcher", "lora.r"]
)
def test_another_key_is_no_launchers(key: str) -> None:
    """Its name alone says so."""
    assert find_launcher_problem(key, "joblib") is None


def test_python_calls_are_refused_alike() -> None:
    """By the same line."""
    with pytest.raises(finetune.Refused, match=r"hydra/launcher=joblib: .*write workers\.num=N"):
        finetune.sweep("model=tiny", "lora.r=2,4", "hydra/launcher=joblib")
