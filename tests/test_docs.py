"""The documentation's commands are accepted, its snippets run, and its reference is the code's."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

import finetune
from docs.generate import (
    AREAS,
    HOLE,
    PAGES,
    REFERENCE,
    find_messages,
    read_comments,
    render_commands,
    render_messages,
    render_settings,
)
from finetune import api
from finetune.__main__ import main
from finetune.commands import COMMANDS
from finetune.config import rules
from finetune.config.command_line import is_multirun, read_command_line
from finetune.config.overrides import find_override_problems
from finetune.config.paths import conf_dir
from finetune.config.schema import Config, register
from finetune.problems import Refused
from finetune.reporting.rows import list_columns
from finetune.signals import STOPPED_BY_MACHINE, STOPPED_BY_PERSON
from finetune.sweeps.grid import compose_grid
from finetune.tracking.events import FIELDS

register()
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = sorted(set(DOCS.rglob("*.md")) - {REFERENCE / name for name in PAGES})
FENCE = re.compile(
    r"""^(?:\ *<!--\ (?P<mark>.*)\ -->\n)?  # exit=2, skip="REASON", stdin="TEXT"
    (?P<indent>\ *)```(?P<language>\w+)(?:\ title="(?P<file>[^"]+)")?\n
    (?P<text>(?s:.*?))^\ *```$""",
    re.MULTILINE | re.VERBOSE,
)
OURS = re.compile(r"[A-Z_]+=\S+ ")  # a variable before a command
COMPLETION = 'eval "$(finetune -sc install=bash)"'
SHOWS = re.compile(
    r"python -m finetune\.(preview|memory|cache)\b(?!.*(qwen3_tiny|--remove|\.\.\.))"
)
NEEDS_FILE = ("there is no file", "names no file")
TINY = [
    "model=tiny", "data.num_examples=16", "evaluation.limit=8", "training.max_steps=2",
    "tracking=none",
]  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, the comment before it, and the file that it shows."""

    page: str
    language: str
    mark: str
    file: str | None
    text: str

    @property
    def is_skipped(self) -> bool:
        return re.search(r'skip="[^"]{10,}"', self.mark) is not None

    def commands(self) -> list[str]:
        """Return the lines that run this project."""
        lines = [OURS.sub("", line.strip().lstrip("!")) for line in self.text.splitlines()]
        return [line for line in lines if line.startswith("python -m finetune")]


def read_blocks() -> Iterator[Block]:
    for path in WRITTEN:
        for found in FENCE.finditer(path.read_text(encoding="utf-8")):
            lines = found["text"].splitlines(keepends=True)
            text = "".join(line.removeprefix(found["indent"]) for line in lines)
            name, mark = str(path.relative_to(DOCS)), found["mark"] or ""
            yield Block(name, found["language"], mark, found["file"], text)


BLOCKS = list(read_blocks())
LINES = [
    pytest.param(block, line, id=f"{block.page}: {line[10:60]}")
    for block in BLOCKS
    if block.language in ("bash", "python")
    for line in block.commands()
]
SNIPPETS = [block for block in BLOCKS if block.language == "python" and not block.is_skipped]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with all files that the pages show, which is the current one."""
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:
        if block.file is not None:
            path = tmp_path / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def test_there_is_something_to_check() -> None:
    """The patterns above find what a reader would copy, in every how-to."""
    pages = {block.page for block in BLOCKS if block.commands()}
    shown = {f"howto/{path.name}" for path in (DOCS / "howto").glob("*.md")}
    assert shown - pages == {"howto/index.md", "howto/python.md"}
    assert len(LINES) > 40
    assert len(SNIPPETS) >= 2
    fences = sum(path.read_text(encoding="utf-8").count("```") for path in WRITTEN)
    assert fences == 2 * len(BLOCKS)


@pytest.mark.parametrize(("block", "line"), LINES)
def test_a_command_is_accepted(block: Block, line: str, files: Path) -> None:
    """Each command's flags are parsed, and its settings composed and checked for their ranges."""
    words = shlex.split(line.partition(";")[0].partition("||")[0], comments=True)
    problems = find_problems(words[2], words[3:])
    assert bool(problems) == ("exit=2" in block.mark), problems


