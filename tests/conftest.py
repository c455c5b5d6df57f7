"""What several tests share: their own cache, small rows, and the command as a user calls it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from finetune.config.schema import Config, DataConfig, ModelConfig
from finetune.models.base_model import find_model, load_tokenizer
from finetune.pipeline.jobs import Job

# pytest-xdist sets it in its workers; tables and texts would be as narrow as that terminal.
os.environ.pop("COLUMNS", None)

ROOT = Path(__file__).parents[1]
Command = Callable[..., subprocess.CompletedProcess[str]]

# The tiny model, MLflow off, few rows: one run of seconds.
TINY = (
    "model=tiny", "tracking=none", "data.num_examples=16", "evaluation.limit=12",
    "training.max_length=400",
)  # fmt: skip


def last_of_each(arguments: Sequence[str]) -> list[str]:
    """Leave out what a later override of the same setting replaces: typed twice is refused."""
    last = {one.partition("=")[0] if "=" in one else str(i): i for i, one in enumerate(arguments)}
    return [arguments[i] for i in sorted(last.values())]


def write_rows(path: Path, rows: list[object]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_tiny(folder: Path, session: Any = None, **changes: Any) -> Path:
    """Train the tiny model on a few rows in this process, and return the run's folder."""
    from finetune.pipeline import run_jobs

    config = Config(model=ModelConfig(path="random://tiny"), output_dir=str(folder))
    config.data = DataConfig(path="package://finetune/demo/rows.jsonl", num_examples=8)
    config.training.max_length, config.training.batch_size = 400, 2
    config.optimizer.lr = 0.02
    config.evaluation.tasks = []
    config = replace(config, **changes)
    job = Job(config, OmegaConf.to_yaml(OmegaConf.structured(config)), [], {})
    assert run_jobs.run([job], session) == ["finished"]
    (status,) = folder.glob("*/status.json")
    return status.parent


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tiny model of a module's fixtures where its quick tests look for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def heeded_interrupts() -> None:
    """Let commands heed SIGINT: a shell that runs the tests in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """Take off the handlers that a test's command set up: they write to a stream that is closed."""

    def loggers() -> list[logging.Logger]:
        known = logging.root.manager.loggerDict.values()
        return [logging.root, *(one for one in known if isinstance(one, logging.Logger))]

    before = {one.name: list(one.handlers) for one in loggers()}
    yield
    for one in loggers():
        for handler in one.handlers[:]:
            if type(handler) is logging.StreamHandler and handler not in before.get(one.name, []):
                one.removeHandler(handler)


@pytest.fixture(autouse=True)
def own_cache(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Keep the tiny model and its scores out of the user's cache; slow tests may use it."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def finetune(tmp_path: Path) -> Command:
    """Return the command, called as `python -m finetune ...` in an empty folder."""

    def call(*arguments: str, module: str = "finetune") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *last_of_each(arguments)],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )

    return call


@pytest.fixture(scope="session")
def template_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Migrate one empty store, which takes seconds, for all tests to copy."""
    from finetune.tracking.mlflow_store import make_sqlite_store

    store = tmp_path_factory.mktemp("store") / "mlflow.db"
    make_sqlite_store(store)
    return store


@pytest.fixture
def uri(template_store: Path, tmp_path: Path) -> str:
    shutil.copy(template_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the tiny model's tokenizer."""
    tiny = ModelConfig(path="random://tiny")
    return load_tokenizer(tiny, find_model(tiny))


@pytest.fixture
def shared_data() -> Path:
    """Return the folder of public data that is no part of the project."""
    folder = Path(os.environ.get("FINETUNE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_absolute():
        folder = ROOT / folder
    if not folder.is_dir():
        pytest.skip(f"no public test data in {folder}; set FINETUNE_TEST_DATA")
    return folder
