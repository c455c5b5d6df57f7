"""The Python API: frozen names, the command's checks, folders and sweeps, from any program."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

import finetune
from finetune import api, distributed
from finetune.config.schema import Config, LoraConfig
from finetune.data.turns import Turn
from finetune.inference import conversation
from finetune.pipeline.jobs import CheckedJob, Job
from finetune.sweeps import planning
from finetune.sweeps.grid import Grid, compose_grid
from finetune.sweeps.worker import Worker
from finetune.tracking.run_folder import Status
from tests.conftest import ROOT, TINY, Command, train_tiny

# What users' programs and model cards rely on: a change here breaks them.
SIGNATURES = {
    "base_path": "(path: 'str', revision: 'str | None' = None) -> 'str'",
    "check": "(*overrides: 'str', config_dir: 'str | Path | None' = None) -> 'list[str]'",
    "compose": "(*overrides: 'str', config_dir: 'str | Path | None' = None) -> 'Config'",
    "load": "(path: 'Run | str | Path', merged: 'bool' = False, *, trust_remote_code: 'bool' = "
    "False) -> 'tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]'",
    "open_run": "(path: 'str | Path') -> 'Run'",
    "prompt": "(run: 'Run | str | Path', text: 'str | Mapping[str, Any]') -> 'str'",
    "read_results": "(folder: 'str | Path') -> 'Results'",
    "run": "(*overrides: 'str', config_dir: 'str | Path | None' = None) -> 'Run'",
    "sweep": "(*overrides: 'str', name: 'str | None' = None, config_dir: 'str | Path | None' = "
    "None) -> 'Results'",
}
MEMBERS = {
    "Run": {
        "adapter", "config", "metric", "name", "overrides", "path", "reason", "scores", "status",
    },
    "Results": {
        "best", "comparisons", "path", "rows", "runs", "text", "to_frame", "verdict",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, module_cache: None) -> Path:
    """Return the folder of a run of the tiny model."""
    return train_tiny(tmp_path_factory.mktemp("run"), lora=LoraConfig(r=2))


def named(*overrides: str, is_sweep: bool = True) -> Grid:
    """Return the grid of a call."""
    return compose_grid(overrides, None, is_sweep=is_sweep)


def test_the_public_names_are_frozen() -> None:
    """Names, signatures and members stay as they are published."""
    assert set(finetune.__all__) == {*SIGNATURES, *MEMBERS, "Config", "Refused"}
    assert set(finetune.__all__) == set(api.__all__) <= set(dir(finetune))
    for name, signature in SIGNATURES.items():
        assert str(inspect.signature(getattr(finetune, name))) == signature
    for name, members in MEMBERS.items():
        kind = getattr(finetune, name)
        public = {*vars(kind), *getattr(kind, "__dataclass_fields__", ())}
        assert {one for one in public if not one.startswith("_")} == members
    assert finetune.Refused(["a", "b"]).problems == ["a", "b"]


@pytest.mark.parametrize("name", finetune.__all__)
def test_a_public_name_is_explained(name: str) -> None:
    """Each has a docstring; a function's with its errors or an example."""
    value = getattr(finetune, name)
    assert value.__doc__
    if name in SIGNATURES:
        assert "Raises:" in value.__doc__ or "Examples:" in value.__doc__


def test_an_unknown_name_is_no_attribute() -> None:
    """As of any module; a module of the package is still one."""
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        getattr(finetune, "train")  # noqa: B009  # mypy knows that there is none
    assert inspect.ismodule(import_module("finetune.config.schema"))


