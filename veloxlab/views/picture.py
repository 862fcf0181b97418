"""Still pictures of a Vega-Lite spec, made in this process by vl-convert: no browser, no network."""

from __future__ import annotations

import re
import struct
import zlib
from typing import Any

import vl_convert

from veloxlab.views import palette
from veloxlab.views.spec import Spec

WIDTH = 700  # pixels: as wide as GitHub and nbviewer show an output
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def svg(spec: Spec) -> str:
    """Draw a spec as SVG text, in the light theme on white.

    Parameters
    ----------
    spec
        A Vega-Lite spec with its data.

    Returns
    -------
    str
        The SVG document.
    """
    picture: str = vl_convert.vegalite_to_svg(lit(spec))
    return picture


def png(spec: Spec, *, width: int = WIDTH) -> bytes:
    """Draw a spec as PNG, in the light theme on white, scaled to a width.

    Parameters
    ----------
    spec
        A Vega-Lite spec with its data.
    width
        Width of the picture in pixels.

    Returns
    -------
    bytes
        The PNG file.
    """
    drawing = svg(spec)
    natural = float(re.search(r'<svg[^>]*? width="([\d.]+)"', drawing)[1])  # type: ignore[index]
    return repacked(vl_convert.svg_to_png(drawing, scale=width / natural))


def repacked(picture: bytes) -> bytes:
    """Compress a PNG's pixels again: vl-convert packs for speed, and zlib makes a chart about seven times smaller."""
    chunks: list[tuple[bytes, bytes]] = []
    at = len(SIGNATURE)
    while at < len(picture):
        (length,) = struct.unpack_from(">I", picture, at)
        chunks.append((picture[at + 4 : at + 8], picture[at + 8 : at + 8 + length]))
        at += 12 + length
    pixels = zlib.compress(zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT")), 9)
    before = [chunk for chunk in chunks if chunk[0] == b"IHDR"]
    return SIGNATURE + b"".join(_chunk(*chunk) for chunk in [*before, (b"IDAT", pixels), (b"IEND", b"")])


def png_size(picture: bytes) -> tuple[int, int]:
    """Read width and height in pixels from a PNG's header."""
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


def lit(spec: Spec) -> Spec:
    """Give a spec the colours of the light theme and a white ground."""
    config: dict[str, Any] = palette.merge(spec.get("config", {}), palette.colours("light"))
    return {**spec, "config": config | {"background": "white"}}


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
