"""Output of charts without a browser or a network: images by vl-convert, an HTML page, and notebook outputs."""

from __future__ import annotations

import re
import struct
import zlib
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import accumulate, count
from string import Template
from typing import Any

import altair as alt
import numpy as np
import polars as pl
import vl_convert
from altair.utils import update_nested

from veloxlab.views import theme
from veloxlab.views.spec import Spec, compact, describe, finite, join, split, title_of

WIDTH = 700  # pixels: as wide as GitHub and nbviewer show an output
CHANNELS = 4  # bytes of a pixel: vl-convert writes RGBA
SIGNATURE = b"\x89PNG\r\n\x1a\n"
DIGITS = 6  # of a number in a plain chart: more than a screen can show; saved notebooks are a third smaller
LIVE = "application/vnd.vegalite.v5+json"  # the newest that JupyterLab 4.6 draws; our charts are valid in v5 and v6
V5 = "https://vega.github.io/schema/vega-lite/v5.json"


def svg(spec: Spec) -> str:
    """Draw a spec with its data as an SVG document, in the light theme on white."""
    return str(vl_convert.vegalite_to_svg(lit(spec)))


def png(spec: Spec, *, width: int = WIDTH) -> bytes:
    """Draw a spec with its data as a PNG file, in the light theme on white, ``width`` pixels wide."""
    drawing = svg(spec)
    return repacked(vl_convert.svg_to_png(drawing, scale=width / _size(drawing)[0]))


def stacked(specs: Sequence[Spec]) -> bytes:
    """Draw specs with their data below one another as one PNG file; the widest has `WIDTH` pixels."""
    drawings = [_apart(svg(spec), f"chart{i}-") for i, spec in enumerate(specs)]
    sizes = [_size(drawing) for drawing in drawings]
    broad, tall = max(w for w, _ in sizes), sum(h for _, h in sizes)
    tops = accumulate((height for _, height in sizes), initial=0.0)
    placed = [drawing.replace("<svg", f'<svg y="{top}"', 1) for drawing, top in zip(drawings, tops, strict=False)]
    whole = f'<svg xmlns="http://www.w3.org/2000/svg" width="{broad}" height="{tall}">'
    ground = f'<rect width="{broad}" height="{tall}" fill="white"/>'
    return repacked(vl_convert.svg_to_png(whole + ground + "".join(placed) + "</svg>", scale=WIDTH / broad))


def _apart(drawing: str, prefix: str) -> str:
    """Make the ids in the tags of one drawing, such as its clip paths, different from those of other drawings."""
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", tag[0]), drawing)


def _size(drawing: str) -> tuple[float, float]:
    root = re.search(r"<svg[^>]*>", drawing)[0]  # type: ignore[index]
    width, height = (float(re.search(rf' {side}="([\d.]+)"', root)[1]) for side in ("width", "height"))  # type: ignore[index]
    return width, height


def repacked(picture: bytes) -> bytes:
    """Compress a PNG's pixels again with zlib: about ten times smaller than vl-convert's fast compression.

    Rows with filter "Sub" (1), which vl-convert writes, get filter "None" (0), which packs flat colours better.
    """
    chunks: dict[bytes, bytes] = {}
    at = len(SIGNATURE)
    while at < len(picture):
        length, kind = struct.unpack_from(">I4s", picture, at)
        chunks[kind] = chunks.get(kind, b"") + picture[at + 8 : at + 8 + length]
        at += 12 + length
    rows = zlib.decompress(chunks[b"IDAT"])
    lines = np.frombuffer(rows, np.uint8).reshape(png_size(picture)[1], -1)
    if (lines.shape[1] - 1) % CHANNELS == 0 and (lines[:, 0] == 1).all():
        # modulo 256, as PNG defines it
        pixels = lines[:, 1:].reshape(len(lines), -1, CHANNELS).cumsum(axis=1, dtype=np.uint8)
        rows = np.insert(pixels.reshape(len(lines), -1), 0, 0, axis=1).tobytes()
    kept = {b"IHDR": chunks[b"IHDR"], b"IDAT": zlib.compress(rows, 9), b"IEND": b""}
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in kept.items()
    )


def png_size(picture: bytes) -> tuple[int, int]:
    """Read width and height in pixels from a PNG's header."""
    return struct.unpack_from(">II", picture, 16)


def lit(spec: Spec) -> Spec:
    """Return a spec with the colours of the light theme and a white background."""
    config = update_nested(spec.get("config", {}), theme.colours("light") | {"background": "white"}, copy=True)
    return {**spec, "config": config}


