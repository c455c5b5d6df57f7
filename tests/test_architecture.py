"""Imports go one way, and the command starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "finetune"
ORDER = [
    "streams", "signals",
    "escaping", "tables", "pages", "substitution",
    "resolvers", "metrics", "metric_names", "resampling", "devices",
    "compatibility",
    "config", "grammar", "commands", "command_line", "config_files", "composition",
    "inputs", "store_address", "methods", "optimizers", "ranges",
    "foreign_values", "foreign_configs", "hydra_overrides", "foreign_runs",
    "overrides", "distributed", "launchers", "grouping", "jobs",
    "home", "logs", "files", "arrow_cache", "events", "score_files", "run_files", "run_folder",
    "sweep_record", "lost_runs", "finished_runs", "live",
    "quantization", "fused_kernels", "hub", "chat_templates", "precision",
    "process_memory", "models", "adapters", "adalora",
    "attention",
    "saved_adapter", "turns", "text_sections", "plain_tokens", "chat_messages", "chat_tokens",
    "prompts",
    "text_lines", "json_stream", "json_rows", "file_formats", "data_paths", "rows",
    "row_messages", "row_shapes", "token_rows", "text_pieces",
    "token_cache", "row_encoding", "row_draw", "row_counts",
    "data", "row_prompts", "token_display",
    "checkpoints", "prefix_tree", "block_attention", "sequence_attention", "label_loss",
    "validation",
    "row_order", "steps", "callbacks", "sharding", "label_trainer", "training",
    "adapter_training", "grouped_lora", "multi_adapter",
    "scoring", "gold_answers", "tasks", "bootstrap", "aggregation", "evaluation", "forecast",
    "samples", "showcase", "mlflow_store", "store_check", "event_sending", "mirror", "tracking",
    "comparison", "outcome_tables", "outcomes", "mixtures", "run_comparison", "results", "shape",
    "memory_estimate", "memory",
    "verdict", "score_tables",
    "figures", "report_pages", "report", "session", "identity_0_1", "identity",
    "scores", "preflight", "row_preview", "active_run", "pipeline", "worker", "planning",
    "grid", "sweep",
    "trained", "merging", "conversation", "model_card", "handles", "api", "chat", "export",
    "preview", "sync",
    "runs", "reproduction", "rerun", "__main__",
]  # fmt: skip


def imported_modules(path: Path) -> set[str]:
    """Return the modules of the package that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "finetune":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finetune."):
            found.add((node.module or "").split(".")[1])
    return found - {"demo"}


def test_every_module_has_its_place_in_the_order() -> None:
    """A new module is placed before it is used."""
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_stands_before_it(name: str) -> None:
    """The order of imports is the order of reading."""
    before = set(ORDER[: ORDER.index(name)])
    assert imported_modules(PACKAGE / f"{name}.py") <= before


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["lora.rr=1"]])
def test_the_command_starts_without_torch(arguments: list[str]) -> None:
    """Help, the composed config and a refusal come at once."""
    code = (
        "import sys\n"
        f"sys.argv = ['finetune', *{arguments!r}]\n"
        "from finetune.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'lm_eval'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_sweep_imports_no_torch() -> None:
    """The process that outlives all workers stays small."""
    code = "import sys, finetune.sweep; assert not {'torch', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# What a report stands on: a run's files and what is below them.
READING = {
    "escaping", "streams", "tables", "pages", "metrics", "metric_names", "resampling",
    "resolvers", "config", "home", "files", "events", "score_files", "run_files", "run_folder",
    "sweep_record",
}  # fmt: skip
REPORTING = {
    "comparison", "outcome_tables", "outcomes", "mixtures", "run_comparison", "results", "verdict",
    "score_tables", "figures", "report_pages",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REPORTING))
def test_reporting_reads_files_only(name: str) -> None:
    """It is made of what runs left, and of nothing that makes runs."""
    assert imported_modules(PACKAGE / f"{name}.py") <= READING | REPORTING


@pytest.mark.parametrize("name", sorted(READING))
def test_what_reads_files_stands_on_itself(name: str) -> None:
    """So nothing that reporting imports brings other parts along."""
    assert imported_modules(PACKAGE / f"{name}.py") <= READING


def test_the_reading_commands_import_neither_models_nor_evaluation() -> None:
    """The commands that list, report and send runs start at once."""
    code = (
        "import sys, finetune.report, finetune.runs, finetune.sync, finetune.figures\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'peft', 'datasets', 'mlflow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
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
    "tasks.find_task_file": "the installation",
    "tasks.stock_index": "the installation",
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
