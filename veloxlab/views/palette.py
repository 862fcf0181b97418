"""One visual language for every chart: type, spacing, and colours that read on white and on a dark ground."""

from __future__ import annotations

from typing import Any, Literal

Mode = Literal["light", "dark"]

FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
WIDTH = 560  # pixels of a plot; with axes and legend a chart stays under 700
STEP = 18  # pixels of a layer or head in a map

# Each colour keeps a contrast of at least 3 to 1 against both white and #111 (a test holds it to that), and the pairs
# that must be told apart differ in lightness or shape as well as in hue.
KEYS, VALUES = "#3b7dd8", "#d9702a"
TENSORS = {"keys": KEYS, "values": VALUES}
PICKED = "#d8435c"
NEUTRAL = "#808890"

# A method keeps its colour and its shape in every chart.
METHODS = {
    "turboquant": ("#3b7dd8", "circle"),
    "ratequant": ("#d9702a", "square"),
    "rabitq": ("#1b9e8a", "triangle-up"),
    "polarquant": ("#8e63ce", "diamond"),
    "commvq": ("#cc5aa0", "cross"),
    "spectralquant": ("#b58900", "triangle-down"),
    "vecinfer": ("#2b93b8", "square"),
    "rvq": ("#3f9142", "diamond"),
    "qjl": ("#a0693a", "triangle-right"),
    "none": (NEUTRAL, "circle"),
}

# Loss: little is quiet, much stands out, on either ground; one hue order, rising contrast, no red against green.
LOSS: dict[Mode, list[str]] = {
    "light": ["#eef3f7", "#c3d9e4", "#8fb6d3", "#6b8cc4", "#6a5aa8", "#6f2f83", "#5a0f52"],
    "dark": ["#1d2730", "#23455a", "#2c688a", "#4f82bd", "#9186d1", "#d391cf", "#ffc9d6"],
}
INK: dict[Mode, dict[str, str]] = {
    "light": {"strong": "#1f2328", "soft": "#59636e", "grid": "#e4e7eb"},
    "dark": {"strong": "#e8eaed", "soft": "#a3abb5", "grid": "#30363d"},
}


def structure() -> dict[str, Any]:
    """Give the part of the theme that is the same on any ground: type, sizes and spacing, and no colour of text."""
    return {
        "font": FONT,
        "background": "transparent",
        "padding": 6,
        "view": {"stroke": None, "continuousWidth": WIDTH, "continuousHeight": 220},
        "title": {"anchor": "start", "fontSize": 14, "fontWeight": 600, "offset": 8, "frame": "group"},
        "axis": {
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "titlePadding": 8,
            "labelPadding": 4,
            "tickSize": 4,
            "domain": False,
        },
        "axisX": {"grid": False},
        "axisBand": {"grid": False, "ticks": False, "labelAngle": 0, "labelOverlap": True},
        "header": {"labelFontSize": 12, "labelFontWeight": 600, "titleFontSize": 11},
        "legend": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "symbolType": "square"},
        "line": {"strokeWidth": 2},
        "text": {"fontSize": 11},
        "rule": {"strokeWidth": 1.5},
        "concat": {"spacing": 14},
        "facet": {"spacing": 8},
    }


def colours(mode: Mode) -> dict[str, Any]:
    """Give the colours of one ground: of text, of grids and of the loss ramp.

    Parameters
    ----------
    mode
        ``"light"`` or ``"dark"``.

    Returns
    -------
    dict
        A Vega-Lite config, to be laid over ``structure()``.
    """
    ink = INK[mode]
    return {
        "title": {"color": ink["strong"], "subtitleColor": ink["soft"]},
        "axis": {
            "labelColor": ink["soft"],
            "titleColor": ink["soft"],
            "tickColor": ink["grid"],
            "gridColor": ink["grid"],
            "domainColor": ink["grid"],
        },
        "header": {"labelColor": ink["strong"], "titleColor": ink["soft"]},
        "legend": {"labelColor": ink["soft"], "titleColor": ink["soft"], "gradientStrokeColor": ink["grid"]},
        "text": {"color": ink["soft"]},
        "rule": {"color": ink["soft"]},
        "range": {"ramp": LOSS[mode], "heatmap": LOSS[mode], "category": [c for c, _ in METHODS.values()]},
    }


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay one config over another, key by key."""
    return below | {
        key: merge(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }
