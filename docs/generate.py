"""Write the pages of the reference that are made of the code: settings, commands, messages.

`python docs/generate.py` writes them into docs/reference. The settings are in the repository, where
tests/test_docs.py compares them; the others are made for the site.
"""

from __future__ import annotations

import ast
import copy
import inspect
import io
import os
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from omegaconf import MISSING as UNSET

import finetune
from finetune.commands import COMMANDS
from finetune.config import rules, schema
from finetune.config.methods import METHODS
from finetune.config.optimizers import supported
from finetune.config.paths import conf_dir
from finetune.config.schema import PER_RUN, Config

REFERENCE = Path(__file__).parent / "reference"
PACKAGE = Path(finetune.__file__).parent
NOTE = "<!-- Written by `make docs` from the code: change docs/generate.py, or the code. -->\n"
HOLE = "…"  # in a message, what a value is put into
SHORTEST_MESSAGE = 25  # characters; shorter texts are parts of others
# Rooms whose ValueError reaches the user as a refusal.
REFUSING = ("config", "data", "evaluation", "statistics", "models", "tracking")
AREAS = {
    "config": "Settings and overrides", "data": "Rows to train on", "models": "Models and devices",
    "evaluation": "Tasks and questions", "statistics": "Comparison and objective",
    "training": "Training", "pipeline": "Checks before the start", "sweeps": "Sweeps and workers",
    "tracking": "Files and MLflow", "reporting": "Reports and lists", "inference": "Trained models",
    "": "Commands and the Python API",
}  # fmt: skip


def main() -> None:
    """Write every page."""
    for name, render in PAGES.items():
        (REFERENCE / name).write_text(render(), encoding="utf-8")


def render_settings() -> str:
    """Return the page of all settings: a table for each section, and its options."""
    parts = [SETTINGS_HEAD]
    comments = read_comments()
    for section in fields(Config):
        value = getattr(Config(), section.name)
        if not is_dataclass(value):
            continue
        parts.append(f"## {section.name}\n\n{inspect.getdoc(type(value))}\n")
        parts.append(_options(section.name))
        parts.append(_table(section.name, value, comments[type(value).__name__]))
    mix = _table("data.mix.N", schema.SourceConfig(), comments["SourceConfig"])
    parts.append(f"## data.mix\n\nEach of several sources of rows, N from 0.\n\n{mix}")
    parts.append(
        f"## experiment\n\nSettings of several groups at once.\n\n{_options('experiment')}"
    )
    folders = comments["Config"]
    rest = [one for one in fields(Config) if one.name in ("output_dir", "report_dir")]
    rows = [f"| `{one.name}` | `{one.default}` | {folders[one.name]} |" for one in rest]
    parts.append(
        "\n".join(["## Folders\n", "| setting | default | meaning |", "|---|---|---|", *rows, ""])
    )
    return "\n".join(parts)


def read_comments() -> dict[str, dict[str, str]]:
    """Return the comment beside each field of the schema, by class and field."""
    source = inspect.getsource(schema)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {
        one.start[0]: one.string.lstrip("# ") for one in tokens if one.type == tokenize.COMMENT
    }
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = dict(_field_comments(node, lines))
    return found


def _field_comments(node: ast.ClassDef, lines: dict[int, str]) -> Iterator[tuple[str, str]]:
    last = max(lines)
    for one, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            end = following.lineno if following else (one.end_lineno or last) + 1
            texts = [lines[number] for number in range(one.lineno, end) if number in lines]
            kept = [text for text in texts if not text.startswith("fmt:")]
            yield one.target.id, " ".join(kept)


def _options(group: str) -> str:
    files = sorted((conf_dir() / group).glob("*.yaml"))
    if not files:
        return ""
    rows = [f"| `{group}={file.stem}` | {_option_values(file)} |" for file in files]
    return "\n".join(["| option | sets |", "|---|---|", *rows, ""])


def _option_values(file: Path) -> str:
    values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    chosen = [_chosen(one) for one in values.pop("defaults", []) if isinstance(one, dict)]
    if values.pop("dimensions", None):  # sizes of the base, a dozen
        values["dimensions"] = HOLE
    flat = [
        f"`{key}`, which must be typed" if value == UNSET else f"`{key}={_shown(value)}`"
        for key, value in schema.flatten(values)
    ]
    return ", ".join([*chosen, *flat]) or "the defaults below"


