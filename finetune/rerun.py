"""Repeat a run in a new folder and compare the results: `python -m finetune.rerun RUN`.

The settings are those of the run's config.yaml: neither the folder of `--config-dir` nor the config
groups that it was composed from are needed.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune import signals
from finetune.config.foreign_runs import find_rerun_problems, find_settings_to_type
from finetune.config.schema import build_config, flatten
from finetune.pipeline.jobs import Job
from finetune.problems import Refused, first_line
from finetune.reporting.reproduction import compare_runs, find_other_conditions, is_conduct
from finetune.reporting.tables import print_text
from finetune.streams import keep_streams
from finetune.sweeps.run_sweep import run_sweep
from finetune.tracking.run_folder import REMEDY, RunFolder
from finetune.tracking.run_names import find_run

SWEEP = "rerun"


def main() -> None:
    """Rerun and compare.

    Exit codes: 0 identical or within tolerance, 1 different, 2 refused, 75 or 130 stopped.
    """
    keep_streams()
    parser = argparse.ArgumentParser(prog="python -m finetune.rerun", description=__doc__)
    parser.add_argument("run", type=find_run, help="the run's folder, outputs/NAME, or its id")
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE",
        help="override of the run that would run code, confirmed by typing it again: "
        "model.trust_remote_code=true",
    )  # fmt: skip
    parser.add_argument("--into", type=Path, help="output folder (default: a new one in reruns/)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    before = RunFolder(args.run)
    try:
        refuse_foreign(before, args.overrides)
        job = build_job(before, args.into)
        with signals.stops_raised():
            code = run_sweep([job], job.overrides, resumes=describe_again(before, job))
    except Refused as refused:
        print("\n".join(refused.problems), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:  # outside the sweep, which ends by itself
        sys.exit(signals.exit_code(stop))
    if code != 0:
        print(f"the rerun ended with exit code {code}: see above", file=sys.stderr)
        sys.exit(code)
    sys.exit(report(before, Path(job.config.output_dir)))


def describe_again(before: RunFolder, job: Job) -> str:
    """Return what resumes a rerun: the same command without `--into` would begin another one."""
    words = ["--into", job.config.output_dir]
    return f"{shlex.join(['python', '-m', 'finetune.rerun', str(before.path), *words])} resumes it"


def refuse_foreign(before: RunFolder, typed: Sequence[str]) -> None:
    """Raise Refused where the run's files set what only the command line may set."""
    if problem := before.find_problem("overrides.yaml"):
        raise Refused([f"{before.path / 'overrides.yaml'} is damaged: {problem}; {REMEDY}"])
    again = f"python -m finetune.rerun {shlex.quote(str(before.path))}"
    overrides = [o for o in before.read_overrides() if not is_conduct(o)]
    settings = flatten(before.read_settings())
    own = {name: value for name, value in settings if not is_conduct(name)}
    needed = [*overrides, *find_settings_to_type(own, overrides, typed)]
    if problems := list(find_rerun_problems(needed, typed, again)):
        raise Refused(problems)


def build_job(before: RunFolder, into: Path | None) -> Job:
    """Return a job with the settings of a run, but another folder and no tracking.

    Raises:
        Refused: the run's settings are damaged, or not of this version.
    """
    try:
        composed = OmegaConf.create(before.read_settings())
        if into is None:
            Path("reruns").mkdir(exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f"{before.name}-", dir="reruns"))
            into = Path("reruns", made.name)  # Python 3.12 and later return an absolute path
        OmegaConf.update(composed, "output_dir", str(into))
        OmegaConf.update(composed, "report_dir", str(into / "report"))
        OmegaConf.update(composed, "tracking.enabled", value=False)
        OmegaConf.update(composed, "sweep.name", SWEEP)
        OmegaConf.update(composed, "sweep.dry_run", value=False)
        OmegaConf.update(composed, "workers", _find_workers(before), merge=False)
        config = build_config(composed)
    except (OmegaConfBaseException, AttributeError, TypeError) as error:
        path = before.path / "config.yaml"
        raise Refused([f"{path} cannot be read: {first_line(error)}"]) from None
    return Job(config, OmegaConf.to_yaml(composed), before.read_overrides(), {})


def _find_workers(before: RunFolder) -> dict[str, Any]:
    """Return settings of one worker here, with the run's number of threads, which changes bits."""
    environment = before.read_json("environment.json")
    threads = environment.get("threads") if isinstance(environment, dict) else None
    return {"threads": threads} if isinstance(threads, int) and threads > 0 else {}


def report(before: RunFolder, into: Path) -> int:
    """Print the differences between a run and its rerun, and the verdict; return the exit code."""
    (config,) = into.glob("*/config.yaml")
    after = RunFolder(config.parent)
    for difference in find_other_conditions(before, after):
        print_text(f"not the same: {difference}")
    damage = before.find_damage() | before.find_weights_damage(thorough=True)
    for name, problem in damage.items():
        print(f"damaged: {before.path / name}: {problem}")
    found = compare_runs(before, after)
    print(found.verdict)
    print_text(found.describe())
    print(f"rerun: {after.path}")
    return int(found.verdict == "different")


if __name__ == "__main__":
    main()