@dataclass(frozen=True)
class Section:
    """A part of a report. Each field may be empty.

    ``heading``: empty if the chart has one. ``words``: a paragraph. ``chart``: a Vega-Lite spec with its data.
    ``table``: a frame. ``code``: text to copy. ``folded``: if it has a text, the table, or without a table the code, is
    in a fold with that summary.
    """

    heading: str = ""
    words: str = ""
    chart: Spec | None = None
    table: pl.DataFrame | None = None
    folded: str = ""
    code: str = ""


def report(title: str, sections: Sequence[Section], script: str, notebook: bytes = b"") -> str:
    """Return the text of an HTML page.

    ``title``: the title of the page. ``sections``: its parts, from top to bottom. ``script``: an ES module that exports
    ``vegaEmbed``, included in the page. ``notebook``: included too, with a link that saves it.
    """
    charts = [section.chart for section in sections if section.chart is not None]
    numbers, lines = count(), list[str]()
    for section in sections:
        lines += [f"<h2>{escape(section.heading)}</h2>"] if section.heading else []
        lines += [f"<p>{escape(section.words)}</p>"] if section.words else []
        lines += [f'<div class="chart" id="chart-{next(numbers)}"></div>'] if section.chart is not None else []
        lines += [_table(section.table, section.folded)] if section.table is not None else []
        code = f"<pre>{escape(section.code)}</pre>" if section.code else ""
        lines += [_fold(code, section.folded) if section.table is None and code else code]
    if notebook:
        saved = f'href="data:application/x-ipynb+json;base64,{b64encode(notebook).decode()}"'
        lines.append(f'<p><a download="veloxlab.ipynb" {saved}>Save the notebook that measures this again</a></p>')
    themes = {mode: theme.colours(mode) | {"background": "transparent"} for mode in theme.INK}
    ink = {f"{mode}_{name}": colour for mode, colours in theme.INK.items() for name, colour in colours.items()}
    page = Template((files("veloxlab.views") / "report.html").read_text(encoding="utf-8"))
    return page.substitute(
        ink,
        title=escape(title),
        font=theme.FONT,
        sections="\n".join(lines),
        charts=_inert({"specs": finite(charts), "themes": themes}),
        script=_inert(script),
    )


def table_of(frame: pl.DataFrame) -> str:
    """Return the summary of a folded table."""
    return f"Table of {frame.height} row{'s' * (frame.height != 1)}"


def _table(frame: pl.DataFrame, folded: str) -> str:
    table = f'<div class="table">{html_table(frame.columns, frame.iter_rows())}</div>'
    return _fold(table, folded)


def _fold(content: str, summary: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if summary else content


def html_table(titles: Sequence[str], rows: Iterable[Sequence[object]], cell: str = "", left: int = 1) -> str:
    """Return an HTML table. All text is escaped, a float has four digits, and None is an empty cell.

    ``cell``: CSS of every cell, for a page without a style sheet; columns after the first ``left`` ones are then
    aligned right.
    """
    sides = [*["left"] * left, *["right"] * (len(titles) - left)]
    styles = [f' style="text-align: {side}; {cell}"' if cell else "" for side in sides]

    def line(tag: str, values: Sequence[object]) -> str:
        shown = (
            "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value) for value in values
        )
        said = map(escape, shown)
        cells = (f"<{tag}{style}>{value}</{tag}>" for style, value in zip(styles, said, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    lines = [line("th", titles), *(line("td", row) for row in rows)]
    return "<table>\n{}\n</table>".format("\n".join(lines))


def _inert(value: object) -> str:
    """Return JSON without ``<``, so that HTML finds neither ``</script`` nor ``<!--`` in it."""
    return compact(value).replace("<", "\\u003c")


def enable() -> None:
    """Make this theme and renderer Altair's; other renderers need a network, or an older Vega-Lite in JupyterLab."""
    alt.theme.register("veloxlab", enable=True)(lambda: alt.theme.ThemeConfig(config=theme.structure()))  # type: ignore[typeddict-item]
    alt.renderers.register("veloxlab", render)
    alt.renderers.enable("veloxlab")


def render(spec: Spec, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a mime bundle (live chart, image, text) of a spec with its data, and its metadata; it needs no kernel."""
    bare, rows, params = split(spec)
    rows = {name: [{key: _shortened(value) for key, value in row.items()} for row in own] for name, own in rows.items()}
    whole = join(bare, rows, params)
    bundle = {
        LIVE: whole | {"$schema": V5},
        "image/png": b64encode(png(whole)).decode(),
        "text/plain": describe(bare, rows),
    }
    compact(bundle[LIVE])  # raises for values that JSON does not have: such a notebook could not be saved
    said = ". ".join(filter(None, (title_of(bare), params.get("caption"))))
    return bundle, {LIVE: {"embed_options": {"renderer": "svg", "actions": False}}, "image/png": {"alt": said}}


def _shortened(value: object) -> object:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