def _chosen(line: dict[str, str]) -> str:
    """Return an option that a file chooses in another group, as it would be typed."""
    ((group, option),) = line.items()
    return f"`{group.removeprefix('override ').lstrip('/')}={option}`"


def _table(prefix: str, section: Any, comments: dict[str, str]) -> str:
    rows = [
        f"| `{prefix}.{one.name}` | {_default(one)} | {_cell(find_values(prefix, one))} "
        f"| {_cell(comments[one.name])}{_notes(prefix, one)} |"
        for one in fields(section)
    ]
    return "\n".join(["| setting | default | values | meaning |", "|---|---|---|---|", *rows, ""])


def _default(one: Field[Any]) -> str:
    value = one.default if one.default_factory is MISSING else one.default_factory()
    return "must be set" if value == UNSET else f"`{_shown(value)}`"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    return " ".join(str(value).split()).replace("|", "\\|")


def _cell(text: str) -> str:
    """Return a comment as a cell, in which brackets are no link and tags no HTML."""
    escaped = re.sub(r"((<[^>]+>)+)", r"`\1`", text).replace("|", "\\|")
    return re.sub(r"([\[\]*])", r"\\\1", escaped)


def find_values(prefix: str, one: Field[Any]) -> str:
    """Return the values that a setting takes: what the rules answer to a wrong one, or its type."""
    if (prefix, one.name) == ("optimizer", "name"):
        return ", ".join(supported())
    kind = str(one.type).removesuffix(" | None")
    if kind == "bool":
        return "true, false"
    problem = _refusal(prefix, one.name, {"str": "?", "int": -1, "float": -1.0}.get(kind))
    found = re.search(r"; (?:it must be |did you mean .*?Known: |Known: |it is )(.*)$", problem)
    if found is not None:
        return found[1]
    plain = {"str": "text", "int": "a whole number", "float": "a number"}
    return plain.get(kind, "a list" if kind.startswith("list") else "a mapping")


def _refusal(prefix: str, name: str, wrong: Any) -> str:
    section = getattr(_valid(), prefix, None)
    if section is None or wrong is None:
        return ""
    config = _changed(_valid(), prefix, name, wrong)
    key = f"{prefix}.{name} is "
    return next((one for one in rules.find_problems(config) if one.startswith(key)), "")


def _valid() -> Config:
    config = Config()
    config.data.path = "rows.jsonl"
    return config


def _changed(config: Config, prefix: str, name: str, value: Any) -> Config:
    changed = copy.deepcopy(config)
    setattr(getattr(changed, prefix), name, value)
    return changed


def _notes(prefix: str, one: Field[Any]) -> str:
    notes = []
    if refused := _refused_with(prefix, one):
        notes.append(f"Refused, since it has no effect, with {refused}.")
    if PER_RUN in one.metadata:
        notes.append("May differ between runs that are trained together.")
    return "".join(f"<br>{note}" for note in notes)


def _refused_with(prefix: str, one: Field[Any]) -> str:
    """Return the methods, or the ways to start workers, with which a changed setting is refused."""
    if prefix not in ("peft", "lora", "workers"):
        return ""
    place, name, values = (
        ("workers", "launch", rules.LAUNCHES)
        if prefix == "workers"
        else ("peft", "method", tuple(METHODS))
    )
    if one.name == name:
        return ""
    config = _changed(_valid(), prefix, one.name, _another(one))
    refused = [
        value for value in values
        if any(
            problem.startswith(f"{prefix}.{one.name} ") and "no effect" in problem
            for problem in rules.find_problems(_changed(config, place, name, value))
        )
    ]  # fmt: skip
    return f"`{place}.{name}` {', '.join(refused)}" if refused else ""


def _another(one: Field[Any]) -> Any:
    """Return another value of a setting than its default."""
    if one.type == "bool":
        return not one.default
    numbers = {"int": 2, "int | None": 2, "float": 0.5, "float | None": 0.5}
    return ["x"] if str(one.type).startswith("list") else numbers.get(str(one.type), "x")