def test_importing_the_package_loads_nothing() -> None:
    """Names come when they are used; checking and sweeping need no torch in this process."""
    code = (
        "import sys, finetune\n"
        "loaded = {'torch', 'hydra', 'transformers', 'mlflow', 'omegaconf'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "finetune.compose('model=tiny')\n"
        "loaded = {'torch', 'transformers', 'mlflow', 'pandas', 'lm_eval'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "import finetune.sweeps.run_sweep\n"
        "assert callable(finetune.sweep)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_are_composed_and_checked(tmp_path: Path) -> None:
    """With interpolations, own config folders, and all problems at once."""
    assert finetune.compose("model=tiny", "lora.r=8", "lora.alpha=${mul:2,${lora.r}}").lora == (
        LoraConfig(r=8, alpha=16)
    )
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine.yaml").write_text("r: 3\n", encoding="utf-8")
    assert finetune.compose("lora=mine", config_dir=tmp_path).lora.r == 3
    with pytest.raises(finetune.Refused) as refused:
        finetune.compose("lora.rr=1", "training.epochs=-1")
    assert len(refused.value.problems) == 2
    assert isinstance(finetune.compose(), Config)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["lora.r=2,4"], "several values are a sweep; call finetune.sweep"),
        (["--multirun"], "--multirun is a flag of the command; leave it out"),
        ([["lora.r=2"]], "is no override; give each as text, 'KEY=VALUE'"),
        (["lora.r=2", "lora.r=4"], "lora.r is set more than once"),
        (["hydra/launcher=joblib"], "hydra/launcher=joblib: Hydra's launchers are not used"),
        (["lora"], "lora"),
        (["model=nope"], "model=nope: there is no such option"),
        (["lora.r=${oc.env:FINETUNE_NOT_SET}"], "FINETUNE_NOT_SET"),
    ],
)
def test_a_wrong_override_is_refused(overrides: list[Any], problem: str) -> None:
    """In one line each, with what to do in Python."""
    with pytest.raises(finetune.Refused) as refused:
        finetune.compose(*overrides)
    assert any(problem in one for one in refused.value.problems)
    assert not any("\n" in one for one in refused.value.problems)


