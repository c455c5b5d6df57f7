"""A sweep's name, the same for the same command, and what it does about each of its runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from finetune.config.schema import Config, ModelConfig, SweepConfig
from finetune.files import file_digest
from finetune.pipeline.jobs import Job
from finetune.reporting.tables import print_table
from finetune.sweeps import planning
from finetune.sweeps.plan_tables import render_plan, render_time
from finetune.sweeps.planning import Action, Point, Sweep, decide, sweep_name
from finetune.tracking.events import State
from finetune.tracking.run_folder import RunFolder
from finetune.training.checkpoints import MANIFEST, MARKER


def name(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, experiment: str | None = None, **sweep: Any
) -> str:
    """Return the name of a sweep over the given overrides."""
    choices = {"model": "tiny", "data": "demo", "experiment": experiment}
    hydra = SimpleNamespace(runtime=SimpleNamespace(choices=choices))
    monkeypatch.setattr(planning, "HydraConfig", SimpleNamespace(get=lambda: hydra))
    paths = [a.removeprefix("model.path=") for a in arguments if a.startswith("model.path=")]
    jobs = [
        Job(Config(model=ModelConfig(path=path), sweep=SweepConfig(**sweep)), "", [*arguments], {})
        for path in (paths[0].split(",") if paths else ["random://tiny"])
    ]
    return sweep_name(jobs, arguments)


def test_the_default_name_is_that_of_earlier_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command continues the same sweep."""
    assert name(monkeypatch, "lora.r=4", "model=tiny") == "tiny-demo-0d2ead1d"
    assert name(monkeypatch, "tracking.uri=x", "lora.r=4", "model=tiny") == "tiny-demo-0d2ead1d"


