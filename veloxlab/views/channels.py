"""Where in a model the outlier channels are: every layer and channel of one KV head's keys or values."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.errors import InputError
from veloxlab.views import columns, marks, scales, theme
from veloxlab.views.distributions import SPACE_WORDS

CELLS = 1_920  # at most: more channels are drawn in groups, each by its largest
DOMAIN = (0.5, 20.0)  # of root-mean-square over the median channel's, clamped
STEP, TALLEST = 11, 330  # pixels of a layer, and of the map
RATIO = pl.when(pl.col("rms") == 0).then(0.0).otherwise(pl.col("rms") / pl.col("rms").median().over("layer"))


def channel_map(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the size (RMS) of each channel of one head in every layer, over the median channel of that layer.

    Rows of one head, tensor and space of `veloxlab.measure.distributions.CHANNELS`, of many layers. A channel with
    tokens that are not finite has a cross.
    """
    columns.require(frame, "channel_map", "tensor", "space", "layer", "head", "channel", "rms", "not_finite")
    for name in ("head", "tensor", "space"):
        if frame[name].n_unique() > 1:
            raise InputError(f"channel_map shows one {name} and the frame has {frame[name].n_unique()}: filter it.")
    group, words = marks.grouped(frame.height, CELLS, "channel")
    shown = (
        frame.select("layer", "not_finite", channel=pl.col("channel") // group * group, ratio=RATIO)
        .group_by("layer", "channel", maintain_order=True)
        .agg(pl.col("ratio").max(), pl.col("not_finite").sum())
        .with_columns(channel_end=pl.col("channel") + group)
    )
    x = alt.X("begin:Q", title=words).scale(nice=False).axis(tickMinStep=1)
    cells = (
        scales.on_log_scale(alt.Chart(), "ratio", DOMAIN)
        .transform_calculate(begin="datum.channel - 0.5", end="datum.channel_end - 0.5")
        .mark_rect()
        .encode(
            x=x,
            x2="end:Q",
            y=alt.Y("layer:O", title=[frame["tensor"][0], "layer"]),
            color=scales.log_colour("ratio", ["RMS over", "the median"], DOMAIN),
            tooltip=columns.tips("layer", "channel", ("ratio", "over median")),
        )
    )
    middles = alt.Chart().transform_calculate(middle="(datum.channel + datum.channel_end - 1) / 2")
    lost = marks.crosses(middles, x=alt.X("middle:Q"), y=alt.Y("layer:O"), tooltip=columns.tips("not_finite"))
    height = alt.Step(min(STEP, TALLEST / shown["layer"].n_unique()))
    plot = alt.layer(cells, lost).properties(width=theme.WIDTH - 20, height=height)
    usual = channel_map_caption(frame)
    return marks.framed([plot], shown, "RMS of each channel over the median channel, by layer", caption, usual)


def channel_map_caption(frame: pl.DataFrame) -> str:
    """Say which channel is largest and by how much, how many values are not finite, and how many channels not drawn."""
    ratios = frame.with_columns(ratio=RATIO)
    finite = ratios.filter(pl.col("ratio").is_finite()).sort("ratio", "layer", "channel")
    said = [
        f"Largest: layer {most['layer']}, channel {most['channel']}, {most['ratio']:.1f} times the median channel"
        for most in finite.tail(1).iter_rows(named=True)
    ]
    lost = marks.broken(int(frame["not_finite"].sum()))
    return f"KV head {frame['head'][0]}. " + marks.sentence(*said, lost, *scales.not_drawn(ratios["ratio"]))


OUTLIER_RATIO = pl.col("loudest_ratio").filter(pl.col("loudest_ratio").is_finite()).mean()  # of the heads that have one


def outliers_by_layer(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the largest channel of each layer over its median channel, a line for each space; mean over KV heads.

    Rows of `veloxlab.measure.distributions.OUTLIERS`.
    """
    columns.require(frame, "outliers_by_layer", "tensor", "space", "layer", "head", "loudest_ratio", "not_finite")
    means = frame.group_by("layer", "tensor", "space", maintain_order=True).agg(
        OUTLIER_RATIO, pl.col("not_finite").sum()
    )
    tensors = marks.tensors_of(frame)
    spaces = [space for space in theme.SPACES if space in frame["space"]]
    domain = scales.log_domain(means["loudest_ratio"])

    def draw(tensor: str, last: bool) -> marks.Plot:
        return _lines(tensor, spaces, domain, legend=tensor == tensors[0], last=last)

    step = 0.85 * marks.layer_step(means["layer"].n_unique())  # room for a broad legend
    heading, usual = "RMS of the largest channel over the median channel", outlier_caption(frame)
    return marks.framed(marks.panels(tensors, draw, alt.Step(step), 120), means, heading, caption, usual, pickable=True)


def outlier_caption(frame: pl.DataFrame) -> str:
    """Say the mean ratio of the keys' largest channel in each space, and how many coordinates are not finite."""
    tensor, own = next(marks.by_tensor(frame))
    ratios = dict(own.group_by("space").agg(OUTLIER_RATIO).iter_rows())
    said = [f"{SPACE_WORDS[space]} {ratios[space]:.1f}" for space in theme.SPACES if ratios.get(space) is not None]
    lost = marks.broken(int(frame["not_finite"].sum()))
    return marks.sentence(
        f"{tensor.capitalize()}, mean: " + ", ".join(said), lost, *scales.not_drawn(frame["loudest_ratio"])
    )


def _lines(tensor: str, spaces: list[str], domain: scales.Domain, *, legend: bool, last: bool) -> marks.Plot:
    words = {space: SPACE_WORDS[space] for space in spaces}
    colours, shapes = ({words[space]: theme.SPACES[space][i] for space in spaces} for i in (0, 1))
    own = marks.only(tensor=tensor)
    base = (
        scales.on_log_scale(own, "loudest_ratio", domain)
        .transform_calculate(seen=f"{words}[datum.space]")
        .encode(
            x=marks.layer_axis(labelled=last),
            y=scales.log_y("loudest_ratio", [tensor, "largest / median RMS"], domain),
            color=marks.scaled(alt.Color, "seen", colours, legend=legend),
        )
    )
    told = columns.tips("layer", "seen", ("loudest_ratio", tensor, ".3~g"))
    lost = marks.crosses(own, x=alt.X("layer:O"))
    return marks.lines_by_layer(base, told, lost, shape=marks.scaled(alt.Shape, "seen", shapes, legend=legend))
