"""Records of finished runs, by which a repeated command finds them without importing torch.

A record is filed under a digest of the job's settings and of the environment (packages, this
code, GPUs). It holds the run's inputs as planned, and the state (size, times, inode) of every
file that planning read. Where anything differs, the job is planned by the worker. What the hub
may have changed is never recorded: models and rows without a commit, and tasks from the hub.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune import distributed
from finetune.config import rules
from finetune.config.inputs import DataSource, Inputs, Source
from finetune.config.paths import local_path
from finetune.config.schema import CONDUCT, TEMPLATE_FILE, Config, ModelConfig, SourceConfig, marked
from finetune.evaluation.task_folder import find_read, is_local
from finetune.files import Damaged, digest, read_json, write_atomic
from finetune.home import cache_dir
from finetune.models import devices
from finetune.tracking.run_files import read_entries
from finetune.tracking.run_folder import RunFolder

log = logging.getLogger("finetune")

RECORD = 2  # raised when a record would hold something else
COMMIT = re.compile(r"[0-9a-f]{40}")
MODEL_FILES = (".safetensors", ".json", ".model", ".jinja", ".py")
MOST_FILES = 10_000  # in a folder of rows; of a larger one nothing is recorded

State = list[int] | str | None  # of a file, or of all files of a folder; None: unknown
Looked = dict[tuple[str, str], State]  # by kind and path


class FinishedRuns:
    """The records that are valid in this process's environment, as it was at its start."""

    def __init__(self) -> None:
        self._environment = _describe_environment()

    @cached_property
    def _is_kept(self) -> bool:
        # Elsewhere a GPU cannot be detected without torch.
        return sys.platform in ("linux", "darwin") and not distributed.is_launched()

    def find(self, config: Config, looked: Looked | None = None) -> Inputs | None:
        """Return the inputs of the finished run that answers a job; None if uncertain.

        Args:
            config: the job's.
            looked: states of files seen earlier in this pass over a grid, to which this call adds;
                None checks every file.
        """
        if not self._is_kept or rules.find_problems(config):
            return None
        try:
            stored = read_json(self._path(config), dict)
            if stored is None or stored.get("sha256") != digest(stored.get("record")):
                return None
            record = stored["record"]
            looked = {} if looked is None else looked
            for kind, path, state in record["seen"]:
                if (kind, path) not in looked:
                    looked[kind, path] = _look(kind, path)
                if looked[kind, path] != state:
                    return None
            inputs = _read_inputs(record["inputs"])
        except (Damaged, OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return inputs if _is_intact(RunFolder(inputs.folder)) else None

    def write(self, config: Config, inputs: Inputs, seen: Sequence[Seen]) -> None:
        """Record a run that has just finished.

        Args:
            config: the job's.
            inputs: as planned, and unchanged since.
            seen: what `look` returned before the inputs were verified.
        """
        record = {"inputs": _plain(inputs), "seen": [[*one] for one in seen]}
        path = self._path(config)
        text = json.dumps({"sha256": digest(record), "record": record})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text)
        except OSError as error:  # it is planned by a worker again
            log.debug("%s cannot be written: %s", path, error)

    def look(self, config: Config, inputs: Inputs, scores: Sequence[Path]) -> list[Seen] | None:
        """Return the state of all that a run depends on; None where it cannot be recorded.

        Args:
            config: the run's.
            inputs: as planned.
            scores: the files of its scores and its base's.
        """
        if not self._is_kept or not _is_local(config, inputs):
            return None
        seen = [
            Seen(kind, str(path), _look(kind, str(path)))
            for kind, path in _watched(config, inputs, scores)
        ]
        lost = any(one.state is None for one in seen)
        is_scored = all(path.is_file() for path in scores)
        return None if lost or not is_scored else seen

    def _path(self, config: Config) -> Path:
        conduct = marked(Config, CONDUCT)
        settings = {name: one for name, one in asdict(config).items() if name not in conduct}
        where = [os.getcwd(), os.path.abspath(config.output_dir)]
        name = digest([RECORD, settings, where, self._environment])
        return cache_dir() / "finished" / f"{name[:32]}.json"


@dataclass(frozen=True)
class Seen:
    """A file or folder that planning depends on, and its state."""

    kind: str  # of KINDS
    path: str
    state: State

    def __iter__(self) -> Any:
        return iter((self.kind, self.path, self.state))


def _is_local(config: Config, inputs: Inputs) -> bool:
    """Return whether model, rows and questions cannot change but in files of this machine."""
    asked = config.evaluation
    tasks = all(
        name in rules.OWN_TASKS or asked.data_files.get(name) or is_local(name, asked)
        for name in asked.tasks
    )
    pinned = [(inputs.source.revision, config.model.revision)]
    pinned += [(one.revision, one.settings.revision) for one in inputs.data]
    return (
        tasks
        and not config.model.trust_remote_code
        and not asked.trust_task_code
        and all(
            commit is None or COMMIT.fullmatch(typed or "") is not None for commit, typed in pinned
        )
    )


