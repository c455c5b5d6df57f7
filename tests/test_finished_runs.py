"""Records of finished runs: known without torch, and never taken for what is not finished."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from finetune.config.inputs import Inputs
from finetune.config.schema import Config, DataConfig, ModelConfig, build_config
from finetune.home import cache_dir
from finetune.models.base_model import find_model
from finetune.pipeline import finished_runs, preflight, run_jobs
from finetune.pipeline.finished_runs import FinishedRuns
from finetune.pipeline.jobs import Job
from finetune.pipeline.session import Session
from finetune.sweeps.worker import Worker
from finetune.tracking.run_folder import RunFolder, Status
from tests.conftest import TINY, Command, write_rows

ROWS: list[object] = [{"instruction": f"ask {n}", "output": f"answer {n}"} for n in range(8)]


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, session: Session, module_cache: None
) -> Config:
    """Return the settings of a run that has finished: a local model, rows, a template, a task."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(find_model(ModelConfig(path="random://tiny")).location, folder / "model")
    (folder / "rows").mkdir()
    write_rows(folder / "rows" / "train.jsonl", ROWS)
    (folder / "prompt.jinja").write_text("{{ instruction }}\n", encoding="utf-8")
    config = Config(
        model=ModelConfig(path=str(folder / "model")),
        data=DataConfig(path=str(folder / "rows"), prompt_template=str(folder / "prompt.jinja")),
        output_dir=str(folder / "outputs"),
    )
    config.training.max_steps, config.training.max_length = 1, 400
    config.evaluation.limit = 2
    run(config, session)
    return config


@pytest.fixture
def config(trained: Config, session: Session, tmp_path: Path) -> Iterator[Config]:
    """Return the settings of the finished run, recorded just now; put its files back at the end."""
    folder = Path(trained.output_dir).parent
    shutil.copytree(folder, tmp_path / "before")
    run(trained, session)
    assert FinishedRuns().find(trained) is not None
    yield build_config(OmegaConf.structured(trained))
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "before", folder)


def run(config: Config, session: Session) -> None:
    job = Job(config, OmegaConf.to_yaml(OmegaConf.structured(config)), [], {})
    assert run_jobs.run([job], session) == ["finished"]


def folder_of(config: Config) -> Path:
    (status,) = Path(config.output_dir).glob("*/status.json")
    return status.parent


def test_what_is_recorded_is_what_the_worker_plans(config: Config, session: Session) -> None:
    """The same inputs, identity and folder; and no worker is started for the job."""
    planned = preflight.prepare(config, session)
    assert planned.finished
    job = Job(config, "", [], {})
    with Worker() as worker:
        assert worker.prepare(job) == planned
        assert worker.run("evaluate", [job]) == ["finished"]
        assert worker._process is None