def render_commands() -> str:
    """Return the page of all commands, with the help of each."""
    parts = [COMMANDS_HEAD]
    for name, meaning in COMMANDS.items():
        parts.append(
            f"## {name}\n\n{meaning[0].upper()}{meaning[1:]}.\n\n```text\n{read_help(name)}\n```\n"
        )
    return "\n".join(parts)


def read_help(name: str) -> str:
    """Return what `python -m finetune.NAME --help` prints at 90 columns."""
    printed = io.StringIO()
    argv = patch.object(sys, "argv", [name, "--help"])
    width = patch.dict(os.environ, {"COLUMNS": "90"})
    with argv, width, redirect_stdout(printed), redirect_stderr(printed), suppress(SystemExit):
        import_module(f"finetune.{name}").main()
    return printed.getvalue().strip()


def render_messages() -> str:
    """Return the page of all refusals, by area: the message and its remedy."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.parent.name if path.parent != PACKAGE else ""
        for text in find_messages(path, room):
            message, _, remedy = text.partition("; ")
            found.setdefault(room, {}).setdefault(message, remedy)
    parts = [MESSAGES_HEAD]
    for room in sorted(found, key=list(AREAS).index):
        rows = [
            f"| {_code(message)} | {_code(remedy)} |"
            for message, remedy in sorted(found[room].items())
        ]
        parts.append(
            "\n".join([f"## {AREAS[room]}\n", "| message | remedy |", "|---|---|", *rows, ""])
        )
    return "\n".join(parts)


def _code(text: str) -> str:
    """Return a message as a cell of a table, in which nothing is markup."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return re.sub(r"([\[\]*_`])", r"\\\1", " ".join(escaped.split()))


def find_messages(path: Path, room: str) -> Iterator[str]:
    """Yield the texts of a module's refusals, each value in them as `…`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _raises(node, room):
            yield from _texts(node.args)
        elif isinstance(node, ast.FunctionDef) and "problem" in node.name:
            for one in ast.walk(node):
                if isinstance(one, (ast.Yield, ast.Return)) and one.value is not None:
                    yield from _texts([one.value])


def _raises(call: ast.Call, room: str) -> bool:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    return name == "Refused" or (name == "ValueError" and room in REFUSING)


def _texts(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        items = node.elts if isinstance(node, (ast.List, ast.Tuple)) else [node]
        for item in items:
            text = read_text(item)
            if len(text.replace(HOLE, "")) >= SHORTEST_MESSAGE and " " in text:
                yield text


def read_text(node: ast.expr) -> str:
    """Return a string of the source, each value that is put into it as `…`."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(read_text(value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return read_text(left) + read_text(right)
    return HOLE


SETTINGS_HEAD = f"""{NOTE}
# Settings

Any of them is typed as `KEY=VALUE`, or written into a YAML file of a group
([a project of your own](../howto/project.md)). `python -m finetune --help` prints them as your
command composes them, and `--cfg job` as YAML. *Default* is the schema's; an option of a group may
set another, such as `data=demo`, which is in force if no other is typed. *Values* are what the
rules answer to a wrong one. A setting that would have no effect is refused where that is certain,
else its line says when. What enters the name of a run: [identity](../explanation/identity.md).
"""
COMMANDS_HEAD = f"""{NOTE}
# Commands

`python -m finetune` (or `finetune`) trains and scores, and `--help` lists groups and settings.
`finetune NAME ...` and `python -m finetune.NAME ...` are the same. Exit codes:
[files, columns, events, exit codes](files.md#exit-codes).
"""
MESSAGES_HEAD = f"""{NOTE}
# Messages

The refusals in the code, with `…` in place of values; those that are composed of parts are shown
in parts. Nothing was started when one is printed (exit code 2). Search this page for the words
around the values. What is asked most often: [FAQ](../faq.md).
"""

PAGES: dict[str, Callable[[], str]] = {
    "settings.md": render_settings,
    "commands.md": render_commands,
    "messages.md": render_messages,
}

if __name__ == "__main__":
    main()
