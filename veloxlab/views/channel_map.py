"""Where in a model the loud channels are: every layer and channel of one KV head's keys or values."""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.furniture import caption_title, framed
from veloxlab.views.logscale import LABEL, log_ticks, not_drawn, on_log_scale

CELLS = 1_920  # at most: more channels are drawn in groups, each by its loudest
DOMAIN = (0.5, 20.0)  # of root-mean-square over the median channel's, clamped
STEP, TALLEST = 11, 330  # pixels of a layer, and of the map
RATIO = pl.when(pl.col("rms") == 0).then(0.0).otherwise(pl.col("rms") / pl.col("rms").median().over("layer"))


def channel_map(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw how loud each channel of one head is in every layer, over the median channel of that layer.

    Parameters
    ----------
    frame
        Rows of one head, tensor and space of `veloxlab.measure.distributions.CHANNELS`, of many layers. A channel with
        tokens that are not finite has a cross.
    caption
        The line under the heading; by default the loudest channel of all.
    """
    numbers = ("layer", "head", "channel", "rms", "not_finite")
    require(frame, {"tensor": "text", "space": "text"} | dict.fromkeys(numbers, "number"), "channel_map")  # type: ignore[arg-type]
    for name in ("head", "tensor", "space"):
        if frame[name].n_unique() > 1:
            raise InputError(f"channel_map shows one {name} and the frame has {frame[name].n_unique()}: filter it.")
    group = math.ceil(frame.height / CELLS)
    shown = (
        frame.select("layer", "not_finite", channel=pl.col("channel") // group * group, ratio=RATIO)
        .group_by("layer", "channel", maintain_order=True)
        .agg(pl.col("ratio").max(), pl.col("not_finite").sum())
        .with_columns(channel_end=pl.col("channel") + group)
    )
    layers = shown["layer"].n_unique()
    words = "channel" if group == 1 else f"channels, by {group}"
    base = (
        alt.Chart()
        .transform_calculate(begin="datum.channel - 0.5", end="datum.channel_end - 0.5")
        .encode(
            x=alt.X("begin:Q", title=words).scale(nice=False).axis(tickMinStep=1),
            x2="end:Q",
            y=alt.Y("layer:O", title=[frame["tensor"][0], "layer"]),
        )
    )
    key = alt.Legend(values=log_ticks(DOMAIN), labelExpr=LABEL, gradientLength=110, gradientThickness=10)
    tips = [
        alt.Tooltip("layer:O"),
        alt.Tooltip("channel:O"),
        alt.Tooltip("ratio:Q", title="over median", format=".3~g"),
    ]
    cells = (
        on_log_scale(base, "ratio", DOMAIN)
        .mark_rect()
        .encode(
            color=alt.Color("ratio_drawn:Q", title=["RMS over", "the median"], legend=key).scale(
                type="log", domain=DOMAIN, clamp=True
            ),
            tooltip=tips,
        )
    )
    broken = (
        alt.Chart()
        .transform_filter("datum.not_finite > 0")
        .transform_calculate(middle="(datum.channel + datum.channel_end - 1) / 2")
        .mark_text(text="×", fontWeight="bold", color=palette.PICKED)
        .encode(x=alt.X("middle:Q"), y=alt.Y("layer:O"), tooltip=[alt.Tooltip("not_finite:Q", title="not finite")])
    )
    height = alt.Step(min(STEP, TALLEST / layers))
    plot = alt.layer(cells, broken).properties(width=palette.WIDTH - 20, height=height, title=caption_title())
    said = channel_map_caption(frame) if caption is None else caption
    return framed([plot], shown, "Loud channels of one KV head, by layer", said, pickable=False)


def channel_map_caption(frame: pl.DataFrame) -> str:
    """Say which channel is loudest and by how much, how many values are not finite, and how many channels not drawn."""
    ratios = frame.with_columns(ratio=RATIO)
    heard = ratios.filter(pl.col("ratio").is_finite()).sort("ratio", "layer", "channel")
    broken = int(frame["not_finite"].sum())
    said = [
        f"Loudest: layer {loud['layer']}, channel {loud['channel']}, {loud['ratio']:.1f} times the median channel"
        for loud in heard.tail(1).iter_rows(named=True)
    ]
    said += [f"× {broken} not finite"] if broken else []
    return f"KV head {frame['head'][0]}. " + "; ".join([*said, *not_drawn(ratios["ratio"])])