def find_problems(module: str, words: list[str]) -> list[str]:
    """Return what a command would refuse before it reads a file."""
    if words == ["--version"]:
        return []
    if module == "finetune":
        return find_main_problems(words)
    args = parse(module, words)
    is_one = module.endswith(("preview", "rerun"))
    return compose(getattr(args, "overrides", []), None, is_sweep=not is_one)


def find_main_problems(words: list[str]) -> list[str]:
    args, _ = read_command_line(words)
    is_sweep, folder = is_multirun(args), args.config_dir
    problems = find_override_problems(args.overrides, multirun=is_sweep, config_dir=folder)
    return problems or compose(args.overrides, folder, is_sweep=is_sweep or bool(args.cfg))


def compose(overrides: list[str], folder: str | None, *, is_sweep: bool) -> list[str]:
    try:
        grid = compose_grid(overrides, folder, is_sweep=is_sweep)
    except Refused as refused:
        return refused.problems
    found = [problem for job in grid.jobs for problem in rules.find_problems(job.config)]
    return [one for one in found if not any(text in one for text in NEEDS_FILE)]


class Parsed(Exception):
    """The arguments of a command, before it does anything."""


def parse(module: str, words: list[str]) -> Any:
    """Return what a further command reads from its arguments; `report` has no parser."""
    if module == "finetune.report":
        assert len(words) == 1
        return None
    reads = argparse.ArgumentParser.parse_known_args

    def stop(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(reads(parser, words)[0])

    with (
        patch.object(argparse.ArgumentParser, "parse_args", stop),
        patch.object(argparse.ArgumentParser, "parse_intermixed_args", stop),
        pytest.raises(Parsed) as parsed,
    ):
        import_module(module).main()
    return parsed.value.args[0]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page} {block.language}")
def test_no_command_is_left_out(block: Block) -> None:
    """Other commands are targets of the Makefile, complete words, or say why they are not run."""
    if block.language != "bash" or block.is_skipped:
        return
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in block.text.splitlines():
        target = re.fullmatch(r"make ([a-z-]+)(?: && \. \.venv/bin/activate)?", line)
        is_target = target is not None and f"\n{target[1]}:" in makefile
        assert (
            is_target or OURS.sub("", line).startswith("python -m finetune") or line == COMPLETION
        )


def test_the_shell_completes_words(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What the page has one put into ~/.bashrc registers `finetune`, and Tab knows settings."""
    monkeypatch.setattr(sys, "argv", ["finetune", "-sc", "install=bash"])
    main()
    assert "-F hydra_bash_completion finetune" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["finetune", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", "finetune training.ba")
    monkeypatch.setenv("COMP_POINT", "20")
    main()
    assert "training.batch_size=" in capsys.readouterr().out


@pytest.mark.parametrize("block", SNIPPETS, ids=lambda block: block.page)
def test_a_snippet_uses_what_there_is(block: Block) -> None:
    """Python snippets compile, and take public names of the package."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "finetune" or node.attr in api.__all__


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page} {block.language}")
def test_a_shown_file_can_be_read(block: Block) -> None:
    """YAML and JSON lines are what they are called; every block has a language that is checked."""
    assert block.language in ("bash", "python", "text", "yaml", "json")
    if block.language == "yaml":
        assert isinstance(yaml.safe_load(block.text), dict)
    if block.language == "json":
        assert all(isinstance(yaml.safe_load(line), dict) for line in block.text.splitlines())


def test_the_settings_page_is_up_to_date() -> None:
    """It is the one generated page that the repository has; `make docs` writes it anew."""
    assert (REFERENCE / "settings.md").read_text(encoding="utf-8") == render_settings()


def test_pages_of_commands_and_messages_are_made() -> None:
    """Each command has its help, and each area its messages."""
    commands, messages = render_commands(), render_messages()
    assert all(f"## {name}\n" in commands and f"finetune.{name}" in commands for name in COMMANDS)
    assert "| lora.r is … | lora.init=… needs an even one |" in messages
    assert messages.count("\n## ") > 8


def test_every_setting_is_explained() -> None:
    """Each field has a comment and a line on the page, each option of a group is named."""
    page = (REFERENCE / "settings.md").read_text(encoding="utf-8")
    comments = read_comments()
    for section in fields(Config):
        value = getattr(Config(), section.name)
        for key in fields(value) if not isinstance(value, str) else ():
            assert comments[type(value).__name__][key.name]
            assert f"| `{section.name}.{key.name}` |" in page
    for option in conf_dir().glob("*/*.yaml"):
        assert f"`{option.parent.name}={option.stem}`" in page


