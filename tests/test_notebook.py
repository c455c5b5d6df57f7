"""The example notebooks run from the first cell to the last."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def execute(name: str, folder: Path) -> list[Any]:
    """Run a notebook in a folder, and return what its cells put out; a cell that fails raises."""
    import nbformat
    from nbclient import NotebookClient

    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    book: Any = nbformat.reads(text, as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(
        book, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return [out for cell in book.cells for out in cell.get("outputs", [])]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own
@pytest.mark.parametrize("name", ["kaggle.ipynb", "colab.ipynb"])
def test_the_notebooks_of_lent_machines_run_without_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tiny model: two runs and their report; a second time they are finished already."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for told in ("[2/2]", "finished already"):
        outputs = execute(name, tmp_path)
        assert told in "".join(out.get("text", "") for out in outputs)
    (report,) = [
        out["data"]["text/markdown"] for out in outputs if "text/markdown" in out.get("data", {})
    ]
    assert report.startswith("# ")
    assert len(list(tmp_path.glob("outputs/*/adapter"))) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own
def test_the_example_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder; its sweep is watched in its cell, and its results are a table."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    outputs = execute("notebook.ipynb", tmp_path)
    pages = [out["data"]["text/html"] for out in outputs if "text/html" in out.get("data", {})]
    assert any("scoring" in page or "finished" in page for page in pages)
    assert any(page.startswith("<pre>") for page in pages)
    assert any("image/png" in out.get("data", {}) for out in outputs)
    texts = "".join(out.get("text", "") for out in outputs)
    assert "### Instruction:\nWhat is a fossil?" in texts
    assert "step/s" not in texts  # the worker's own bars are off where the table is
    assert len(list(tmp_path.glob("outputs/*/adapter/prompt.jinja"))) == 2
