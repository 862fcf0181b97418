"""How the coordinates of one head are distributed: channel by channel, all together, and under a method's levels."""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from veloxlab.views import theme
from veloxlab.views.furniture import (
    CROSS,
    Plot,
    by_tensor,
    framed,
    head_words,
    one_head,
    require,
    tensor_colour,
    tensors_of,
    tips,
)

SPACE_WORDS = {
    "raw": "as cached",
    "before_rope": "before RoPE",
    "rotated": "rotated",
    "smoothed": "smoothed",
    "smoothed_rotated": "smoothed, rotated",
    "eigenbasis": "eigenbasis",
}
UNITS = {"smoothed": "in λ", "smoothed_rotated": "in λ", "eigenbasis": "in the vector's RMS"}
MARKS = 1_800  # at most: more would make a slider stutter, so channels are then drawn in groups
MOST_SAID = 2  # panels of which a caption speaks one by one
SHARES_SHOWN = 8  # levels at most beside which their share is written


def channel_ranges(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw where each channel of one head lies over the tokens, a panel for each space and tensor.

    Rows of one head of `veloxlab.measure.distributions.CHANNELS`. A channel with tokens that are not finite has a
    cross.
    """
    numbers = ("layer", "head", "channel", "mean", "rms", "least", "low", "high", "most", "not_finite")
    require(frame, "channel_ranges", "tensor", "space", *numbers)
    one_head(frame, "channel_ranges")
    group = math.ceil(3 * frame.height / MARKS)
    shown = _grouped(frame, group)
    panels = shown.select("space", "tensor").unique(maintain_order=True).rows()
    height = 130 if len(panels) <= 2 else 84
    plots = [
        _ranges(space, tensor, group, last=place == len(panels) - 1).properties(width=theme.WIDTH, height=height)
        for place, (space, tensor) in enumerate(panels)
    ]
    return framed(plots, shown, "Range of each channel of one head", caption, channel_caption(frame))


def channel_caption(frame: pl.DataFrame) -> str:
    """Say how loud the loudest channel of a panel is, of many the most and the least, and what is not finite."""
    ratios, both = {}, frame["tensor"].n_unique() > 1
    for (space, tensor), own in frame.group_by("space", "tensor", maintain_order=True):
        usual, loud = own["rms"].median(), own["rms"].max()
        if usual and loud is not None:
            words = SPACE_WORDS[str(space)]
            ratios[f"{tensor} {words}" if both else words] = float(loud) / float(usual)  # type: ignore[arg-type]
    if len(ratios) > MOST_SAID:
        ratios = dict(end(ratios.items(), key=lambda named: named[1]) for end in (max, min))
    said = ", ".join(f"{words} {ratio:.1f}" for words, ratio in ratios.items()) or "no channel has any size"
    broken = int(frame["not_finite"].sum())
    last = f"; × {broken} not finite" if broken else ""
    return f"{head_words(frame)}. Loudest channel over the median one: {said}{last}"


def density(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the density of all coordinates of one head, a panel for each space, keys and values together.

    Rows of one head of `veloxlab.measure.distributions.DENSITIES`.
    """
    numbers = ("layer", "head", "value", "width", "density", "below", "above", "not_finite")
    require(frame, "density", "tensor", "space", *numbers)
    one_head(frame, "density")
    shown = frame.select("tensor", "space", *numbers[2:5])
    spaces = shown["space"].unique(maintain_order=True).to_list()
    plots: list[Plot] = [
        _curve(space, legend=space == spaces[0]).properties(width=theme.WIDTH, height=150 if len(spaces) == 1 else 80)
        for space in spaces
    ]
    return framed(plots, shown, "Density of all coordinates of one head", caption, density_caption(frame))


def density_caption(frame: pl.DataFrame) -> str:
    """Say what share of coordinates lies beyond the ends, at most, and how many are not finite."""
    ends = frame.select(outside=pl.col("below") + pl.col("above"))["outside"].max()
    heads = frame.group_by("tensor", "space").agg(pl.col("not_finite").first())
    broken = int(heads["not_finite"].sum())
    said = f"{head_words(frame)}. Beyond the ends lie {100 * float(ends or 0):.2f} % of coordinates at most"  # type: ignore[arg-type]
    return said + (f"; × {broken} not finite" if broken else "")


def levels_on_density(frame: pl.DataFrame, *, method: str = "", caption: str | None = None) -> alt.VConcatChart:
    """Draw the density of what a method quantizes, and its levels as lines upon it; keys and values apart.

    Rows of one head of `veloxlab.measure.levels.LEVELS`. Of vector codes, which have no levels of single coordinates,
    the density of the decoded ones is a line. ``method``: its name, for the caption.
    """
    numbers = ("layer", "head", "bits", "value", "width", "density", "share", "outside")
    require(frame, "levels_on_density", "tensor", "kind", *numbers)
    one_head(frame, "levels_on_density")
    shown = frame.select("tensor", "kind", *numbers[2:7])
    tensors = tensors_of(frame)
    plots = [
        _levels(tensor, shown.filter(tensor=tensor, kind="level").height, last=tensor == tensors[-1]).properties(
            width=theme.WIDTH, height=110
        )
        for tensor in tensors
    ]
    usual = levels_caption(frame, method)
    chart = framed(plots, shown, "Density of what is quantized, and the quantization levels", caption, usual)
    return chart.resolve_scale(x="shared")  # type: ignore[no-any-return]


def levels_caption(frame: pl.DataFrame, method: str = "") -> str:
    """Say of which method and head, and how many levels stand for the coordinates of keys and of values."""
    said = []
    for tensor, own in by_tensor(frame):
        count = own.filter(pl.col("kind") == "level").height
        said.append(f"{tensor}: {f'{count} levels' if count else 'no common levels, a line'}")
    bits = frame["bits"][0]
    name = f"{method} at {bits} {'bit' if bits == 1 else 'bits'}. " if method else ""
    return f"{name}{head_words(frame)}. " + ", ".join(said)


def _grouped(frame: pl.DataFrame, group: int) -> pl.DataFrame:
    """Channels by ``group``: the ends of all, the means of their means and sizes; itself for groups of one."""
    first = pl.col("channel") // group * group
    return frame.group_by("space", "tensor", channel=first, maintain_order=True).agg(
        pl.col("mean").mean(),
        pl.col("rms").pow(2).mean().sqrt(),
        pl.col("least", "low").min(),
        pl.col("high", "most").max(),
        pl.col("not_finite").sum(),
    )


def _ranges(space: str, tensor: str, group: int, *, last: bool) -> Plot:
    colour = theme.TENSORS[tensor]
    own = alt.Chart().transform_filter(f"datum.tensor === '{tensor}' && datum.space === '{space}'")
    unit = [UNITS[space]] if space in UNITS else []
    title = [tensor, *SPACE_WORDS[space].split(", "), *unit]
    words = "channel" if group == 1 else f"channels, by {group}"
    x = alt.X("begin:Q", title=words if last else None).scale(nice=False).axis(tickMinStep=1, labels=last)
    y = alt.Y("least:Q", title=title).axis(tickCount=4)
    base = own.transform_calculate(begin="datum.channel - 0.45", to=f"datum.channel + {group} - 0.55").encode(
        x=x, x2="to:Q"
    )
    whole = base.mark_rect(color=colour, opacity=0.25).encode(y=y, y2="most:Q")
    usual = base.mark_rect(color=colour, opacity=0.45).encode(y=alt.Y("low:Q"), y2="high:Q")
    mean = base.mark_rule(color=colour, strokeWidth=2).encode(y=alt.Y("mean:Q"))
    zero = own.transform_aggregate(channels="count()").mark_rule(strokeWidth=0.5).encode(y=alt.datum(0))
    named = ("channel", "mean", "rms", "least", "low", "high", "most")
    tooltip = tips(*((f"{name}:Q", None, ".3~g") for name in named))
    broken = (
        own.transform_filter("datum.not_finite > 0")
        .mark_text(**CROSS)
        .encode(
            x=alt.X("channel:Q"),
            y=alt.value(6),
            tooltip=tips("channel:Q", ("not_finite:Q", "not finite")),
        )
    )
    return alt.layer(zero, whole.encode(tooltip=tooltip), usual.encode(tooltip=tooltip), mean, broken)


def _curve(space: str, *, legend: bool) -> Plot:
    unit = UNITS.get(space, "in the unit of the activations")
    curve: alt.Chart = (
        alt.Chart()
        .transform_filter(f"datum.space === '{space}'")
        .mark_area(interpolate="step", opacity=0.3, line={"interpolate": "step", "strokeWidth": 1.5})
        .encode(
            x=alt.X("value:Q", title=f"coordinate, {unit}").scale(nice=False),
            # a square root lets the tails be seen, and has a place for 0
            y=alt.Y("density:Q", title=[*SPACE_WORDS[space].split(", "), "density, √ scale"], stack=None)
            .scale(type="sqrt")
            .axis(tickCount=4),
            color=tensor_colour(legend=legend),
            tooltip=tips("tensor:N", ("value:Q", None, ".3~g"), ("density:Q", None, ".3~g")),
        )
    )
    return curve


def _levels(tensor: str, count: int, *, last: bool) -> Plot:
    colour = theme.TENSORS[tensor]
    own = alt.Chart().transform_filter(f"datum.tensor === '{tensor}'")
    x = alt.X("value:Q", title="coordinate in the space of the codes, over the stored scale" if last else None)
    y = alt.Y("density:Q", title=[tensor, "density"]).axis(tickCount=4)
    base = own.encode(x=x)
    exact = base.transform_filter("datum.kind === 'exact'").mark_area(interpolate="step", color=colour, opacity=0.35)
    decoded = base.transform_filter("datum.kind === 'decoded'").mark_line(
        interpolate="step", strokeWidth=1.5, color=colour
    )
    levels = base.transform_filter("datum.kind === 'level'")
    tooltip = tips(("value:Q", "level", ".4~g"), ("share:Q", "codes", ".1%"))
    rules = levels.mark_rule(color=colour, strokeWidth=1.5).encode(
        y=alt.value(14), y2=alt.value("height"), tooltip=tooltip
    )
    room = exact.transform_calculate(room="1.15 * datum.density").mark_point(opacity=0).encode(y=alt.Y("room:Q"))
    layers: list[alt.Chart] = [exact.encode(y=y), room, decoded.encode(y=alt.Y("density:Q")), rules]
    if count <= SHARES_SHOWN:
        layers.append(levels.mark_text(dy=-8).encode(y=alt.value(14), text=alt.Text("share:Q", format=".0%")))
    return alt.layer(*layers)


def angle_densities(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the density of one head's polar angles, a panel for each level; dashed, what the codebooks expect.

    Rows of one head of `veloxlab.measure.levels.ANGLES`.
    """
    numbers = ("layer", "head", "level", "angle", "density", "expected")
    require(frame, "angle_densities", "tensor", *numbers)
    one_head(frame, "angle_densities")
    shown = frame.select("tensor", *numbers[2:])
    levels = shown["level"].unique().sort().to_list()
    plots = [_panel(level, last=level == levels[-1]).properties(width=theme.WIDTH - 90, height=84) for level in levels]
    return framed(plots, shown, "Density of PolarQuant's angles, by level", caption, angle_caption(frame))


def angle_caption(frame: pl.DataFrame) -> str:
    """Say which share of each level's angles lies elsewhere than expected: ½ Σ|density − expected| over the bins."""
    apart = (pl.col("density") - pl.col("expected")).abs().sum() / (pl.col("density").sum() * 2)
    shares = frame.group_by("level", "tensor").agg(apart=apart).sort("level", "tensor")
    said = []
    for tensor in theme.TENSORS:
        own = shares.filter(pl.col("tensor") == tensor)["apart"]
        if len(own):
            said.append(f"{tensor} {', '.join(f'{100 * share:.0f}' for share in own)} %")
    return f"{head_words(frame)}. Elsewhere than expected (dashed), by level: " + "; ".join(said)


def _panel(level: int, *, last: bool) -> Plot:
    colour = tensor_colour(legend=level == 1)
    x = alt.X("angle:Q", title="angle, radians" if last or level == 1 else None).scale(nice=False)
    base = alt.Chart().transform_filter(f"datum.level === {level}").encode(x=x)
    y = alt.Y("density:Q", title=[f"level {level}", "density"]).axis(tickCount=3)
    tooltip = tips("tensor:N", ("angle:Q", None, ".3~g"), ("density:Q", None, ".3~g"))
    measured = base.mark_line(interpolate="step", strokeWidth=1.5).encode(y=y, color=colour, tooltip=tooltip)
    expected = (
        base.transform_aggregate(expected="mean(expected)", groupby=["angle"])
        .mark_line(strokeDash=[4, 3], strokeWidth=1.5, color=theme.NEUTRAL)
        .encode(y=alt.Y("expected:Q"))
    )
    return alt.layer(measured, expected)