def test_what_jobs_share_is_looked_at_once_in_a_plan(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and rows of a grid, however many files they are; another pass looks anew."""
    looked: list[tuple[str, str]] = []
    look = finished_runs._look

    def count(kind: str, path: str) -> finished_runs.State:
        looked.append((kind, path))
        return look(kind, path)

    monkeypatch.setattr(finished_runs, "_look", count)
    job = Job(config, "", [], {})
    with Worker() as worker:
        assert worker.prepare(job) == worker.prepare(job)
        once = len(looked)
        assert once == len(set(looked))
        assert worker.run("evaluate", [job]) == ["finished"]
    assert len(looked) == 2 * once


def _alter(path: Path) -> None:
    """Change a file's last byte but one, and neither its size nor the time of its last change."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _files(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def _write_status(config: Config, state: Any) -> None:
    RunFolder(folder_of(config)).write_status(Status(state, "a reason"))


FILES: dict[str, Callable[[Path, Path], Any]] = {
    "a row": lambda root, run: _alter(root / "rows" / "train.jsonl"),
    "more rows": lambda root, run: write_rows(root / "rows" / "train-2.jsonl", ROWS),
    "no rows": lambda root, run: shutil.rmtree(root / "rows"),
    "weights": lambda root, run: _alter(root / "model" / "model.safetensors"),
    "a model's setting": lambda root, run: _alter(root / "model" / "config.json"),
    "a chat template": lambda root, run: (root / "model" / "chat_template.jinja").write_text("x"),
    "no tokenizer": lambda root, run: (root / "model" / "tokenizer.json").unlink(),
    "the template": lambda root, run: _alter(root / "prompt.jinja"),
    "the adapter": lambda root, run: _alter(run / "adapter" / "adapter_model.safetensors"),
    "no adapter": lambda root, run: shutil.rmtree(run / "adapter"),
    "no scores": lambda root, run: (run / "evaluation" / "demo_science.json").unlink(),
    "an outcome": lambda root, run: _alter(run / "evaluation" / "demo_science.items.jsonl"),
    "no stored score": lambda root, run: _files(run / "evaluation" / "scores", "*.json").unlink(),
    "no digests": lambda root, run: (run / "digests.json").unlink(),
    "lost events": lambda root, run: (run / "events.jsonl").unlink(),
    "no run": lambda root, run: shutil.rmtree(run),
}


@pytest.mark.parametrize("change", FILES)
def test_a_file_that_changed_is_the_workers_to_judge(config: Config, change: str) -> None:
    """Also where its size and time of change stay the same."""
    FILES[change](Path(config.output_dir).parent, folder_of(config))
    assert FinishedRuns().find(config) is None


@pytest.mark.parametrize("state", ["failed", "diverged", "interrupted", "running"])
def test_a_run_that_did_not_finish_is_the_workers_to_judge(config: Config, state: str) -> None:
    """Whatever stands in its folder."""
    _write_status(config, state)
    assert FinishedRuns().find(config) is None


SETTINGS: dict[str, Callable[[Config], Any]] = {
    "shots": lambda c: setattr(c.evaluation, "num_fewshot", 1),
    "limit": lambda c: setattr(c.evaluation, "limit", 3),
    "another task": lambda c: setattr(c.evaluation, "tasks", ["demo_science", "sciq"]),
    "no base": lambda c: setattr(c.evaluation, "base", False),
    "rank": lambda c: setattr(c.lora, "r", 4),
    "length": lambda c: setattr(c.training, "max_length", 399),
    "model": lambda c: setattr(c.model, "path", "random://tiny"),
    "outputs": lambda c: setattr(c, "output_dir", f"{c.output_dir}-2"),
    "nonsense": lambda c: setattr(c.sweep, "job_timeout", -1.0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_another_setting_is_the_workers_to_judge(config: Config, name: str) -> None:
    """A record answers for the settings that it was made with."""
    SETTINGS[name](config)
    assert FinishedRuns().find(config) is None


def test_how_a_sweep_is_kept_and_named_is_no_setting_of_a_run(config: Config) -> None:
    """Its name, its place in MLflow and a dry run leave a finished run what it is."""
    config.sweep.name, config.sweep.dry_run, config.tracking.enabled = "other", True, False
    config.report_dir = "elsewhere"
    assert FinishedRuns().find(config) is not None


def test_a_base_score_that_is_gone_is_the_workers_to_judge(
    config: Config, session: Session
) -> None:
    """It is shared by all runs of a user, and not in the run's folder."""
    stored = {path: path.read_bytes() for path in (cache_dir() / "evaluations").glob("*.json")}
    for path in stored:
        path.unlink()
    assert FinishedRuns().find(config) is None
    for path, content in stored.items():
        path.write_bytes(content)


def test_a_folder_with_another_evaluation_is_the_workers_to_write(
    config: Config, session: Session
) -> None:
    """Both evaluations are stored, but the run's folder shows the last that was asked for."""
    other = build_config(OmegaConf.structured(config))
    other.evaluation.limit = 3
    run(other, session)
    assert FinishedRuns().find(other) is not None
    assert FinishedRuns().find(config) is None
    run(config, session)
    assert FinishedRuns().find(config) is not None
    assert FinishedRuns().find(other) is None


def _install(folder: Path) -> None:
    (folder / "torch-9.9.9.dist-info").mkdir()


@pytest.mark.parametrize("change", ["version", "gpu", "launcher"])
def test_another_installation_or_machine_is_the_workers_to_judge(
    config: Config, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions are part of a run's name, and so is what the GPU computes in."""
    if change == "version":
        monkeypatch.syspath_prepend(str(tmp_path))
        assert FinishedRuns().find(config) is not None
        _install(tmp_path)
    elif change == "gpu":
        (tmp_path / "nvidia0").touch()
        monkeypatch.setattr("finetune.models.devices.GPU_FILES", (f"{tmp_path}/nvidia*",))
    else:
        monkeypatch.setattr("finetune.distributed.is_launched", lambda: True)
    assert FinishedRuns().find(config) is None


def test_a_record_that_was_altered_is_none(config: Config) -> None:
    """As one that is half written."""
    for path in (cache_dir() / "finished").glob("*.json"):
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["record"]["seen"] = []
        path.write_text(json.dumps(stored), encoding="utf-8")
    assert FinishedRuns().find(config) is None
    for path in (cache_dir() / "finished").glob("*.json"):
        path.write_text("{", encoding="utf-8")
    assert FinishedRuns().find(config) is None


def test_an_input_that_changed_while_it_ran_is_not_recorded(
    config: Config, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record says what the run was made from, not what is there by its end."""
    monkeypatch.setattr(run_jobs, "find_changes", lambda *_: ["data.path has changed"])
    for path in (cache_dir() / "finished").glob("*.json"):
        path.unlink()
    run(config, session)
    assert FinishedRuns().find(config) is None


def inputs_of(config: Config, session: Session) -> Inputs:
    inputs = preflight.prepare(config, session).inputs
    assert inputs is not None
    return inputs


def test_what_the_hub_may_change_is_not_recorded(config: Config, session: Session) -> None:
    """A branch and a task of the hub are asked for again; a commit stays what it is."""
    inputs, records, commit = inputs_of(config, session), FinishedRuns(), "a" * 40
    assert records.look(config, inputs, []) is not None
    at_hub = replace(inputs, source=replace(inputs.source, revision=commit))
    config.model.path, config.model.revision = "owner/model", "main"
    assert records.look(config, at_hub, []) is None
    config.model.revision = commit
    assert records.look(config, at_hub, []) is not None
    config.model.trust_remote_code = True  # whose code may lie in another repository
    assert records.look(config, at_hub, []) is None
    config.model.trust_remote_code = False
    rows = replace(inputs.data[0], revision=commit)
    assert records.look(config, replace(at_hub, data=[rows]), []) is None
    config.evaluation.tasks = ["sciq"]
    assert records.look(config, at_hub, []) is None
    config.evaluation.data_files = {"sciq": {"test": str(Path(config.output_dir) / "file.jsonl")}}
    assert records.look(config, at_hub, []) is not None


def test_own_tasks_are_recorded_with_all_that_they_are_read_from(
    config: Config, session: Session, tmp_path: Path
) -> None:
    """Task files and their data are watched; with a data set of the hub or code, nothing is."""
    inputs, records = inputs_of(config, session), FinishedRuns()
    rows = write_rows(tmp_path / "asked.jsonl", [{"question": "q"}])
    task = tmp_path / "tasks" / "mine.yaml"
    task.parent.mkdir()
    local = f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {rows}}}\n"
    task.write_text(local, encoding="utf-8")
    config.evaluation.tasks, config.evaluation.include_path = ["mine"], str(task.parent)
    seen = records.look(config, inputs, [])
    assert seen is not None
    assert {str(rows), str(task), str(task.parent)} <= {one.path for one in seen}
    for path, text in ((rows, '{"question": "other"}\n'), (task, f"{local}num_fewshot: 1\n")):
        path.write_text(text, encoding="utf-8")
        assert records.look(config, inputs, []) != seen
        seen = records.look(config, inputs, [])
    task.write_text("task: mine\ndataset_path: somebody/mine\n", encoding="utf-8")
    assert records.look(config, inputs, []) is None
    task.write_text(local, encoding="utf-8")
    config.evaluation.trust_task_code = True
    assert records.look(config, inputs, []) is None


def test_a_glob_that_finds_more_files_is_another_state(tmp_path: Path) -> None:
    """As a file of rows that becomes a link to another."""
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / name, ROWS)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    before = [
        finished_runs._look("rows", str(tmp_path / name)) for name in ("*.jsonl", "link.jsonl")
    ]
    write_rows(tmp_path / "c.jsonl", ROWS)
    (tmp_path / "link.jsonl").unlink()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "b.jsonl")
    after = [
        finished_runs._look("rows", str(tmp_path / name)) for name in ("*.jsonl", "link.jsonl")
    ]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert finished_runs._look("rows", str(tmp_path / "none*.jsonl")) != before[0]


NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "transformers", "lm_eval", "peft", "datasets"):
            raise RuntimeError(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
sys.argv = ["finetune", *sys.argv[1:]]
from finetune.__main__ import main
main()
"""


@pytest.mark.slow
def test_a_grid_that_is_all_finished_imports_no_torch(tmp_path: Path, finetune: Command) -> None:
    """The same table, report and exit code, with MLflow and without a worker."""
    grid = [*(one for one in TINY if "tracking" not in one), "lora.r=2,4", "--multirun"]
    first = finetune(*grid)
    assert first.returncode == 0, first.stderr
    (report,) = tmp_path.glob("multirun_reports/*/results.csv")
    before = report.read_text(encoding="utf-8")
    report.unlink()
    again = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *grid],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished already") == 2
    assert report.read_text(encoding="utf-8") == before
    assert first.stdout.partition("lora.r  status")[2] in again.stdout
    assert "lora.r  status" in first.stdout
