"""Files of a run and a sweep damaged, and every command called as users call it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_damaged import damage

pytestmark = pytest.mark.slow

SETTINGS = (
    "model=tiny", "data.num_examples=16", "training.max_length=400", "training.max_steps=4",
    "evaluation.limit=4", "lora.r=2",
)  # fmt: skip
# One damage for each file, in turns; test_damaged.py does all to all, in one process.
CASES = (
    ("outputs/*/config.yaml", "missing"), ("outputs/*/overrides.yaml", "empty"),
    ("outputs/*/environment.json", "truncated"), ("outputs/*/status.json", "not UTF-8"),
    ("outputs/*/events.jsonl", "top bit"), ("outputs/*/data.json", "empty"),
    ("outputs/*/training.json", "top bit"), ("outputs/*/samples.json", "truncated"),
    ("outputs/*/digests.json", "not UTF-8"),
    ("outputs/*/adapter/adapter_config.json", "missing"),
    ("outputs/*/adapter/adapter_model.safetensors", "truncated"),
    ("outputs/*/evaluation/demo_science.json", "empty"),
    ("outputs/*/evaluation/demo_science.items.jsonl", "not UTF-8"),
    ("outputs/*/evaluation/scores/*.json", "top bit"),
    ("multirun_reports/*/sweep.yaml", "not UTF-8"), ("multirun_reports/*/results.csv", "empty"),
    ("multirun_reports/*/mlflow.json", "truncated"),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A folder in which a sweep of one run has finished, and a copy of how it was."""

    folder: Path
    copy: Path

    def restore(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.copy, self.folder, symlinks=True)

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ, "FINETUNE_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=self.folder, env=environment, input="hello\n", capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Return a place where the sweep has finished, made once."""
    root = tmp_path_factory.mktemp("damaged")
    place = Place(root / "place", root / "copy")
    place.folder.mkdir()
    done = place.call("finetune", *SETTINGS)
    assert done.returncode == 0, done.stderr
    shutil.copytree(place.folder, place.copy, symlinks=True)
    yield place
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize(("pattern", "how"), CASES)
def test_no_command_ends_in_a_traceback_and_the_same_one_mends(
    finished: Place, pattern: str, how: str
) -> None:
    """Report, list, sync, export, chat and rerun say what is wrong; the sweep makes it anew."""
    finished.restore()
    path = next(iter(sorted(finished.folder.glob(pattern))))
    (run,) = (finished.folder / "outputs").iterdir()
    (report,) = (finished.folder / "multirun_reports").iterdir()
    damage(path, how)
    commands = [("finetune.report", str(report)), ("finetune.runs",), ("finetune.sync",)]
    if pattern.startswith("outputs"):
        commands += [(f"finetune.{name}", str(run)) for name in ("export", "chat", "rerun")]
    for command in commands:
        done = finished.call(*command)
        assert "Traceback" not in done.stdout + done.stderr, (command, done.stderr)
        assert done.returncode in (0, 1, 2), (command, done.stderr)
    again = finished.call("finetune", *SETTINGS)
    assert "Traceback" not in again.stderr
    assert again.returncode == 0, again.stdout + again.stderr
