"""The example notebook runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own
def test_the_example_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder; its sweep is watched in its cell, and its results are a table."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = (ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8")
    book: Any = nbformat.reads(text, as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(
        book, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs: list[Any] = [out for cell in book.cells for out in cell.get("outputs", [])]
    pages = [out["data"]["text/html"] for out in outputs if "text/html" in out.get("data", {})]
    assert any("scoring" in page or "finished" in page for page in pages)
    assert any(page.startswith("<pre>") for page in pages)
    assert any("image/png" in out.get("data", {}) for out in outputs)
    texts = "".join(out.get("text", "") for out in outputs)
    assert "### Instruction:\nWhat is a fossil?" in texts
    assert "step/s" not in texts  # the worker's own bars are off where the table is
    assert len(list(tmp_path.glob("outputs/*/adapter/prompt.jinja"))) == 2
