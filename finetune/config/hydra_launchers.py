"""Refuse Hydra's launchers (joblib, submitit, Ray) with the settings that replace them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncherConf
from hydra.core.override_parser.types import ChoiceSweep, QuotedString

KEY = "hydra.launcher"
SLURM = "workers=slurm workers.num=N workers.partition=PARTITION workers.time=4:00:00"
RAY = "workers=ray workers.address=ADDRESS"
# Launcher -> what to write instead; empty: nothing.
LAUNCHERS: Mapping[str, str] = {
    "basic": "",
    "joblib": "workers.num=N",
    "submitit_local": "workers.num=N",
    "submitit_slurm": SLURM,
    "ray": RAY,
    "ray_aws": RAY,
}
# Parameter of a launcher -> the setting with the same value.
SETTINGS: Mapping[str, str] = {
    "n_jobs": "workers.num",
    "array_parallelism": "workers.num",
    "cpus_per_task": "workers.threads",
    "gpus_per_node": "workers.gpus_per_worker",
    "gpus_per_task": "workers.gpus_per_worker",
    "partition": "workers.partition",
    "account": "workers.account",
    "gres": "workers.gres",
    "timeout_min": "workers.time",
    "ray.init.address": "workers.address",
    "ray.remote.num_cpus": "workers.threads",
    "ray.remote.num_gpus": "workers.gpus_per_worker",
}
# Parameter -> the option of sbatch.
OPTIONS: Mapping[str, str] = {
    "qos": "--qos={}",
    "comment": "--comment={}",
    "constraint": "--constraint={}",
    "exclude": "--exclude={}",
    "cpus_per_gpu": "--cpus-per-gpu={}",
    "mem_gb": "--mem={}G",
    "mem_per_gpu": "--mem-per-gpu={}",
    "mem_per_cpu": "--mem-per-cpu={}",
}
ADDITIONAL = "additional_parameters."  # more options of sbatch, by their names
UNSET = ("null", "-1")  # the default of workers, or joblib's one worker a core
LONGEST = 40  # characters of a value that are printed


def find_launcher_problem(key: str, value: Any) -> str | None:
    """Return why a key of Hydra's launchers is refused, as a clause; None for another key.

    Args:
        key: as typed, such as `hydra/launcher` or `hydra.launcher.n_jobs`.
        value: of Hydra's parser, or of a YAML file.
    """
    dotted = key.replace("/", ".")
    if dotted != KEY and not dotted.startswith(f"{KEY}."):
        return None
    below = dotted.removeprefix(KEY).removeprefix(".")
    if below or isinstance(value, Mapping):
        written = _write_settings(list(_single_values(below, value)))
    else:
        written = " or ".join(dict.fromkeys(filter(None, _write_choices(value))))
    remedy = f"write {written} instead" if written else "leave it out"
    return f"Hydra's launchers are not used, workers run the jobs; {remedy}"


def find_composed_problem(hydra: Any) -> str | None:
    """Return why a launcher is refused that an installed package's config has chosen."""
    if hydra.launcher._target_ == BasicLauncherConf._target_:
        return None
    choice = hydra.runtime.choices.get("hydra/launcher")
    return f"hydra/launcher={choice}: {find_launcher_problem('hydra/launcher', choice)}"


def _write_choices(value: Any) -> Iterator[str]:
    """Yield what to write instead of each launcher that is named."""
    names = value.list if isinstance(value, ChoiceSweep) else value
    for name in names if isinstance(names, list) else [names]:
        yield LAUNCHERS.get(_text(name), "workers=local, workers=slurm or workers=ray")


def _single_values(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield a launcher's parameters by their dotted names, with their values."""
    if isinstance(value, Mapping):
        for below, item in value.items():
            yield from _single_values(f"{name}.{_text(below)}".removeprefix("."), item)
    else:
        yield name, _text(value)


def _write_settings(parameters: Sequence[tuple[str, str]]) -> str:
    """Write the settings of workers that replace parameters; empty where none does."""
    settings: dict[str, str] = {}
    options: list[str] = []
    for name, value in parameters:
        plain = name.removeprefix(ADDITIONAL)
        if plain in OPTIONS:
            options.append(OPTIONS[plain].format(value))
        elif plain in SETTINGS and value not in UNSET:
            settings[SETTINGS[plain]] = _time(value) if plain == "timeout_min" else value
        elif plain not in SETTINGS and name.startswith(ADDITIONAL):
            options.append(f"--{plain.replace('_', '-')}={value}")
    written = [f"{setting}={value}" for setting, value in settings.items()]
    if options:
        # In quotes for Hydra, where a list's texts have a = in them, and for the shell.
        texts = ",".join(f"'{option}'" for option in options)
        written.append(f'"workers.extra=[{texts}]"')
    return " ".join(written)


def _text(value: Any) -> str:
    text = value.text if isinstance(value, QuotedString) else "null" if value is None else value
    line = " ".join(str(text).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def _time(minutes: str) -> str:
    """Return minutes as Slurm's hours, minutes and seconds."""
    if not minutes.isdecimal():
        return minutes
    hours, rest = divmod(int(minutes), 60)
    return f"{hours}:{rest:02}:00"
