"""`make cases CASES=FOLDER`: run scripts of commands that once failed, and judge what comes out.

A script below FOLDER/safety judges itself: it prints `ok` or `FAIL`, or ends with 77 where it
cannot run. One below FOLDER/commands only shows what happens; what must come out stands here, and
of the files below FOLDER/data in data_cases.py.
Not collected by pytest: the scripts belong to nobody's checkout, and take minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.data_cases import CASES, case_name, run_data_case

Run = Callable[[Path], tuple[str, str]]
LONGEST_SECONDS = 1800
SKIPPED = 77  # the exit code of a script that cannot run here


@dataclass(frozen=True)
class Expected:
    """What must and must not be printed, and what a check of the files must not find."""

    printed: Sequence[str] = ()  # regular expressions
    never: Sequence[str] = ()
    check: Callable[[Path], Iterator[str]] | None = None
    prepare: Callable[[Path, Path], None] | None = None  # script, working folder


def _metrics(*names: str) -> Callable[[Path], Iterator[str]]:
    def check(folder: Path) -> Iterator[str]:
        texts = [p.read_text(encoding="utf-8") for p in folder.glob("outputs/*/evaluation/*.json")]
        yield from (f"no {name} in any score" for name in names if name not in "".join(texts))

    return check


def _one_quantity(folder: Path) -> Iterator[str]:
    """Yield the rows in which base, tuned, difference and interval are not of one quantity."""
    (table,) = folder.glob("multirun_reports/*/results.csv")
    for row in csv.DictReader(table.open(encoding="utf-8")):
        metric = "lambada_openai/perplexity"
        low, value, high = (float(row[f"{metric}_diff{end}"]) for end in ("_low", "", "_high"))
        tuned, base = float(row[metric]), float(row["lambada_openai/base_perplexity"])
        if not low <= value <= high or abs(tuned - base - value) > 1e-6 * abs(base):
            yield f"{row['run']}: {base} -> {tuned} differs by {value} in [{low}, {high}]"
    if "-42" in (table.parent / "report.md").read_text(encoding="utf-8"):
        yield "the report shows a mean log-likelihood as perplexity"


def _reports_name(*words: str) -> Callable[[Path], Iterator[str]]:
    def check(folder: Path) -> Iterator[str]:
        pages = [p.read_text(encoding="utf-8") for p in folder.glob("multirun_reports/*/report.md")]
        yield from (f"no report shows {word}" for word in words if word not in "".join(pages))

    return check


def _tied_model(script: Path, folder: Path) -> None:
    """Make the model with tied weights and its two adapters beside the script's outputs."""
    shutil.copytree(script.parent / "data", folder / "data")
    tiny = ("model=tiny", "tracking=none", "evaluation=none", "sweep.dry_run=true")
    for command in (
        ("-m", "finetune", *tiny), (str(script.parent / "mkmodel.py"),),
        (str(script.parent / "mkad.py"),),
    ):  # fmt: skip
        environment = {**os.environ, "FINETUNE_CACHE": str(folder / "cache")}
        subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True
        )


COMMANDS = {
    "01": Expected(
        (r"(?s)(rc=0.*){3}",),
        ("daemonic", "rc=1"),
        _metrics("mcc_stderr", "f1_stderr", "perplexity_stderr"),
    ),
    "02": Expected(
        (r"champion: optimizer\.lr = (0\.01|1e-2)",), ("No run is significantly better",)
    ),
    "03": Expected((r"lambada_openai/perplexity",), check=_one_quantity),
    "05": Expected(
        (r"registered models: \[<RegisteredModel",),
        ("No run has been scored beside its base yet",),
        _reports_name("word_perplexity", "acc", "exact_match"),
    ),
    "06": Expected((r"\[q_proj\]", r"\[q_proj,v_proj\]", r"rows\[/v2\]\.jsonl"), ("MarkupError",)),
    "07": Expected((r"rc=0", r"runs: \[('[^']*'(, )?){3}\]"), ("not found",)),
    "08": Expected((r"restore|tracking\.experiment=|rc=0",), ("must be in the 'active' state",)),
    "09": Expected((r"rc=0|restore",), ("rc=1",)),
    "10": Expected((r"(?m)^team\.db$|MLFLOW_TRACKING_URI",), (r"(?m)^mlflow\.db$",)),
    "11": Expected((r"(?s)(== .*?sqlite:///.*?){4}",), ("send it with",)),
    "12": Expected((r"interval",), ("AttributeError", "TypeError")),
    "14": Expected((r"lora\.rank|rank.*lora", r"typo\.yaml", r"typo2\.yaml", r"eight"), ()),
    "15": Expected((r"(?s)(r4-.*r8-.*){2}",), ("ConfigKeyError", "several values are a sweep")),
    "17": Expected((r"rc=[02]",), ("KeyError",), prepare=_tied_model),
    "18": Expected((r"rc=[02]", r"my_task")),
    "19": Expected((r"rc=0",), ("extraneous input",)),
}


