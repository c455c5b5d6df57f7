"""`python -m finetune.rerun RUN`: run it again elsewhere and say whether it came out the same."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from finetune import signals
from finetune.config import CONDUCT, Config, marked
from finetune.foreign_runs import find_rerun_problems
from finetune.results import read_sides
from finetune.run_folder import RunFolder, file_digest, flatten, read_events
from finetune.streams import keep_streams

LOSS_TOLERANCE = 1e-3  # relative, at any step: what another kernel or machine may do
FLIP_TOLERANCE = 0.01  # share of answers


def main() -> None:
    """Rerun and compare; exit codes: 0 identical or within tolerance, 1 different, 2, 75, 130."""
    keep_streams()
    parser = argparse.ArgumentParser(prog="python -m finetune.rerun", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder, outputs/NAME")
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE",
        help="of the run, typed again since it would run code: model.trust_remote_code=true",
    )  # fmt: skip
    parser.add_argument("--into", type=Path, help="where to run it (default: a new folder reruns/)")
    given = parser.parse_args()
    before = RunFolder(given.run)
    if before.status() is None or not (before.path / "overrides.yaml").is_file():
        print(f"{given.run} is no run's folder: status.json or overrides.yaml is missing")
        sys.exit(2)
    overrides = yaml.safe_load((before.path / "overrides.yaml").read_text(encoding="utf-8")) or []
    overrides = [o for o in overrides if not is_conduct(str(o).lstrip("+").partition("=")[0])]
    again = f"python -m finetune.rerun {shlex.quote(str(given.run))}"
    problems = list(find_rerun_problems(overrides, given.overrides, again))
    if problems:
        print("\n".join(problems), file=sys.stderr)
        sys.exit(2)
    Path("reruns").mkdir(exist_ok=True)
    into = given.into or Path(tempfile.mkdtemp(prefix=f"{before.name}-", dir="reruns"))
    process = subprocess.Popen(
        [
            sys.executable, "-m", "finetune", *overrides, "tracking=none",
            f"output_dir={into}", f"report_dir={into / 'report'}",
        ]
    )  # fmt: skip
    try:
        with signals.stops_raised():
            code = process.wait()
    except KeyboardInterrupt as stop:  # a terminal's Ctrl-C has reached the other process too
        if signals.exit_code(stop) == signals.STOPPED_BY_MACHINE:
            process.terminate()
        code = process.wait()  # it writes a checkpoint
    if code != 0:
        print(f"the rerun ended with exit code {code}: see above", file=sys.stderr)
        sys.exit(code if code in (2, 75, 130) else 1)
    (status,) = into.glob("*/status.json")
    after = RunFolder(status.parent)
    for difference in find_other_conditions(before, after):
        print(f"not the same: {difference}")
    verdict, first = compare_runs(before, after)
    print(f"{verdict}: {first}" if first else verdict)
    print(f"rerun: {after.path}")
    sys.exit(1 if verdict == "different" else 0)


def is_conduct(key: str) -> bool:
    """Return whether a setting is the sweep's conduct; a rerun has its own."""
    return key.partition(".")[0] in marked(Config, CONDUCT)


def find_other_conditions(before: RunFolder, after: RunFolder) -> Iterator[str]:
    """Yield what differs in versions, hardware, code, settings and data."""
    one, other = (run.read_json("environment.json") or {} for run in (before, after))
    for package, number in one.get("versions", {}).items():
        now = other.get("versions", {}).get(package)
        if now != number:
            yield f"{package} was {number}, is {now}"
    for key in ("python", "platform", "threads", "processes", "gpu", "git_commit", "lock_digest"):
        if one.get(key) != other.get(key):
            yield f"{key} was {one.get(key)}, is {other.get(key)}"
    yield from _other_settings(before, after)
    datasets = [
        {event["digest"] for event in read_events(run.events) if event["event"] == "dataset"}
        for run in (before, after)
    ]
    if datasets[0] != datasets[1]:
        yield "the data's content"
    templates = [run.prompt_template for run in (before, after)]
    if all(path.is_file() for path in templates) and len(set(map(file_digest, templates))) > 1:
        yield "the prompt template's content"


def _other_settings(before: RunFolder, after: RunFolder) -> Iterator[str]:
    one, other = (
        dict(flatten(yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))))
        for run in (before, after)
    )
    for key in sorted(one.keys() | other.keys()):
        if not is_conduct(key) and one.get(key) != other.get(key):
            yield f"{key} was {one.get(key)}, is {other.get(key)}"


def compare_runs(before: RunFolder, after: RunFolder) -> tuple[str, str | None]:
    """Return identical, within tolerance, or different, with the first difference found."""
    losses = [_losses(run) for run in (before, after)]
    if losses[0].keys() != losses[1].keys():
        return "different", f"{len(losses[0])} steps became {len(losses[1])}"
    apart = [step for step in losses[0] if losses[0][step] != losses[1][step]]
    flips, questions = _flips(before, after)
    if not losses[0] and not questions:
        return "different", "there are neither losses nor answers to compare"
    weights = [[file_digest(path) for path in run.weights()] for run in (before, after)]
    if not apart and not flips and weights[0] == weights[1]:
        return "identical", None
    if apart:
        step = apart[0]
        first = f"the loss of step {step} was {losses[0][step]:.6g}, is {losses[1][step]:.6g}"
    else:
        first = f"{flips} of {questions} answers" if flips else "the weights' last bits"
    close = all(
        abs(losses[0][step] - losses[1][step]) <= LOSS_TOLERANCE * max(1.0, abs(losses[0][step]))
        for step in apart
    )
    is_within = close and flips <= FLIP_TOLERANCE * questions
    return ("within tolerance" if is_within else "different"), first


def _losses(run: RunFolder) -> dict[int, float]:
    return {
        event["step"]: event["value"]
        for event in read_events(run.events)
        if event["event"] == "metric" and event["key"] == "train/loss"
    }


def _flips(before: RunFolder, after: RunFolder) -> tuple[int, int]:
    """Return how many of all the tuned models' outcomes differ; a missing one counts."""
    flips = questions = 0
    for path in sorted(before.evaluation.glob("*.json")):
        for metric in (before.read_json(f"evaluation/{path.name}") or {})["tuned"]["metrics"]:
            one, other = (read_sides(run, path.stem, metric)["tuned"] for run in (before, after))
            questions += len(one)
            flips += sum(other.get(question) != value for question, value in one.items())
    return flips, questions


if __name__ == "__main__":
    main()