def test_a_grid_of_a_config_file_is_a_sweep(tmp_path: Path) -> None:
    """As for the command: one run refuses it, a sweep takes it."""
    (tmp_path / "experiment").mkdir()
    grid = "# @package _global_\nhydra: {sweeper: {params: {lora.r: '2,4'}}}\n"
    (tmp_path / "experiment" / "ranks.yaml").write_text(grid, encoding="utf-8")
    with pytest.raises(finetune.Refused, match=r"is a sweep of lora\.r; call finetune\.sweep"):
        finetune.compose("experiment=ranks", config_dir=tmp_path)
    found = compose_grid(["experiment=ranks", "model=tiny"], str(tmp_path), is_sweep=True)
    assert [job.swept for job in found.jobs] == [{"lora.r": "2"}, {"lora.r": "4"}]


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        (["lora.r=2,4"], [{"lora.r": "2"}, {"lora.r": "4"}]),
        (["lora.r=range(1,3)"], [{"lora.r": "1"}, {"lora.r": "2"}]),
        (["lora.r=choice(2,4)"], [{"lora.r": "2"}, {"lora.r": "4"}]),
        (["lora=glob(r*)"], [{"lora": "rslora"}]),
        (["lora.r=4"], [{}]),
        (
            ["lora.r=2,4", "training.seed=1,2"],
            [{"lora.r": r, "training.seed": s} for r in "24" for s in "12"],
        ),
    ],
)
def test_a_grid_is_expanded_as_by_the_command(
    overrides: list[str], values: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every point, its overrides, and the sweep's name are the command's."""
    found = named("model=tiny", *overrides)
    assert [job.swept for job in found.jobs] == values
    seen = typed(monkeypatch, "model=tiny", *overrides, "--multirun")
    assert [job.overrides for job in seen.jobs] == [job.overrides for job in found.jobs]
    assert [job.yaml for job in seen.jobs] == [job.yaml for job in found.jobs]
    assert (seen.name, seen.arguments) == (found.name, found.arguments)


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Grid:
    """Return the grid that the command makes of what is typed."""
    from finetune import __main__ as command

    seen: list[Grid] = []

    def run_sweep(jobs: Any, arguments: Any, again: Any) -> int:
        name = planning.sweep_name(jobs, arguments)
        seen.append(Grid(list(jobs), list(arguments), name, list(again)))
        return 0

    monkeypatch.setattr("finetune.sweeps.run_sweep.run_sweep", run_sweep)
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    with pytest.raises(SystemExit):
        command.command()
    GlobalHydra.instance().clear()
    return seen[0]


@pytest.mark.parametrize("overrides", [["model=tiny"], ["model=tiny", "sweep.name=a b"]])
def test_a_run_is_named_as_by_the_command(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run is a sweep of one, under the same name."""
    found, seen = named(*overrides, is_sweep=False), typed(monkeypatch, *overrides)
    assert (seen.name, seen.arguments) == (found.name, found.arguments)
    assert seen.jobs[0] == found.jobs[0]


@pytest.mark.parametrize("name", ["plain", "it's a 'name', with \\ and a,b", "ranks 2-4"])
def test_a_sweep_is_named_by_its_argument(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the name, as by sweep.name."""
    seen: list[Grid] = []
    monkeypatch.setattr(api, "_conduct", lambda grid: seen.append(grid))
    with pytest.raises(AttributeError):
        finetune.sweep("model=tiny", name=name)
    assert seen[0].jobs[0].config.sweep.name == name


def test_secrets_stay_interpolations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the environment is in no file of the run."""
    monkeypatch.setenv("FINETUNE_TEST_SECRET", "linear")
    override = "optimizer.scheduler=${oc.env:FINETUNE_TEST_SECRET}"
    (job,) = named("model=tiny", override, is_sweep=False).jobs
    assert job.config.optimizer.scheduler == "linear"
    assert "linear" not in job.yaml.replace("all-linear", "")
    assert job.overrides[-1] == override


def test_a_program_that_uses_hydra_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own search path, config and schema are what they were, also after a refusal."""
    (tmp_path / "config.yaml").write_text("mine: 1\n", encoding="utf-8")
    monkeypatch.setattr(ConfigStore.instance(), "repo", dict(ConfigStore.instance().repo))
    ConfigStore.instance().store(name="schema", node={"theirs": 1})
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        assert finetune.compose("model=tiny").lora.r == 16
        with pytest.raises(finetune.Refused):
            finetune.compose("lora.r=0", "nope=1")
        assert GlobalHydra.instance().hydra is before
        assert compose("config") == {"mine": 1}
    assert ConfigStore.instance().load("schema.yaml").node == {"theirs": 1}


def test_calls_from_threads_do_not_mix() -> None:
    """Hydra's state is the process's; one call at a time composes."""
    found: dict[int, int] = {}

    def call(rank: int) -> None:
        found[rank] = finetune.compose("model=tiny", f"lora.r={rank}").lora.r

    threads = [threading.Thread(target=call, args=(rank,)) for rank in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1: 1, 2: 2, 3: 3}


def refuse_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let planning find a problem in every job."""

    def prepare(_self: Worker, job: Job) -> CheckedJob:
        return CheckedJob(None, [f"rank {job.config.lora.r} is wrong"])

    monkeypatch.setattr(Worker, "prepare", prepare)


def test_a_check_returns_the_problems_of_the_whole_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Found while composing or by planning, and nothing is printed or ends the process."""
    monkeypatch.chdir(tmp_path)
    refuse_all(monkeypatch)
    assert finetune.check(*TINY, "lora.r=2,4") == ["rank 2 is wrong", "rank 4 is wrong"]
    assert len(finetune.check("lora.rr=1", "nope=2")) == 2
    with pytest.raises(finetune.Refused) as refused:
        finetune.sweep(*TINY, "lora.r=2,4")
    assert refused.value.problems == ["rank 2 is wrong", "rank 4 is wrong"]
    with pytest.raises(finetune.Refused):
        finetune.run(*TINY)
    with pytest.raises(finetune.Refused, match=r"call finetune\.check"):
        finetune.run(*TINY, "sweep.dry_run=true")
    assert capfd.readouterr() == ("", "")
    assert not [*tmp_path.glob("outputs/*"), *tmp_path.glob("multirun_reports/*")]


def test_signal_handlers_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call has its own while it runs, and in a thread none."""
    monkeypatch.chdir(tmp_path)
    during: list[object] = []

    def prepare(_self: Worker, job: object) -> CheckedJob:
        during.append(signal.getsignal(signal.SIGTERM))
        return CheckedJob(None, ["stop here"])

    monkeypatch.setattr(Worker, "prepare", prepare)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    finetune.check(*TINY)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    thread = threading.Thread(target=finetune.check, args=TINY)
    thread.start()
    thread.join()
    assert during[0] != before[1]
    assert during[1] == before[1]


def test_a_launched_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other processes would wait for what only the command sends."""
    monkeypatch.setattr(distributed, "is_launched", lambda: True)
    assert "use the command" in finetune.check("model=tiny")[0]


def test_a_stopped_sweep_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After runs were ended as by the command, the interrupt is the caller's."""
    stop = KeyboardInterrupt("interrupted by the user")
    ending = cast(Any, type("Ending", (), {"unsent": None, "stopped": stop}))
    monkeypatch.setattr(api, "check_sweep", lambda *_: None)
    monkeypatch.setattr(api, "conduct", lambda *_, **__: ending)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt) as raised:
        finetune.run(*TINY)
    assert raised.value is stop


def test_a_run_is_read(run: Path) -> None:
    """Status, settings, metrics, scores and adapter, from its files."""
    found = finetune.open_run(run)
    assert (found.status, found.reason, found.name) == ("finished", None, run.name)
    assert found.config.lora.r == 2
    assert found.adapter == run / "adapter"
    losses = found.metric("train/loss")
    assert list(losses) == [1, 2, 3, 4]
    assert all(loss > 0 for loss in losses.values())
    assert found.metric("no/such") == {}
    assert found.scores() == {}
    assert found == finetune.open_run(str(run))
    assert repr(found) == f"Run({str(run)!r}, status='finished')"


def test_what_is_no_run_and_no_sweep_is_refused(tmp_path: Path) -> None:
    """With the folder's name."""
    for call in (finetune.open_run, finetune.read_results, finetune.load):
        with pytest.raises(finetune.Refused, match=str(tmp_path)):
            call(tmp_path)
    with pytest.raises(finetune.Refused, match="nope"):
        finetune.base_path("package://nope/FILE.gguf")


@pytest.fixture
def swept(run: Path, tmp_path: Path) -> finetune.Results:
    """Return the results of a sweep of two ranks: one scored, one failed."""
    import shutil

    from finetune.tracking.sweep_record import RunRecord, SweepRecord

    scored = shutil.copytree(run, tmp_path / "outputs" / "scored")
    (scored / "evaluation").mkdir(exist_ok=True)
    sides = {"base": 0.25, "tuned": 0.75}
    score = {
        side: {"metrics": {"acc": acc, "acc_stderr": 0.125}, "num_questions": 4}
        for side, acc in sides.items()
    }
    (scored / "evaluation" / "science.json").write_text(json.dumps(score))
    failed = finetune.Run(tmp_path / "outputs" / "failed")
    failed._folder.write_status(Status("failed", "out of <memory>"))
    runs = [
        RunRecord(f"../../outputs/{name}", {"lora.r": rank})
        for name, rank in (("scored", "2"), ("failed", "4"))
    ]
    folder = tmp_path / "multirun_reports" / "sweep"
    folder.mkdir(parents=True)
    SweepRecord("sweep", ["lora.r=2,4"], ["lora.r"], ["science"], runs).write(folder)
    return finetune.read_results(folder)


def test_results_are_rows_a_frame_and_a_table(swept: finetune.Results, tmp_path: Path) -> None:
    """The best run, the rows of results.csv, numbers in a frame, and a page in a notebook."""
    assert swept.best == finetune.open_run(tmp_path / "outputs" / "scored")
    assert swept.best.scores(base=True) == {"science": {"acc": 0.25, "acc_stderr": 0.125}}
    assert [row["status"] for row in swept.rows] == ["finished", "failed"]
    assert swept.runs[1].reason == "out of <memory>"
    frame = swept.to_frame()
    assert list(frame.columns)[:4] == ["run", "lora.r", "status", "reason"]
    assert list(frame.columns)[-1] == "mlflow_run_id"
    assert frame["lora.r"].tolist() == [2, 4]
    assert frame["science/acc"].isna().tolist() == [False, True]
    assert re.search(r"^base +0.2500 *\n2 +0.7500 *\n +\+0.5000", repr(swept), re.MULTILINE)
    assert swept._repr_html_().startswith("<pre>")
    assert "0.7500" in swept._repr_html_()
    assert "&lt;b&gt;" in replace(swept, text="<b>")._repr_html_()


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_is_loaded_ready_to_generate(run: Path, merged: bool) -> None:
    """In eval mode, asked by its prompt; merged, it is a plain model with the same answers."""
    model, tokenizer = finetune.load(run, merged)
    assert not model.training
    assert hasattr(model, "peft_config") is not merged
    asked = finetune.prompt(run, "Why is the sky blue?")
    tokens = tokenizer(asked, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        logits = cast(Any, model)(**tokens).logits
        answer = cast(Any, model).generate(**tokens, max_new_tokens=2, do_sample=False)
    assert answer.shape[1] > tokens["input_ids"].shape[1]
    other, _ = finetune.load(finetune.open_run(run), not merged)
    with torch.inference_mode():
        assert torch.allclose(cast(Any, other)(**tokens).logits, logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("init", "quantization"), [("pissa", "none"), ("olora", "nf4")])
@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_that_changed_its_base_is_loaded(
    init: str, quantization: str, merged: bool, tmp_path: Path
) -> None:
    """PiSSA's, and OLoRA's on a quantised base, as the run was scored."""
    from finetune.config.schema import ModelConfig
    from finetune.inference.merging import load_as_scored
    from finetune.inference.trained import find_trained

    path = train_tiny(
        tmp_path,
        lora=LoraConfig(r=2, init=init),
        model=ModelConfig(path="random://tiny", quantization=quantization),
    )
    model, tokenizer = finetune.load(path, merged)
    tokens = tokenizer(finetune.prompt(path, "Why?"), return_tensors="pt")
    with torch.inference_mode():
        found, own = (
            cast(Any, one)(**tokens).logits for one in (model, load_as_scored(find_trained(path)))
        )
    assert torch.allclose(found, own, atol=0.05 if quantization == "nf4" else 1e-3)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("alpaca", "Why?"),
        ("chat", "Why?"),
        ("question.jinja", {"question": "Why?", "choices": ["a", "b"]}),
        ("text", "Once upon a"),
    ],
)
def test_a_prompt_is_tokenised_as_in_training(
    template: str, text: Any, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its text gives the tokens that stood before a response."""
    from finetune.inference.trained import find_trained

    if template == "question.jinja":
        lines = "Q: {{ question }}\n{% for one in choices %}- {{ one }}\n{% endfor %}A: "
        (tmp_path / template).write_text(lines, encoding="utf-8")
        template = str(tmp_path / template)
    trained = find_trained(run)
    data = replace(trained.config.data, prompt_template=template)
    trained = replace(trained, config=replace(trained.config, data=data))
    tokenizer = trained.load_tokenizer()
    (voice,) = conversation.build_voices([trained])
    fields = text if isinstance(text, dict) else {voice.fields[0]: text}
    asked = [*voice.turns(fields), Turn("assistant", "")]
    shown = conversation.render_prompt(trained, text)
    assert tokenizer(shown)["input_ids"] == voice.template.ask(asked, tokenizer).tokens
    if isinstance(text, dict):
        with pytest.raises(finetune.Refused, match="has the fields choices, question"):
            conversation.render_prompt(trained, {"question": "Why?"})


SCRIPT = """
import finetune
r = finetune.sweep(*{overrides!r}, "lora.r=2,4")
print(r.best.path.name, r.to_frame()["lora.r"].tolist())
again = finetune.run(*{overrides!r}, "lora.r=2")
print(again == r.runs[0], again.status)
"""


@pytest.mark.slow
def test_a_script_without_a_guard_sweeps(tmp_path: Path, finetune: Command) -> None:
    """The worker does not run it again; the command goes on with the sweep, and reruns a run."""
    overrides = [*TINY, "data.num_examples=8"]
    overrides = [one for one in overrides if one != "data.num_examples=16"]
    (tmp_path / "script.py").write_text(SCRIPT.format(overrides=overrides), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout
    assert lines[0].endswith("[2, 4]")
    assert lines[1] == "True finished"
    command = finetune(*overrides, "lora.r=2,4", "--multirun")
    assert command.stdout.count("finished already") == 2, command.stderr
    assert len([*tmp_path.glob("multirun_reports/*/sweep.yaml")]) == 2  # the sweep, and the run
    (of_two,) = tmp_path.glob("outputs/*r2*")
    again = finetune(str(of_two), module="finetune.rerun")
    assert "identical" in again.stdout, again.stderr


STOPPED = """
import glob, finetune
try:
    finetune.run(*{overrides!r})
except KeyboardInterrupt as stop:
    (folder,) = glob.glob("outputs/*/")
    print(finetune.open_run(folder).status, "|", stop)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGINT, "interrupted by the user"), (signal.SIGTERM, "stopped by SIGTERM")],
)
def test_a_stopped_call_leaves_a_checkpoint(
    number: signal.Signals, said: str, tmp_path: Path, finetune: Command
) -> None:
    """The run is interrupted as by the command, which goes on from there."""
    overrides = [*TINY, "training.epochs=30"]
    code = STOPPED.format(overrides=overrides)
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        while not any("train/loss" in log.read_text() for log in tmp_path.glob("*/*/events.jsonl")):
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(number)
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert output.splitlines() == [f"interrupted | {said}"]
    assert "resumed at step" in finetune(*overrides, "sweep.dry_run=true").stdout


@pytest.mark.slow
def test_a_failed_run_is_a_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call returns, and says why; the process goes on."""
    monkeypatch.chdir(tmp_path)
    found = finetune.run(*TINY, "sweep.job_timeout=0.2")
    assert found.status == "failed"
    assert "sweep.job_timeout" in str(found.reason)