@pytest.mark.parametrize(
    ("path", "begin"),
    [
        ("org/Some-Model-1.5B", "some-model-1.5b-demo-"),
        ("/models/mine/", "mine-demo-"),
        ("package://llm/Smol.Q4_1.gguf", "smol.q4_1.gguf-demo-"),
        ("a/one,b/two", "one-two-demo-"),
        (".", "model-demo-"),
    ],
)
def test_a_sweep_is_named_after_its_models_path(
    path: str, begin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the option that the path replaced."""
    assert name(monkeypatch, f"model.path={path}").startswith(begin)


def test_an_experiment_with_another_model_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its registered model is not that of the experiment."""
    typed = name(monkeypatch, "model.path=org/other", experiment="mistral_alpaca_arc")
    assert typed.startswith("mistral_alpaca_arc-other-")
    assert name(monkeypatch, experiment="e").startswith("e-")


def test_two_names_are_never_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any script and length; the digest of a long name is not cut off."""
    given = ["Опыт", "実験", "My Sweep", "my sweep", "my-sweep", "x" * 90, "x" * 91]
    assert len({name(monkeypatch, name=one) for one in given}) == len(given)
    paths = [f"model.path={'x' * 100}/{'y' * 100}{number}" for number in (1, 2)]
    assert len({name(monkeypatch, path) for path in paths}) == 2
    assert all(len(name(monkeypatch, path)) <= 80 for path in paths)


def job(*, retry_failed: bool = True, max_steps: int | None = None) -> Job:
    config = Config(model=ModelConfig(path="random://tiny"))
    config.sweep.retry_failed, config.training.max_steps = retry_failed, max_steps
    return Job(config, "", [], {"lora.r": "8"})


@pytest.mark.parametrize(
    ("earlier", "retry_failed", "max_steps", "expected"),
    [
        (None, True, None, "train"),
        ("interrupted", True, None, "train"),
        ("failed", True, None, "train"),
        ("failed", False, None, "leave"),
        ("diverged", True, None, "leave"),
        ("diverged", True, 0, "leave"),
        (None, True, 0, "evaluate"),
    ],
)
def test_an_earlier_end_decides_what_becomes_of_a_run(
    tmp_path: Path,
    earlier: State | None,
    retry_failed: bool,
    max_steps: int | None,
    expected: Action,
) -> None:
    """What diverged stays, what failed is tried again if asked, and the rest is trained."""
    given = job(retry_failed=retry_failed, max_steps=max_steps)
    assert decide(given, RunFolder(tmp_path / "run"), earlier) == expected


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    """Whatever ended it, unless it is to be left."""
    run = RunFolder(tmp_path / "run")
    step = run.checkpoints / "step-0000012"
    step.mkdir(parents=True)
    (step / MANIFEST).write_text("{}")
    (step / MARKER).write_text(file_digest(step / MANIFEST))
    assert decide(job(), run, "interrupted") == "resume"
    assert decide(job(), run, "diverged") == "leave"


def test_the_plan_says_in_words_what_becomes_of_each_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each action has its sentence, made from it and from nothing else."""
    run = RunFolder(tmp_path / "run")
    points = [
        Point(job(), run, "skip"),
        Point(job(), run, "leave", left="failed", earlier="failed"),
        Point(job(max_steps=0), run, "evaluate"),
        Point(job(), run, "evaluate"),
        Point(job(), run, "resume", step=12),
        Point(job(), run, "train"),
        Point(job(), run, "train", earlier="failed"),
        Point(job(), run, "train", earlier="interrupted"),
    ]
    assert {point.action for point in points} == set(get_args(Action))
    print_table(render_plan(Sweep("grid", points, []), 80))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["lora.r", "run", "action"]
    assert [line.split(maxsplit=2)[2].rstrip() for line in lines[1:]] == [
        "finished already", "failed, not retried", "to be evaluated", "trained, to be evaluated",
        "resumed at step 12", "new", "failed, retried", "restarted",
    ]  # fmt: skip
    assert [point.is_waiting for point in points] == [False, False, *[True] * 6]
    assert [point.trains for point in points] == [*[False] * 4, *[True] * 4]


@pytest.mark.parametrize(
    ("num_workers", "seconds", "expected"),
    [
        (1, [0.5, 0.5], "to train: 2 runs, about 3 min"),
        (4, [0.5, 0.5], "to train: 2 runs, about 80 s on 2 workers"),
        (1, [0.5, None], "by the speed known for 1 of them"),
        (1, [None, None], "2 runs; how long is known once"),
    ],
)
def test_the_plan_says_how_long_training_takes(
    num_workers: int, seconds: list[float | None], expected: str, tmp_path: Path
) -> None:
    """Rows times the seconds that one took before; what is finished takes none."""
    run = RunFolder(tmp_path / "run")
    points = [Point(job(), run, "train", rows=160, row_seconds=one) for one in seconds]
    line = render_time(Sweep("grid", [*points, Point(job(), run, "skip")], []), num_workers)
    assert line is not None
    assert expected in line
    assert render_time(Sweep("grid", [Point(job(), run, "skip")], []), 1) is None


def test_a_resumed_training_takes_what_is_left_of_it(tmp_path: Path) -> None:
    """From the step of its checkpoint on."""
    given, run = job(), RunFolder(tmp_path / "run")
    given.config.training.batch_size, given.config.training.gradient_accumulation_steps = 4, 2
    point = Point(given, run, "resume", step=5, rows=80, row_seconds=0.5)
    assert point.train_seconds == 20.0
    assert Point(given, run, "evaluate", rows=80, row_seconds=0.5).train_seconds == 0.0


@pytest.mark.parametrize(
    ("width", "heading", "row"),
    [
        (120, "lora.r optimizer.lr run action", "16 0.001 tiny-lora-r16-0123456789ab new"),
        (40, "lora.r optimizer.lr run action", "16 0.001 012345 new"),
        (28, "r lr run action", "16 0.001 012345 new"),
    ],
)
def test_the_plan_fits_the_terminal(
    width: int, heading: str, row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names give way to ids, then keys lose their sections."""
    given = Job(Config(), "", [], {"lora.r": "16", "optimizer.lr": "0.001"})
    run = RunFolder(tmp_path / "tiny-lora-r16-0123456789ab")
    print_table(render_plan(Sweep("grid", [Point(given, run, "train")], []), width))
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines] == [heading, row]
    assert max(len(line.rstrip()) for line in lines) <= width
