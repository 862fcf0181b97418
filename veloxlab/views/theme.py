"""Our look and our renderer, made the ones that Altair uses."""

from __future__ import annotations

import base64
from typing import Any

import altair as alt

from veloxlab.views import palette, picture
from veloxlab.views.spec import Spec, compact, describe, join, split

DIGITS = 6  # of a number in a plain chart: more than a screen can show, and a third of a saved notebook's size less
LIVE = "application/vnd.vegalite.v5+json"  # the newest that JupyterLab 4.6 draws; what our charts use is in v5 and v6
V5 = "https://vega.github.io/schema/vega-lite/v5.json"


def enable() -> None:
    """Make this the theme and the renderer of Altair charts in this process.

    Altair's own renderers need a network or an older Vega-Lite in JupyterLab 4.6; this one needs neither, and leaves
    a picture and a line of text in the saved notebook.
    """
    alt.theme.register("veloxlab", enable=True)(lambda: alt.theme.ThemeConfig(config=palette.structure()))  # type: ignore[typeddict-item]
    alt.renderers.register("veloxlab", render)
    alt.renderers.enable("veloxlab")


def render(spec: Spec, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Show a plain chart, which needs no kernel once it is drawn.

    Parameters
    ----------
    spec
        A Vega-Lite spec with its data.

    Returns
    -------
    tuple
        A mime bundle (live chart, picture, text) and its metadata.
    """
    bare, rows, params = split(spec)
    rows = {name: [_shortened(row) for row in table] for name, table in rows.items()}
    whole = join(bare, rows, params)
    bundle = {
        LIVE: whole | {"$schema": V5},
        "image/png": base64.b64encode(picture.png(whole)).decode(),
        "text/plain": describe(bare, rows),
    }
    compact(bundle[LIVE])  # a notebook with what JSON does not have could not be saved
    return bundle, {LIVE: {"embed_options": {"renderer": "svg", "actions": False}}}


def _shortened(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for key, value in row.items()}
