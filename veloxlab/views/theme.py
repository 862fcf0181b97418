"""One theme for all charts: fonts, spacing, and colours that are legible on white and on a dark background."""

from __future__ import annotations

from typing import Any, Literal

from veloxlab import codecs

Mode = Literal["light", "dark"]

FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
WIDTH = 560  # pixels of a plot; with axes and legend a chart stays under 790
STEP = 18  # pixels of a layer or head in a map

# Each colour has a contrast of at least 3 to 1 against both white and #111 (a test checks that). Pairs that must
# be told apart differ in lightness or shape as well as in hue.
KEYS, VALUES = "#3b7dd8", "#d9702a"
TENSORS = {"keys": KEYS, "values": VALUES}
TENSOR_SHAPES = {"keys": "circle", "values": "square"}
PICKED = "#d8435c"
NEUTRAL = "#808890"
CHOSEN = "#8e63ce"  # an optimised choice, beside uniform or exact; blue and orange are keys and values
OTHER = "#6a6fd8"  # caches of other projects, such as mlx-lm's quantized cache
OTHER_MARKS = ("triangle-left", "square", "triangle-up", "circle", "diamond", "cross", "triangle-down")
OTHER_LOOK = OTHER, OTHER_MARKS[0]

# The colour and shape of a method, the same in every chart; the method declares them.
METHODS = {method.id: (method.colour or OTHER, method.mark) for method in codecs.METHODS.values()}

# A space of keys and values has the look of a method that codes in that space.
_CODED_IN = {method.space: METHODS[method.id] for method in codecs.METHODS.values()} | {"raw": (NEUTRAL, "circle")}
_ORDER = ("raw", "before_rope", "rotated", "smoothed", "smoothed_rotated", "eigenbasis")
SPACES = {space: _CODED_IN[space] for space in _ORDER}
CATEGORIES = list(dict.fromkeys([KEYS, VALUES, *(colour for colour, _ in METHODS.values())]))

# Loss: a small loss is faint, a large loss is strong on both backgrounds; one hue order, no red against green.
LOSS: dict[Mode, list[str]] = {
    "light": ["#f0f2e4", "#cbe2cd", "#93c8b8", "#5aa5a8", "#4a7a98", "#4a4f86", "#35195c"],
    "dark": ["#1c2528", "#22424a", "#2a6670", "#3f8f8c", "#76b893", "#bcdc9b", "#f6f7b8"],
}
INK: dict[Mode, dict[str, str]] = {
    "light": {"strong": "#1f2328", "soft": "#59636e", "grid": "#e4e7eb"},
    "dark": {"strong": "#e8eaed", "soft": "#a3abb5", "grid": "#30363d"},
}


def look_of(name: str) -> tuple[str, str]:
    """Return the colour and the shape of a cache or result, whose name starts with a method (``"rvq K3 V3"``)."""
    method = codecs.METHODS.get("none" if name == "fp16" or name.startswith("exact") else name.split(" ")[0])
    return (method.colour or OTHER, method.mark) if method else OTHER_LOOK


def structure() -> dict[str, Any]:
    """Return the part of the theme that is the same on any background: fonts, sizes and spacing."""
    words = {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"}
    return {
        "font": FONT,
        "background": "transparent",
        "padding": 6,
        "autosize": {"type": "pad", "resize": True},  # a caption or label that grows must not be cut off
        "view": {"stroke": None, "continuousWidth": WIDTH, "continuousHeight": 220},
        "title": {"anchor": "start", "fontSize": 14, "fontWeight": 600, "offset": 8, "frame": "group"},
        "axis": words | {"titlePadding": 8, "labelPadding": 4, "tickSize": 4, "domain": False},
        "axisX": {"grid": False},
        "axisY": {"minExtent": 40},  # so that charts below each other align at the left
        "axisBand": {"grid": False, "ticks": False, "labelAngle": 0, "labelOverlap": True, "labelSeparation": 5},
        "header": {"labelFontSize": 12, "labelFontWeight": 600, "titleFontSize": 11},
        "legend": words | {"symbolType": "square"},
        # JupyterLab's dark theme does not set these, so they get colours that are legible on both backgrounds
        "style": {"caption": {"font": FONT, "fontSize": 12, "fontWeight": "normal", "fill": NEUTRAL}},
        "text": {"fontSize": 11, "color": NEUTRAL},
        "rule": {"strokeWidth": 1.5, "color": NEUTRAL},
        "range": {"ramp": LOSS["light"], "heatmap": LOSS["light"], "category": CATEGORIES},
        "line": {"strokeWidth": 2},
        "concat": {"spacing": 14},
        "facet": {"spacing": 8},
    }


def colours(mode: Mode) -> dict[str, Any]:
    """Return a Vega-Lite config with the colours of text, grids and the loss ramp, to be merged over `structure`."""
    ink = INK[mode]
    words = {"labelColor": ink["soft"], "titleColor": ink["soft"]}
    return {
        "title": {"color": ink["strong"], "subtitleColor": ink["soft"]},
        "axis": words | {f"{part}Color": ink["grid"] for part in ("tick", "grid", "domain")},
        "header": {"labelColor": ink["strong"], "titleColor": ink["soft"]},
        "legend": words | {"gradientStrokeColor": ink["grid"]},
        "style": {"caption": {"fill": ink["soft"]}},
        "text": {"color": ink["soft"]},
        "rule": {"color": ink["soft"]},
        "range": {"ramp": LOSS[mode], "heatmap": LOSS[mode]},
    }
