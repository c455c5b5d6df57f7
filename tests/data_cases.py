"""Data files as people have them, and what must come out of each; run by `run_cases.py`.

A case trains two steps on a file, and reads the tokens that `finetune.preview --json` prints of the
same settings. Cases of a model that is not in the folder of models are skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

TRAINING = (
    "evaluation=none", "tracking=none", "training.max_steps=2", "training.batch_size=2",
)  # fmt: skip
LONGEST_SECONDS = 600
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class DataCase:
    """A file with its settings: which rows are used, what is printed and what is learned."""

    file: str
    settings: str = "data=local"
    used: int | None = None  # rows
    code: int = 0
    printed: Sequence[str] = ()  # regular expressions
    check: Callable[[Rows], Iterator[str]] | None = None
    model: str | None = None  # a folder in the folder of models; None: random://tiny


def learned(row: Mapping[str, Any]) -> str:
    """Return the learned tokens, with the spaces and newlines that tokenizers write as letters."""
    pairs = zip(row["tokens"], row["labels"], strict=True)
    text = "".join(token for token, label in pairs if label != -100)
    for letter, character in {"▁": " ", "Ġ": " ", "Ċ": "\n", "<0x0A>": "\n"}.items():
        text = text.replace(letter, character)
    return text


def each(problem: str, is_right: Callable[[Mapping[str, Any]], bool]) -> Callable[..., Any]:
    """Return a check of every row, whose problem names the row."""

    def check(rows: Rows) -> Iterator[str]:
        yield from (f"row {row['row']}: {problem}" for row in rows if not is_right(row))

    return check


def learns(*texts: str, never: str = "\0") -> Callable[..., Any]:
    """Return a check that every row learns texts, and does not learn another."""
    return each(
        f"it learns not {texts}, or {never!r}",
        lambda row: all(text in learned(row) for text in texts) and never not in learned(row),
    )


def holds(*texts: str) -> Callable[..., Any]:
    """Return a check that texts are in the tokens of the first row."""

    def check(rows: Rows) -> Iterator[str]:
        yield from (f"{text!r} is not in the first row" for text in texts if text not in _all(rows))

    return check


def _all(rows: Rows) -> str:
    return str(rows[0]["text"])


def ends_once(begin: str | None, end: str) -> Callable[..., Any]:
    """Return a check that special tokens are at the ends of a row and nowhere else."""
    return each(
        f"{begin or ''}{end} is not there once",
        lambda row: (
            row["tokens"].count(end) == 1
            and row["tokens"][-1] == end
            and (begin is None or row["tokens"].count(begin) == 1)
        ),
    )


def uses(*numbers: int) -> Callable[..., Any]:
    """Return a check that rows are used, by their numbers."""

    def check(rows: Rows) -> Iterator[str]:
        missing = set(numbers) - {row["row"] for row in rows}
        if missing:
            yield f"rows {sorted(missing)} are left out"

    return check


def _first_learned(row: Mapping[str, Any]) -> str:
    pairs = zip(row["tokens"], row["labels"], strict=True)
    return next(str(token) for token, label in pairs if label != -100)


def _all_is_learned(rows: Rows) -> Iterator[str]:
    tokens = sum(len(row["labels"]) for row in rows)
    if tokens < 40_000:
        yield f"{tokens} tokens of 4 texts of 12,000 characters are left"


NO_PREFIX = each("its answer begins with a space", lambda row: _first_learned(row)[0] != "▁")
UNDATED = each("it has today's date", lambda row: f"{datetime.now():%d %b %Y}" not in row["text"])
ONE_OF_EACH = ends_once("<s>", "</s>")
JOINT = "mistral_tiny"
OUTPUT_ALONE = "data=local ++data.columns.output=response"
MESSAGES = "data=chat ++data.columns.messages=conversations"

CASES = (
    DataCase(
        "21-reasoning-content.jsonl", "data=chat", 8, model="qwen3_tiny",
        check=learns("<think>\nOne more.\n</think>\n\n"),
    ),
    DataCase("04-weight-0.jsonl", "data=chat", 8, check=learns("Paris.", never="London.")),
    DataCase(
        "02-openai-tools.jsonl", "data=chat", 8, model="qwen3_tiny",
        check=holds('"name": "lift"', "<tool_call>\n", "<tool_response>\ndone"),
    ),
    DataCase("05c-list.json", used=8, model=JOINT, check=NO_PREFIX),
    DataCase("05-lines.json", used=8, model="addeos_tiny", check=ends_once(None, "</s>")),
    DataCase("13c-text-with-eos.jsonl", "data=text", 8, model=JOINT, check=ONE_OF_EACH),
    DataCase("13b-eos-already-in-output.jsonl", used=8, model=JOINT, check=ONE_OF_EACH),
    DataCase("08-dolly.jsonl", OUTPUT_ALONE, 8, printed=("context",)),
    DataCase("08-dolly.jsonl", used=8, check=holds("Book 0 is by Ann.")),
    DataCase("16-system-history.json", used=8, check=holds("Be brief.", "A car.")),
    DataCase(
        "27-two-turns.jsonl", "data=chat", 4, model="llama3_2_tiny",
        check=UNDATED,
    ),
    DataCase("12b-lone-surrogate.jsonl", used=8, printed=(r"1 dropped \(.*first: row 1\)",)),
    DataCase("05-lines.json", code=2, model="noeos_tiny", printed=("end-of-sequence",)),
    DataCase("22-plain-multi.jsonl", "data=chat", 8, model="gemma_tiny", check=holds("Be brief.")),
    DataCase("26-one-multi-turn-row.jsonl", "data=chat", 100, model="qwen3_tiny"),
    DataCase("22-plain-multi.jsonl", "data=chat", 8, model="qwen3_tiny"),
    DataCase("21c-think-single.jsonl", "data=chat", 8, model="deepseek_r1_distill_tiny"),
    DataCase("30-answer-begins-with-newline.jsonl", "data=chat model=smollm2_135m", 8),
    DataCase("29-empty-system.jsonl", "data=chat", 8),
    DataCase("01-sharegpt.json", MESSAGES, 8),
    DataCase("01-sharegpt.json", used=8),
    DataCase("10l-messages-json-in-csv.csv", "data=chat", 1),
    DataCase("02b-openai-tools-mixed.jsonl", "data=chat", 12),
    DataCase("03-content-parts.jsonl", "data=chat", 8),
    *(
        DataCase(name, used=8)
        for name in ("05-lines.json", "05b-pretty.jsonl", "05c-list.jsonl", "06-data-key.json")
    ),
    DataCase("07c-numeric-output.jsonl", used=8),
    DataCase("09-prompt-completion.jsonl", used=8),
    DataCase("23-folder"),
    DataCase("28-save-to-disk"),
    # The long field is the prompt's, so that nothing of the row would be learned.
    DataCase("10f-huge-field.csv", used=1, printed=(r"prompt alone fills.*first: row 1\)",)),
    DataCase("10-semicolon.csv", used=2),
    DataCase("10g-tabs.tsv", used=1),
    DataCase("11-alpaca.jsonl.gz"),
    DataCase("20-corpus.txt", "data=text"),
    DataCase("37-upper.JSONL", used=4),
    DataCase("10b-latin1.csv", code=2, printed=("line 2", "UTF-8", r"data\.encoding=")),
    DataCase("10c-cp1252.jsonl", code=2, printed=("line 1", "UTF-8", r"data\.encoding=")),
    DataCase("12d-trailing-comma.json", code=2, printed=("line 1",)),
    DataCase("14b-long-text.jsonl", "data=text", 4, check=_all_is_learned),
    DataCase("19-turn-orders.jsonl", "data=chat", check=uses(1, 8, 9, 10)),
    # What was right before.
    DataCase("07-input-null.jsonl", check=uses(1)),
    DataCase("07b-numeric-output.csv", used=2),
    DataCase("10e-quoted-newlines.csv", used=2, check=holds("Say\ntwo lines", 'two, "quoted"')),
    DataCase("10h-index-column.csv", used=2),
    DataCase("10j-blank-lines.csv", used=2),
    DataCase("10k-bom-crlf.csv", used=2),
    DataCase("12-odd-characters.jsonl", used=4),
    DataCase("12c-nan.jsonl", check=uses(3)),
    DataCase("12e-duplicate-key.jsonl", used=1),
    DataCase("14-long-rows.jsonl"),
    DataCase("15-duplicates.jsonl", used=40),
    DataCase("17-conversations-role-content.jsonl", MESSAGES, 8),
    *(
        DataCase(name, "data=chat")
        for name in ("25a-messages.parquet", "25b-messages-union.parquet")
    ),
    DataCase("25d-large-string-dictionary.parquet"),
    DataCase("31-nul.csv", used=2),
    DataCase("31c-na-strings.csv", check=holds("Which country is NA?", "Namibia")),
)  # fmt: skip


def case_name(case: DataCase) -> str:
    """Return the name that is typed to run the case, the same for all settings of a file."""
    return f"data/{case.file}"


def run_data_case(
    case: DataCase, files: Path, models: Path | None, folder: Path
) -> tuple[str, str]:
    """Train on a case's file in an empty folder; return passed, failed or skipped, and why."""
    words = [*case.settings.split(), f"data.path={(files / case.file).resolve()}"]
    if case.model is not None:
        if models is None or not (models / case.model).is_dir():
            return "skipped", f"there is no model {case.model}; name their folder: --models"
        words.append(f"model.path={(models / case.model).resolve()}")
    elif "model=" not in case.settings:
        words.append("model=tiny")
    done = _call("finetune", [*words, *TRAINING], folder)
    problems = list(_find_problems(case, done.returncode, done.stdout))
    if case.check is not None and not problems:
        shown = _call("finetune.preview", [*words, "--json"], folder, stderr=subprocess.DEVNULL)
        problems += case.check([json.loads(line) for line in shown.stdout.splitlines()])
    return ("failed", "; ".join(problems[:3])) if problems else ("passed", "")


def _call(
    module: str, words: Iterable[str], folder: Path, stderr: int = subprocess.STDOUT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words], cwd=folder, stdout=subprocess.PIPE, stderr=stderr,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True, errors="replace",
        timeout=LONGEST_SECONDS,
    )  # fmt: skip


def _find_problems(case: DataCase, code: int, text: str) -> Iterator[str]:
    tail = json.dumps(text[-300:], ensure_ascii=False)
    if code != case.code:
        yield f"exit code {code} for {case.code}; the end was {tail}"
        return
    if "Traceback" in text:
        yield "a traceback is printed"
    used = "" if case.used is None else rf"\b{case.used} used"
    for pattern in filter(None, (used, *case.printed)):
        if not re.search(pattern, text):
            found = re.search(r"data: .*", text)
            yield f"{pattern!r} is not printed, but {found[0] if found else tail}"
