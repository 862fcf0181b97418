"""Maps by layer: where the outlier channels are, and how many bits each coordinate gets."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, theme
from veloxlab.views.distributions import SPACE_WORDS

CELLS, COORDINATES = 1_920, 1_900  # at most; more channels are drawn in groups, by the largest or the mean
STEP, TALLEST, TALLEST_OF_TWO = 11, 330, 220  # pixels: height of a layer, and of maps
DOMAIN = (0.5, 20.0)  # RMS over the RMS of the median channel, clamped
RATIO = pl.when(pl.col("rms") == 0).then(0.0).otherwise(pl.col("rms") / pl.col("rms").median().over("layer"))


def channel_map(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the RMS of each channel of one head in every layer, over the median channel of that layer.

    Rows of one head, tensor and space of `veloxlab.measure.distributions.CHANNELS`, of many layers. A cross marks a
    channel with tokens that are not finite.
    """
    columns.require(frame, "channel_map", "layer channel rms not_finite", one="head tensor space")
    group, words = marks.grouped(frame.height, CELLS, "channel")
    shown = (
        frame.select("layer", "not_finite", channel=pl.col("channel") // group * group, ratio=RATIO)
        .group_by("layer", "channel", maintain_order=True)
        .agg(pl.col("ratio").max(), pl.col("not_finite").sum())
        .with_columns(channel_end=pl.col("channel") + group)
    )
    ends = {"begin": "datum.channel - 0.5", "end": "datum.channel_end - 0.5"}
    cells = columns.on_log_scale(alt.Chart(), "ratio", DOMAIN).transform_calculate(**ends).mark_rect()
    cells = cells.encode(
        x=columns.x("begin", words, nice=False, tickMinStep=1),
        x2=alt.X2("end:Q"),
        y=columns.y("layer", [frame["tensor"][0], "layer"]),
        color=columns.log_colour("ratio", ["RMS over", "the median"], DOMAIN),
        tooltip=columns.tips("layer channel", ("ratio", "over median")),
    )
    middles = alt.Chart().transform_calculate(middle="(datum.channel + datum.channel_end - 1) / 2")
    lost = marks.crosses(middles, x=alt.X("middle:Q"), y=alt.Y("layer:O"), tooltip=columns.tips("not_finite"))
    height = alt.Step(min(STEP, TALLEST / shown["layer"].n_unique()))
    plot = marks.sized(marks.layered(cells, lost), theme.WIDTH - 20, height)
    said = caption or channel_map_caption(frame)
    return marks.framed([plot], shown, "RMS of each channel over the median channel, by layer", said)


def channel_map_caption(frame: pl.DataFrame) -> str:
    """State the largest channel and its ratio, and the numbers of values that are not finite and channels not drawn."""
    ratios = frame.with_columns(ratio=RATIO)
    finite = ratios.filter(pl.col("ratio").is_finite()).sort("ratio", "layer", "channel")
    said = [
        f"Largest: layer {most['layer']}, channel {most['channel']}, {most['ratio']:.1f} times the median channel"
        for most in finite.tail(1).iter_rows(named=True)
    ]
    lost = marks.broken(frame["not_finite"].sum())
    return f"KV head {frame['head'][0]}. " + marks.sentence(*said, lost, *columns.not_drawn(ratios["ratio"]))


def coordinate_map(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the code bits of every layer and coordinate, keys above values.

    Rows of `veloxlab.measure.levels.COORDINATE_BITS`, or of `veloxlab.RateBudget.coordinates`, which is averaged over
    heads.
    """
    columns.require(frame, "coordinate_map", "layer tensor coordinate bits")
    cells = frame.select("layer", "tensor", "coordinate").n_unique()
    group, words = marks.grouped(cells, COORDINATES, "coordinate")
    dims, most = (int(frame[name].max()) + 1 for name in ("coordinate", "bits"))  # type: ignore[arg-type]
    groups = frame.group_by("tensor", "layer", pl.col("coordinate") // group * group, maintain_order=True)
    shown = groups.agg(pl.col("bits").mean()).with_columns(end=pl.min_horizontal(pl.col("coordinate") + group, dims))
    tensors = marks.tensors_of(shown)
    legend = alt.Legend(values=list(range(most)), format="d", gradientLength=90, gradientThickness=10)

    def draw(tensor: str, last: bool) -> marks.Plot:
        bits = alt.Color("bits:Q", title=["bits of", tensor], legend=legend).scale(domain=[0, most - 1])
        rects: alt.Chart = marks.only(tensor=tensor).mark_rect()
        return rects.encode(
            x=columns.x("coordinate:Q", words if last else None, nice=False, tickMinStep=1),
            x2=alt.X2("end:Q"),
            y=columns.y("layer", [tensor, "layer"], labelOverlap=True),
            color=bits,
            tooltip=columns.tips("layer", ("coordinate", "coordinates from"), ("bits", f"bits of {tensor}")),
        )

    height = alt.Step(min(STEP, TALLEST_OF_TWO / shown["layer"].n_unique()))
    plots = marks.panels(tensors, draw, theme.WIDTH - 20, height)
    return marks.framed(plots, shown, "Code bits of each coordinate, by layer", caption or coordinate_caption(frame))


def coordinate_caption(frame: pl.DataFrame) -> str:
    """State the mean and the most bits of keys and of values, and the share of coordinates without bits."""
    bits = pl.col("bits")
    told = frame.group_by("tensor").agg(mean=bits.mean(), most=bits.max(), none=(bits == 0).mean() * 100)
    said = "{tensor} {mean:.2f} on average, {most:g} at most, none for {none:.0f} %"
    return marks.sentence(*(said.format(**own.row(0, named=True)) for _, own in marks.by_tensor(told)))


OUTLIER_RATIO = pl.col("loudest_ratio").filter(pl.col("loudest_ratio").is_finite()).mean()  # of heads with a ratio


def outliers_by_layer(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the largest channel of each layer over the median channel, a line for each space; mean over KV heads.

    Rows of `veloxlab.measure.distributions.OUTLIERS`.
    """
    columns.require(frame, "outliers_by_layer", "tensor space layer head loudest_ratio not_finite")
    means = frame.group_by("layer", "tensor", "space", maintain_order=True)
    shown = means.agg(OUTLIER_RATIO, pl.col("not_finite").sum())
    tensors = marks.tensors_of(frame)
    words = {space: SPACE_WORDS[space] for space in theme.SPACES if space in frame["space"]}
    colours, shapes = ({words[space]: theme.SPACES[space][i] for space in words} for i in (0, 1))
    domain = columns.log_domain(shown["loudest_ratio"])

    def draw(tensor: str, last: bool) -> marks.Plot:
        own, legend = marks.only(tensor=tensor), tensor == tensors[0]
        base = columns.on_log_scale(own, "loudest_ratio", domain).transform_calculate(seen=f"{words}[datum.space]")
        base = base.encode(
            x=marks.layer_axis(labelled=last),
            y=columns.log_y("loudest_ratio", [tensor, "largest / median RMS"], domain),
            color=marks.scaled(alt.Color, "seen", colours, legend=legend),
        )
        told = columns.tips("layer seen", ("loudest_ratio", tensor, ".3~g"))
        lost = marks.crosses(own, x=alt.X("layer:O"))
        return marks.lines_by_layer(base, told, 30, lost, shape=marks.scaled(alt.Shape, "seen", shapes, legend=legend))

    step = 0.85 * marks.layer_step(shown["layer"].n_unique())  # room for a broad legend
    plots = marks.panels(tensors, draw, alt.Step(step), 120)
    said = caption or outlier_caption(frame)
    return marks.framed(plots, shown, "RMS of the largest channel over the median channel", said, pickable=True)


def outlier_caption(frame: pl.DataFrame) -> str:
    """State the mean ratio of the keys' largest channel in each space, and the number of values that are not finite."""
    tensor, own = next(marks.by_tensor(frame))
    ratios = dict(own.group_by("space").agg(OUTLIER_RATIO).iter_rows())
    said = [f"{SPACE_WORDS[space]} {ratios[space]:.1f}" for space in theme.SPACES if ratios.get(space) is not None]
    lost = [marks.broken(frame["not_finite"].sum()), *columns.not_drawn(frame["loudest_ratio"])]
    return marks.sentence(f"{tensor.capitalize()}, mean: " + ", ".join(said), *lost)