def test_a_setting_without_effect_says_so() -> None:
    """The page names the methods and the ways to start workers that refuse a setting."""
    page = (REFERENCE / "settings.md").read_text(encoding="utf-8")
    (dora,) = [line for line in page.splitlines() if line.startswith("| `lora.use_dora` |")]
    (time,) = [line for line in page.splitlines() if line.startswith("| `workers.time` |")]
    assert "`peft.method` adalora, ia3, prefix_tuning, prompt_tuning, full" in dora
    assert "`workers.launch` local, ray" in time


def test_messages_are_found_in_each_way_they_are_written(tmp_path: Path) -> None:
    """Refusals that are raised, yielded or returned, with the values in them left out."""
    path = tmp_path / "module.py"
    path.write_text(
        "def find_problems(x):\n"
        '    yield f"lora.r is {x}; it must be at least 1"\n'
        '    return [f"optimizer.name is {x}; " + nearest(x)]\n'
        "def load(x):\n"
        '    raise Refused([f"there is no run in {x}; name another"])\n'
        '    raise ValueError("an internal mistake of ours")\n',
        encoding="utf-8",
    )
    found = set(find_messages(path, "sweeps"))
    assert f"lora.r is {HOLE}; it must be at least 1" in found
    assert f"there is no run in {HOLE}; name another" in found
    assert not any("internal" in text for text in found)
    assert any("internal" in text for text in find_messages(path, "config"))


def test_every_room_has_an_area() -> None:
    """The messages of a new room have a heading."""
    rooms = {path.parent.name for path in (ROOT / "finetune").glob("*/*.py")} - {"demo"}
    assert rooms <= set(AREAS)


def test_files_page_is_complete() -> None:
    """Columns, events with their fields, and exit codes are those of the code."""
    page = (REFERENCE / "files.md").read_text(encoding="utf-8")
    for column in list_columns([{"run": "", "status": "", "reason": ""}]):
        assert f"`{column}`" in page
    for event, names in FIELDS.items():
        cells = ", ".join(f"`{name}`" for name in names)
        assert f"| `{event}` | {cells} |" in page
    for code in (STOPPED_BY_MACHINE, STOPPED_BY_PERSON):
        assert f"| {code} |" in page


def test_every_page_is_in_the_navigation() -> None:
    """A page that nothing leads to is not written for anybody."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"([\w/]+\.md)$", text, re.MULTILINE))
    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert listed == written | {f"reference/{name}" for name in PAGES}


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Its commands in their order, on the tiny model and with few rows."""
    shown = [one for one in BLOCKS if one.page == "tutorial.md" and not one.is_skipped]
    for block in shown:
        for line in block.commands():
            runs = sorted((tmp_path / "outputs").glob("*"))
            words = [str(runs[0]) if word == "RUN" else word for word in shlex.split(line)[1:]]
            is_training = words[1] == "finetune"
            typed = re.search(r'stdin="([^"]+)"', block.mark)
            done = subprocess.run(
                [sys.executable, *words, *(TINY if is_training else [])], cwd=tmp_path,
                input=typed[1] if typed else "", capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == (2 if "exit=2" in block.mark else 0), done.stderr
    assert (tmp_path / "multirun_reports" / "first" / "report.html").is_file()
    assert (tmp_path / "exports" / "first" / "README.md").is_file()


@pytest.mark.slow
def test_commands_that_only_show_something_run(files: Path) -> None:
    """Previews of the example rows, memory and cache, as they stand on the pages."""
    shown = {line for block in BLOCKS for line in block.commands() if SHOWS.match(line)}
    assert len(shown) >= 4
    for line in sorted(shown):
        words = shlex.split(line, comments=True)[1:]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=files)
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.slow
def test_the_snippets_run(tmp_path: Path) -> None:
    """The Python page from top to bottom, in one process."""
    text = "".join(block.text for block in SNIPPETS if block.page == "howto/python.md")
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "lora.r is 0; it must be at least 1" in done.stdout
    assert finetune.read_results(next((tmp_path / "multirun_reports").iterdir())).best
