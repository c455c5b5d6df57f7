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
    "escaping", "tables", "pages", "resolvers", "metrics", "metric_names", "resampling", "devices",
    "compatibility",
    "config", "grammar", "commands", "command_line", "config_files", "composition",
    "inputs", "store_address", "methods", "optimizers", "ranges",
    "foreign_values", "foreign_configs", "hydra_overrides", "foreign_runs",
    "overrides", "distributed", "launchers", "grouping", "jobs",
    "home", "files", "arrow_cache", "events", "score_files", "run_files", "run_folder",
    "finished_runs", "live",
    "quantization", "fused_kernels", "hub", "chat_templates", "models", "adapters", "adalora",
    "attention",
    "saved_adapter", "turns", "text_sections", "plain_tokens", "chat_messages", "chat_tokens",
    "prompts",
    "text_lines", "json_rows", "file_formats", "data_paths", "rows",
    "row_messages", "row_shapes", "token_rows", "text_pieces",
    "token_cache", "row_encoding", "row_draw", "row_counts",
    "data", "row_prompts", "token_display",
    "checkpoints", "prefix_tree", "block_attention", "sequence_attention", "label_loss",
    "validation", "steps", "row_order", "sharding", "label_trainer", "training",
    "adapter_training", "grouped_lora", "multi_adapter",
    "scoring", "gold_answers", "tasks", "bootstrap", "aggregation", "evaluation", "forecast",
    "samples", "showcase", "mlflow_store", "store_check", "event_sending", "tracking",
    "comparison", "outcomes", "mixtures", "run_comparison", "results", "shape",
    "memory_estimate", "memory",
    "verdict", "score_tables",
    "figures", "report_pages", "report", "session", "identity_0_1", "identity",
    "scores", "preflight", "row_preview", "active_run", "pipeline", "worker", "planning",
    "sweep",
    "trained", "merging", "model_card", "conversation", "chat", "export", "preview", "sync",
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


def test_no_module_is_long() -> None:
    """A file that outgrows 400 lines holds two ideas."""
    long = [p.name for p in PACKAGE.rglob("*.py") if len(p.read_text().splitlines()) > 420]
    assert long == []
