"""The charts of a report as files: PNG for its Markdown, and the JavaScript that draws them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import vl_convert

from finetune.files import write_atomic
from finetune.home import cache_dir
from finetune.reporting.chart_parts import Chart, Spec

JAVASCRIPT = "vega.js"  # beside a report that loads it from there
WIDTH = 680  # pixels of a PNG, before its scale
SCALE = 1.5
SIGNATURE, LEVEL = b"\x89PNG\r\n\x1a\n", 6  # of a PNG; of its compression
CONFIG: dict[str, Any] = {  # of the PNG; the page has its own, for light and dark
    "background": "white", "view": {"stroke": None}, "axis": {"gridColor": "#e8e8e8"},
    "font": "DejaVu Sans, Arial, sans-serif",
}  # fmt: skip


def draw_figures(charts: Sequence[Chart], folder: Path) -> dict[str, str]:
    """Draw charts into `figures/` of a sweep's folder; return caption -> path below the folder."""
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    names = {f"{chart.name}.png" for chart in charts}
    for old in figures.glob("*.png"):
        if old.name not in names:
            old.unlink()
    for chart in charts:
        png = vl_convert.vegalite_to_png(sized(chart.spec, WIDTH), scale=SCALE, config=CONFIG)
        (figures / f"{chart.name}.png").write_bytes(compress(png))
    return {chart.caption: f"figures/{chart.name}.png" for chart in charts}


def compress(png: bytes) -> bytes:
    """Return a picture a third as large: vl-convert compresses as fast as it can, not well."""
    parts, pixels, place = [png[: len(SIGNATURE)]], b"", len(SIGNATURE)
    while place < len(png):  # chunks: length, name, content, checksum
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")
        name = png[place + 4 : place + 8]
        if name == b"IDAT":
            pixels += png[place + 8 : end - 4]
        else:
            if name == b"IEND":
                parts.append(_chunk(b"IDAT", zlib.compress(zlib.decompress(pixels), LEVEL)))
            parts.append(png[place:end])
        place = end
    return b"".join(parts)


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return len(content).to_bytes(4, "big") + name + content + checksum.to_bytes(4, "big")


def sized(spec: Spec, width: int | str) -> Spec:
    """Return a spec with a width; one of small multiples has that of its cells."""
    return spec if "facet" in spec else {**spec, "width": width}


def read_javascript() -> str:
    """Return Vega, Vega-Lite and Vega-Embed in one script, to stand in a page or a file.

    Bundling takes seconds, so that it is done once for each version of vl-convert. The bundle is
    made to be a module; a function around it lets browsers load it from a local file too.
    """
    path = cache_dir() / "javascript" / f"vega-script-{version('vl-convert-python')}.js"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    bundle = str(cast(Any, vl_convert).javascript_bundle()).replace("</script", "<\\/script")
    script = f'(() => {{"use strict";{bundle}}})();\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, script)
    return script
