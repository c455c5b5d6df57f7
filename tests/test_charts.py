"""Charts of a report: what each shows, and that the page draws them and finds a run in all."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import altair as alt
import pytest
import vl_convert
from PIL import Image

from finetune.reporting.chart_parts import MOST_NAMED
from finetune.reporting.charts import build_charts
from finetune.reporting.curve_charts import name_runs
from finetune.reporting.curves import (
    CURVES,
    FEWEST_POINTS,
    MOST_POINTS,
    select_curves,
    smooth,
    thin,
)
from finetune.reporting.figures import compress
from finetune.reporting.pages import write_report
from finetune.reporting.results import read_results
from finetune.tracking.events import EventLog, read_events
from tests.test_effects import write_grid


def charts_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {chart.name: chart.spec for chart in build_charts(read_results(folder))}


def values_of(spec: dict[str, Any]) -> str:
    """Return all data of a chart as text."""
    return json.dumps(spec.get("datasets", spec))


def test_each_chart_has_titles_and_the_parameter_that_fades_others(tmp_path: Path) -> None:
    """So that a click in one chart is seen in all."""
    swept = {"lora.r": ["4", "8"], "optimizer.lr": ["1e-4", "1e-3"]}
    found = charts_of(write_grid(tmp_path, swept, [2, 10, 4, 12]))
    assert list(found) == ["differences-arc", "grid", "effect-1", "effect-2", "loss"]
    for spec in found.values():
        assert "picked" in [param["name"] for param in spec["params"]]
        assert '"title"' in json.dumps(spec)
        assert "config" not in spec
        alt.Chart.from_dict(spec)  # raises where it is not of Vega-Lite's schema


def test_charts_wait_for_pandas_that_another_thread_imports() -> None:
    """Altair takes it from sys.modules, where it may be half imported while a sweep begins."""
    code = "import finetune.reporting.charts, sys; assert sys.modules['pandas'].Timestamp"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_many_runs_are_sorted_and_not_named_on_the_axis(tmp_path: Path) -> None:
    """Hovering says which is which."""
    ranks = [str(n) for n in range(1, MOST_NAMED + 2)]
    spec = charts_of(
        write_grid(tmp_path, {"lora.r": ranks}, [n % 20 + 1 for n in range(len(ranks))])
    )
    axis = spec["differences-arc"]["layer"][1]["encoding"]["y"]["axis"]
    assert axis["labels"] is False
    assert f"lora.r={ranks[-1]}" in values_of(spec["differences-arc"])


def test_five_settings_are_drawn_as_parallel_coordinates(tmp_path: Path) -> None:
    """An axis for each, and one for the metric; a heat map would need a fifth dimension."""
    swept = {key: ["1", "2"] for key in ("lora.r", "lora.alpha", "a", "b")} | {"c": ["1"]}
    found = charts_of(write_grid(tmp_path, swept, [n % 7 for n in range(16)]))
    assert "grid" not in found
    alt.Chart.from_dict(found["parallel"])
    assert all(f'"{key}"' in values_of(found["parallel"]) for key in (*swept, "arc/acc"))


def test_a_heat_map_of_equal_scores_is_readable(tmp_path: Path) -> None:
    """Black on one bright colour."""
    swept = {"lora.r": ["4", "8"], "optimizer.lr": ["1e-4", "1e-3"]}
    spec = charts_of(write_grid(tmp_path, swept, [3, 3, 3, 3]))["grid"]
    assert '"ink": "black"' in values_of(spec)
    assert '"ink": "white"' not in values_of(spec)


def test_steps_are_whole_numbers_and_curves_are_thinned(tmp_path: Path) -> None:
    """The more runs, the fewer points each has; the first and the last are kept."""
    path = tmp_path / "events.jsonl"
    events = EventLog(path)
    for step in range(1, 1001):
        events.metrics({"train/loss": 1 / step, "train/lr": 0.1}, step)
    events.close()
    found = select_curves(read_events(path))
    assert set(found) == {"train/loss", "train/lr"}
    for num_runs, most in ((1, 1000), (MOST_POINTS, FEWEST_POINTS)):
        for curve in CURVES:
            if curve.metric not in found:
                continue
            points = thin(curve, found[curve.metric], num_runs=num_runs)
            assert len(points) == most
            assert (points[0][0], points[-1][0]) == (1, 1000)
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])


def test_pictures_are_compressed_without_loss(tmp_path: Path) -> None:
    """The same pixels in fewer bytes."""
    spec: dict[str, Any] = {
        "mark": "line", "data": {"values": [{"x": n, "y": n % 7} for n in range(50)]},
        "encoding": {axis: {"field": axis, "type": "quantitative"} for axis in ("x", "y")},
    }  # fmt: skip
    png = vl_convert.vegalite_to_png(spec)
    small = compress(png)
    assert len(small) < 0.7 * len(png)
    before, after = (Image.open(io.BytesIO(one)).convert("RGBA") for one in (png, small))
    assert before.tobytes() == after.tobytes()


def test_curves_of_many_runs_are_coloured_by_a_setting(tmp_path: Path) -> None:
    """The first that has few values and is no seed; few runs each have their own colour."""
    swept = {"training.seed": ["1", "2"], "lora.r": ["4", "8"], "optimizer.lr": ["1", "2"]}
    many = read_results(write_grid(tmp_path / "many", swept, [1] * 8))
    runs = name_runs(many)
    assert (runs.title, runs.groups) == ("lora.r", ["4", "4", "8", "8"] * 2)
    few = name_runs(read_results(write_grid(tmp_path / "few", {"lora.r": ["4", "8"]}, [1, 2])))
    assert (few.title, few.groups) == (None, ["lora.r=4", "lora.r=8"])
    spec = {chart.name: chart.spec for chart in build_charts(many)}["loss"]
    assert spec["encoding"]["color"]["scale"]["domain"] == ["4", "8"]


def test_ticks_of_few_steps_are_not_between_them(tmp_path: Path) -> None:
    """A format without decimals would show one and a half as 2."""
    spec = charts_of(write_grid(tmp_path, {"lora.r": ["4"]}, [1]))["loss"]
    assert spec["encoding"]["x"]["axis"]["tickCount"] == 1  # from step 1 to 2


PROBE = """<script type="module">
await window.drawn;
const rows = [...document.querySelectorAll("#summary [data-run]")];
rows[1].click();
const marked = document.querySelectorAll(".picked").length;
document.querySelectorAll("#summary th")[2].click();
const body = document.querySelector("#summary tbody");
const first = [...body.rows].slice(0, 2).map((row) => row.cells[2].textContent);
const field = document.querySelector(".filter");
field.value = rows[0].dataset.run;
field.dispatchEvent(new Event("input"));
const charts = document.querySelectorAll(".chart svg").length;
document.title = [charts, marked, ...first, body.rows.length].join(" ");
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium")
def test_the_page_draws_without_a_network(tmp_path: Path) -> None:
    """All charts; a click marks a run in the tables, a column sorts, the field filters."""
    folder = write_grid(tmp_path, {"lora.r": ["4", "8", "16"]}, [1, 3, 2])
    write_report(folder)
    page = folder / "probed.html"
    text = (folder / "report.html").read_text()
    before, _, after = text.rpartition("</body>")  # Vega's script has one too
    page.write_text(f"{before}{PROBE}{after}")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    found = subprocess.run(
        ["chromium", *arguments, "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    title = re.search("<title>(.*?)</title>", found)
    assert title is not None
    assert title[1] == "3 3 0.5000 0.5750 1"  # the base stays on top