def main() -> None:
    """Run the scripts and print a table; exit code 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=Path, help="a folder with commands/, safety/ and data/")
    parser.add_argument("names", nargs="*", help="only these, such as safety/07 (default: all)")
    parser.add_argument("--models", type=Path, help="a folder of the models that data/ is tried on")
    given = parser.parse_args()
    cases = find_cases(given.cases, given.models)
    wanted = [one for one in cases if _is_named(one[0], given.names)]
    table, failed = Table("case", "result", "seconds", "why", box=None), 0
    for name, run in wanted:
        started = time.monotonic()
        result, why = _in_folder(run)
        failed += result == "failed"
        print(f"{name}: {result} {why}", flush=True)
        table.add_row(name, result, f"{time.monotonic() - started:.0f}", why)
    Console(width=160, markup=False).print(table)
    print(f"{len(wanted) - failed} passed or skipped, {failed} failed")
    sys.exit(1 if failed or not wanted else 0)


def find_cases(folder: Path, models: Path | None) -> list[tuple[str, Run]]:
    """Return the name of each case, and what runs it in an empty folder."""
    scripts = sorted(p for kind in ("commands", "safety") for p in folder.glob(f"{kind}/*.sh"))
    found: list[tuple[str, Run]] = [
        (f"{script.parent.name}/{script.stem}", partial(run_script, script.resolve()))
        for script in scripts
        if script.name != "lib.sh"
    ]
    files = folder / "data"
    return found + [
        (case_name(case), partial(run_data_case, case, files, models))
        for case in CASES
        if (files / case.file).exists()
    ]


def _is_named(case: str, names: Sequence[str]) -> bool:
    return not names or any(case.startswith(one) for one in names)


def _in_folder(run: Run) -> tuple[str, str]:
    """Run one case in an empty folder; return passed, failed or skipped, and why."""
    folder = Path(tempfile.mkdtemp(prefix="case-"))
    try:
        return run(folder)
    except subprocess.SubprocessError as error:
        return "failed", str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_script(script: Path, folder: Path) -> tuple[str, str]:
    """Run one script in a folder, and judge it."""
    if script.parent.name == "safety":
        return _judge_safety(*_run(script, folder))
    expected = COMMANDS.get(script.name.partition("-")[0])
    if expected is None:
        return "skipped", "what must come out of it does not stand here"
    if expected.prepare is not None:
        expected.prepare(script, folder)
    problems = list(_find_problems(expected, _run(script, folder)[1], folder))
    return ("failed", "; ".join(problems)) if problems else ("passed", "")


def _run(script: Path, folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", str(script), sys.executable], cwd=folder, env={**os.environ, "PY": sys.executable},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        timeout=LONGEST_SECONDS,
    )  # fmt: skip
    return done.returncode, done.stdout


def _judge_safety(code: int, text: str) -> tuple[str, str]:
    if code == SKIPPED:
        return "skipped", "it cannot run on this machine"
    last = text.strip().splitlines()[-1:] or [""]
    is_ours = re.search(r"Traceback[\s\S]*?finetune[/.]", text)  # not the script's own
    if code == 0 and last[0].startswith("ok") and not is_ours:
        return "passed", last[0]
    return "failed", f"exit code {code}: {' / '.join(text.strip().splitlines()[-3:])}"


def _find_problems(expected: Expected, text: str, folder: Path) -> Iterator[str]:
    tail = json.dumps(text[-300:])
    for pattern in expected.printed:
        if not re.search(pattern, text):
            yield f"{pattern!r} is not printed; the end was {tail}"
    for pattern in ("Traceback", *expected.never):
        if re.search(pattern, text):
            yield f"{pattern!r} is printed"
    if expected.check is not None:
        try:
            yield from expected.check(folder)
        except (OSError, ValueError, LookupError) as error:  # a file that should be there is not
            yield f"what it left cannot be checked: {error}"


if __name__ == "__main__":
    main()