def _watched(config: Config, inputs: Inputs, scores: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return the files and folders that a run depends on, each with its kind."""
    model, asked = config.model, config.evaluation
    found = [("run", inputs.folder), *(("file", path) for path in scores)]
    if not model.path.startswith(
        "random://"
    ):  # a GGUF file, a folder, or neither where it is a hub's
        found.append(("file", local_path(model.path)))
    if not inputs.source.is_pinned:
        found.append(("model", Path(inputs.source.location)))
    if model.adapter is not None:
        found.append(("rows", Path(model.adapter)))
    templates = {
        "data.prompt_template": config.data.prompt_template,
        "model.chat_template": model.chat_template or "",
    }
    found += [("file", local_path(one)) for key, one in templates.items() if key in inputs.files]
    found += [("rows", local_path(one.settings.path)) for one in inputs.data]
    files = [file for task in asked.data_files.values() for file in task.values()]
    files += filter(None, (asked.questions, asked.select_questions, asked.fewshot_questions))
    if (asked.prompt_template or "").endswith(TEMPLATE_FILE):
        files.append(str(local_path(asked.prompt_template or "")))
    found += [("file", Path(file)) for file in files]
    if asked.include_path is not None:
        found.append(("rows", Path(asked.include_path).expanduser()))
        found += [("rows", path) for name in asked.tasks for path in find_read(asked, name)]
    return [(kind, path.absolute()) for kind, path in found]


def _look(kind: str, path: str) -> State:
    return KINDS[kind](Path(path))


def _file_state(path: Path) -> State:
    """Return a file's size, times and inode, of which any edit changes at least one."""
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    if path.is_dir():
        return "folder"
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _files_state(files: Sequence[Path], root: Path) -> State:
    if len(files) > MOST_FILES:
        return None
    return digest({os.path.relpath(one, root): _file_state(one) for one in files})


def _model_state(folder: Path) -> State:
    if not folder.is_dir():
        return "missing"
    return _files_state([one for one in folder.iterdir() if one.suffix in MODEL_FILES], folder)


def _tree_state(folder: Path) -> State:
    if not folder.is_dir():
        return _file_state(folder)
    files: list[Path] = []
    for place, _, names in os.walk(folder, followlinks=True):
        files += [Path(place, name) for name in names]
        if len(files) > MOST_FILES:
            return None
    return _files_state(files, folder)


def _rows_state(path: Path) -> State:
    """Return the state of rows: a file, a folder with all below it, or what a glob finds."""
    if not path.exists() and glob.has_magic(str(path)):
        return _files_state([Path(one) for one in glob.glob(str(path), recursive=True)], path)
    return _tree_state(path)


def _run_state(folder: Path) -> State:
    """Return a digest of the files of a run, with the scores that were asked for last."""
    return digest({name: one.sha256 for name, one in read_entries(folder).items()})


KINDS: dict[str, Callable[[Path], State]] = {
    "file": _file_state,
    "model": _model_state,
    "rows": _rows_state,
    "run": _run_state,
}


def _is_intact(run: RunFolder) -> bool:
    """Return whether a run's folder says that it finished, and nothing in it is damaged."""
    status = run.status()
    return status is not None and status.state == "finished" and not run.find_damage()


def _plain(inputs: Inputs) -> dict[str, Any]:
    return {**asdict(inputs), "folder": str(inputs.folder)}


def _read_inputs(stored: dict[str, Any]) -> Inputs:
    data = [
        DataSource(**{**one, "settings": SourceConfig(**one["settings"])}) for one in stored["data"]
    ]
    inputs = Inputs(**{**stored, "data": data, "folder": Path(stored["folder"])})
    return replace(inputs, source=Source(**stored["source"]), model=ModelConfig(**stored["model"]))


def _describe_environment() -> str:
    """Return a digest of the installation and the machine, as far as planning depends on them."""
    folders = dict.fromkeys(Path(os.path.abspath(one)) for one in sys.path)
    packages = [
        [path.name, path.stat().st_mtime_ns]
        for folder in folders
        for path in sorted((*folder.glob("*.dist-info"), *folder.glob("*.egg-info")))
    ]
    here = Path(__file__).parents[1]
    code = sorted(path for path in here.rglob("*") if path.suffix not in ("", ".pyc"))
    gpus = devices.find_gpu_files()
    return digest(
        {
            "python": sys.version,
            "packages": packages,
            "code": _files_state(code, here),
            "gpus": [gpus, devices.see_one_gpu(os.environ) if gpus else None],
            "node": platform.node() if gpus else None,
        }
    )
