"""The laws of the rooms: imports go one way, and the command starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.commands import COMMANDS

PACKAGE = Path(__file__).parents[1] / "finetune"
# Ground modules at the root, then the rooms, in the order of imports.
GROUND = [
    "problems", "streams", "signals", "escaping", "substitution", "commands", "files", "home",
    "logs", "confirmation",
]  # fmt: skip
ROOMS = [
    "statistics", "config", "tracking", "reporting", "models", "data", "training", "evaluation",
    "pipeline", "inference", "sweeps",
]  # fmt: skip
ORDER = [
    *GROUND, "statistics", "config", "distributed", *ROOMS[2:], "api", *COMMANDS, "__main__"
]  # fmt: skip
# What a report is made from: the files of runs, and no code that makes them.
READ_BY_REPORTS = {*GROUND, "statistics", "config", "tracking", "reporting"}
WITHOUT_TORCH = [
    *GROUND, "statistics", "config", "distributed", "tracking", "reporting", "sweeps", "api",
    "pipeline.jobs", "pipeline.finished_runs", "training.grouping", "training.checkpoints",
    "models.devices", "report", "memory", "runs", "cache", "sync", "rerun", "ui",
]  # fmt: skip
HEAVY = "{'torch', 'transformers', 'mlflow', 'lm_eval', 'datasets'}"


def name_of(path: Path) -> str:
    """Return a module's name below the package, e.g. `data.sources`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {
    name_of(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" and "demo" not in path.parts
}


def place_of(module: str) -> str:
    """Return the room of a module, or the module itself where it stands at the root."""
    return module.partition(".")[0]


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module == "finetune" or node.module.removeprefix("finetune.") in ROOMS:
            prefix = f"{node.module}.".removeprefix("finetune.")
            yield from (prefix + alias.name for alias in node.names)
        elif node.module.startswith("finetune."):
            yield node.module.removeprefix("finetune.")


def found_imports(module: str) -> set[str]:
    return {name for name in imported_modules(MODULES[module]) if place_of(name) != "demo"}


def test_every_module_has_its_place() -> None:
    """What stands at the root is a ground module, the API or a command; the rest is in a room."""
    assert {place_of(module) for module in MODULES} == set(ORDER)
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == {
        *ROOMS,
        "demo",
    }


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_its_own_room_and_those_before_it(module: str) -> None:
    """The order of the rooms is the order of reading; training and evaluation are independent."""
    place = place_of(module)
    allowed = {*ORDER[: ORDER.index(place)]} | ({place} if place in ROOMS else set())
    if place == "reporting":
        allowed &= READ_BY_REPORTS
    if place == "evaluation":
        allowed -= {"training"}
    assert {place_of(name) for name in found_imports(module)} <= allowed


@pytest.mark.parametrize("room", ROOMS)
def test_within_a_room_imports_make_no_circle(room: str) -> None:
    """A module of a room can be read after those that it imports."""
    waiting = {
        module: {name for name in found_imports(module) if place_of(name) == room}
        for module in MODULES
        if place_of(module) == room
    }
    while free := [module for module, needed in waiting.items() if not needed & set(waiting)]:
        for module in free:
            del waiting[module]
    assert waiting == {}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_nothing_by_itself(room: str) -> None:
    """Its `__init__` is empty, but for names that old model cards import."""
    text = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
    imports = [
        node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert room == "models" or text == ""
    assert all(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in imports[:1])


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["lora.rr=1"]])
def test_the_command_starts_without_torch(arguments: list[str]) -> None:
    """Help, the composed config and a refusal come at once."""
    code = (
        "import sys\n"
        f"sys.argv = ['finetune', *{arguments!r}]\n"
        "from finetune.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_outlives_all_workers_imports_no_torch() -> None:
    """The sweep's process, the API and the commands that only read files stay small."""
    modules = [
        module for module in MODULES
        if any(module == free or module.startswith(f"{free}.") for free in WITHOUT_TORCH)
    ]  # fmt: skip
    code = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(f'finetune.{name}')\n"
        f"    assert not {HEAVY} & set(sys.modules), name"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_test_double_is_used_outside_tests() -> None:
    """Attributes of libraries are substituted by a module that says so."""
    users = [p.name for p in PACKAGE.rglob("*.py") if "unittest" in p.read_text(encoding="utf-8")]
    assert users == []


# What holds for a process and is no matter of a job: the installation, and what is done once.
PROCESS_CACHES = {
    "files._digest_of": "a file's bytes, by its size and times",
    "hub.is_reached": "asked once, and then told to the libraries",
    "hub._ask_commit": "all jobs are planned at one commit",
    "identity._installed_version": "the installation",
    "identity._lock_digest": "the installation",
    "distributed.join": "a process joins once",
    "schema._pickled_defaults": "the schema",
    "task_folder._parse_known": "a file's content, by its size and times",
    "task_index.find_task_file": "the installation",
    "task_index.stock_index": "the installation",
}


def test_what_a_job_needs_is_kept_by_the_session() -> None:
    """No module keeps models, rows or tasks; what a process caches is listed with its reason."""
    found = {
        f"{path.stem}.{node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        for one in node.decorator_list
        if ast.unparse(one).startswith(("lru_cache", "cache", "functools."))
        and "cached_property" not in ast.unparse(one)
    }
    assert found == set(PROCESS_CACHES)


def test_no_module_is_long() -> None:
    """A file that outgrows 400 lines holds two ideas."""
    long = [p.name for p in PACKAGE.rglob("*.py") if len(p.read_text().splitlines()) > 420]
    assert long == []
