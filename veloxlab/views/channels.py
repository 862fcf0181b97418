"""Where in a model the loud channels are: every layer and channel of one KV head's keys or values."""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import theme
from veloxlab.views.distributions import SPACE_WORDS
from veloxlab.views.furniture import (
    CROSS,
    Plot,
    framed,
    layer_axis,
    layer_step,
    lines_by_layer,
    require,
    tensors_of,
    tips,
)
from veloxlab.views.scales import Domain, log_colour, log_domain, log_y, not_drawn, on_log_scale

CELLS = 1_920  # at most: more channels are drawn in groups, each by its loudest
DOMAIN = (0.5, 20.0)  # of root-mean-square over the median channel's, clamped
STEP, TALLEST = 11, 330  # pixels of a layer, and of the map
RATIO = pl.when(pl.col("rms") == 0).then(0.0).otherwise(pl.col("rms") / pl.col("rms").median().over("layer"))


def channel_map(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw how loud each channel of one head is in every layer, over the median channel of that layer.

    Rows of one head, tensor and space of `veloxlab.measure.distributions.CHANNELS`, of many layers. A channel with
    tokens that are not finite has a cross.
    """
    numbers = ("layer", "head", "channel", "rms", "not_finite")
    require(frame, "channel_map", "tensor", "space", *numbers)
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
    tooltip = tips("layer:O", "channel:O", ("ratio:Q", "over median", ".3~g"))
    cells = (
        on_log_scale(base, "ratio", DOMAIN)
        .mark_rect()
        .encode(
            color=log_colour("ratio", ["RMS over", "the median"], DOMAIN),
            tooltip=tooltip,
        )
    )
    broken = (
        alt.Chart()
        .transform_filter("datum.not_finite > 0")
        .transform_calculate(middle="(datum.channel + datum.channel_end - 1) / 2")
        .mark_text(text="×", fontWeight="bold", color=theme.PICKED)
        .encode(x=alt.X("middle:Q"), y=alt.Y("layer:O"), tooltip=tips(("not_finite:Q", "not finite")))
    )
    height = alt.Step(min(STEP, TALLEST / layers))
    plot = alt.layer(cells, broken).properties(width=theme.WIDTH - 20, height=height)
    usual = channel_map_caption(frame)
    return framed([plot], shown, "RMS of each channel over the median channel, by layer", caption, usual)


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


OUTLIER_RATIO = pl.col("loudest_ratio").filter(pl.col("loudest_ratio").is_finite()).mean()  # of the heads that have one


def outliers_by_layer(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the loudest channel of each layer over its median channel, a line for each space; mean over KV heads.

    Rows of `veloxlab.measure.distributions.OUTLIERS`.
    """
    numbers = ("layer", "head", "loudest_ratio", "not_finite")
    require(frame, "outliers_by_layer", "tensor", "space", *numbers)
    means = frame.group_by("layer", "tensor", "space", maintain_order=True).agg(
        OUTLIER_RATIO, pl.col("not_finite").sum()
    )
    tensors = tensors_of(frame)
    spaces = [space for space in theme.SPACES if space in set(frame["space"])]
    domain = log_domain(means["loudest_ratio"])
    step = 0.85 * layer_step(means["layer"].n_unique())  # room for a broad legend
    plots = [
        _lines(tensor, spaces, domain, legend=tensor == tensors[0], last=tensor == tensors[-1]).properties(
            width=alt.Step(step), height=120
        )
        for tensor in tensors
    ]
    usual = outlier_caption(frame)
    return framed(plots, means, "RMS of the largest channel over the median channel", caption, usual, pickable=True)


def outlier_caption(frame: pl.DataFrame) -> str:
    """Say the mean ratio of the keys' loudest channel in each space, and how many coordinates are not finite."""
    tensor = next(tensor for tensor in theme.TENSORS if tensor in set(frame["tensor"]))
    means = frame.filter(pl.col("tensor") == tensor).group_by("space").agg(OUTLIER_RATIO)
    ratios = dict(means.iter_rows())
    said = [f"{SPACE_WORDS[space]} {ratios[space]:.1f}" for space in theme.SPACES if ratios.get(space) is not None]
    broken = int(frame["not_finite"].sum())
    words = f"{tensor.capitalize()}, mean: " + ", ".join(said) + (f"; × {broken} not finite" if broken else "")
    return "; ".join([words, *not_drawn(frame["loudest_ratio"])])


def _lines(tensor: str, spaces: list[str], domain: Domain, *, legend: bool, last: bool) -> Plot:
    words = [SPACE_WORDS[space] for space in spaces]
    named = "{" + ", ".join(f"{space}: '{SPACE_WORDS[space]}'" for space in spaces) + "}[datum.space]"
    colour = alt.Color("seen:N", title=None).scale(domain=words, range=[theme.SPACES[s][0] for s in spaces])
    base = (
        on_log_scale(alt.Chart(), "loudest_ratio", domain)
        .transform_filter(f"datum.tensor === '{tensor}'")
        .transform_calculate(seen=named)
        .encode(
            x=layer_axis(labelled=last),
            y=log_y("loudest_ratio", [tensor, "loudest / median RMS"], domain),
            color=colour if legend else colour.legend(None),
        )
    )
    shape = alt.Shape("seen:N", title=None).scale(domain=words, range=[theme.SPACES[s][1] for s in spaces])
    shape = shape if legend else shape.legend(None)
    tooltip = tips("layer:O", "seen:N", ("loudest_ratio:Q", tensor, ".3~g"))
    points = base.mark_point(filled=True, size=30, opacity=1, cursor="pointer").encode(shape=shape, tooltip=tooltip)
    broken = (
        alt.Chart()
        .transform_filter(f"datum.tensor === '{tensor}' && datum.not_finite > 0")
        .mark_text(**CROSS)
        .encode(x=alt.X("layer:O"), y=alt.value(6))
    )
    return lines_by_layer(base, points, broken)
