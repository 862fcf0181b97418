"""How long each layer of a cache takes, beside the exact one."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import columns, marks
from veloxlab.views.generation import SIDES

PARTS = {"store": ["store,", "µs a token"], "decode": ["decode,", "µs a token"], "attend": ["attend,", "µs a query"]}


def times_by_layer(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw what storing, decoding and attending take in every layer, exact and compressed.

    Rows of `veloxlab.measure.times.LAYER_TIMES`.
    """
    shown = columns.require(frame, "times_by_layer", "layer part side microseconds tokens held_bytes fp16_bytes")
    there = [part for part in PARTS if part in shown["part"]]
    layers = shown["layer"].n_unique()

    def draw(part: str, last: bool) -> marks.Plot:
        base = marks.only(part=part).encode(
            x=marks.layer_axis(labelled=last),
            y=columns.y("microseconds", PARTS[part], zero=True, tickCount=4),
            color=marks.scaled(alt.Color, "side", SIDES, legend=part == there[0]),
        )
        told = columns.tips("layer side", ("microseconds", "µs", ".3~g"), "tokens held_bytes fp16_bytes")
        return marks.line_points(base, told, 26)

    width = marks.layer_step(layers) * layers
    plots = marks.panels(there, draw, width, 84)
    return marks.framed(plots, shown, "Time of each layer", caption or times_by_layer_caption(frame))


def times_by_layer_caption(frame: pl.DataFrame) -> str:
    """Say how many times the exact cache's time all layers together take."""
    needed = columns.require(frame, "times_by_layer_caption", "part side microseconds")
    sums = needed.group_by("part", "side").agg(pl.col("microseconds").sum())
    told = []
    for part in ("store", "attend"):
        both = dict(sums.filter(part=part).select("side", "microseconds").iter_rows())
        if set(SIDES) <= {*both}:
            told.append(f"to {part} {both['compressed'] / both['exact']:.2f}")
    return f"All layers, over the exact cache's time: {', '.join(told)}. Medians of this machine, now."
