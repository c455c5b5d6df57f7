"""Flags and overrides in any order; one line where a flag is wrong."""

from __future__ import annotations

import pytest

from finetune.config.command_line import is_multirun, read_command_line
from finetune.problems import Refused


@pytest.mark.parametrize(
    "typed",
    [
        ["--multirun", "lora.r=4,8", "model=tiny"],
        ["lora.r=4,8", "-m", "model=tiny"],
        ["lora.r=4,8", "model=tiny", "--multirun"],
    ],
)
def test_a_flag_may_stand_anywhere(typed: list[str]) -> None:
    """Also between two overrides."""
    args, _ = read_command_line(typed)
    assert is_multirun(args)
    assert args.overrides == ["lora.r=4,8", "model=tiny"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["hydra.mode=MULTIRUN"], True), (["hydra.mode=multirun"], True),
        (["hydra.mode=RUN"], False), ([], False), (["-m"], True),
    ],
)  # fmt: skip
def test_a_sweep_is_a_flag_or_hydras_mode(typed: list[str], expected: bool) -> None:
    """As in Hydra since 1.2."""
    assert is_multirun(read_command_line(typed)[0]) == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--multirn", "--multirn is not an option; did you mean --multirun?"),
        ("--cfg jobb", "argument --cfg/-c: invalid choice: 'jobb'"),
        ("--config-dir", "argument --config-dir/-cd: expected one argument"),
        ("--run --multirun", "--run and --multirun exclude each other"),
        ("--multirun --cfg job", "--multirun and --cfg exclude each other"),
        ("--multirun hydra.mode=RUN", "hydra.mode=RUN and --multirun exclude each other"),
        ("--resolve", "--resolve needs --cfg"),
        ("--package lora", "--package needs --cfg"),
        ("--config-path x", "--config-path would replace finetune's conf/"),
        ("--config-name x", "--config-name would replace finetune's config.yaml"),
        ("--experimental-rerun x", "--experimental-rerun loads a pickle"),
    ],
)
def test_a_wrong_flag_is_one_line_with_its_remedy(typed: str, expected: str) -> None:
    """Where argparse would print its usage, and Hydra a traceback."""
    with pytest.raises(Refused) as caught:
        read_command_line(typed.split())
    (problem,) = caught.value.problems
    assert problem.startswith(expected)
    assert "\n" not in problem


def test_shell_completion_gets_what_was_typed() -> None:
    """Hydra's own command, its words untouched."""
    args, _ = read_command_line(["-sc", "install=bash", "evaluation.tasks=x"])
    assert args.overrides == ["install=bash", "evaluation.tasks=x"]


@pytest.mark.parametrize(
    "typed",
    [
        "lora.r=4 lora.r=8", "lora.r=2,4 model=tiny lora.r=8 -m", "lora=default lora=dora",
        "lora.r=4 lora.r=4", "+data.columns.a=b ++data.columns.a=c",
        "hydra.mode=RUN hydra.mode=MULTIRUN", "experiment=null experiment=x",
    ],
)  # fmt: skip
def test_a_setting_typed_twice_is_refused_with_both(typed: str) -> None:
    """Hydra takes the last one and drops the first silently."""
    with pytest.raises(Refused) as caught:
        read_command_line(typed.split())
    (problem,) = caught.value.problems
    first, *_, last = [word for word in typed.split() if word not in ("model=tiny", "-m")]
    assert f"is set more than once, by {first} and {last}; keep one of them" in problem


def test_a_key_taken_away_may_be_set_anew() -> None:
    """`~` and the value after it are one wish."""
    typed = ["~data.columns.input", "+data.columns.input=x"]
    assert read_command_line(typed)[0].overrides == typed


def test_hydras_help_is_printed_beside_settings() -> None:
    """Hydra would look for them in its own config."""
    assert read_command_line(["model=tiny", "--hydra-help"])[0].overrides == []
