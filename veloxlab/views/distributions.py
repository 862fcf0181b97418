"""How the coordinates of one head are distributed: channel by channel, all together, and under a method's levels."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, theme

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
    numbers = ("channel", "mean", "rms", "least", "low", "high", "most", "not_finite")
    needed = columns.require_head(frame, "channel_ranges", "tensor", "space", *numbers)
    group, words = marks.grouped(3 * frame.height, MARKS, "channel")
    shown = needed.group_by("space", "tensor", channel=pl.col("channel") // group * group, maintain_order=True).agg(
        pl.col("mean").mean(),
        pl.col("rms").pow(2).mean().sqrt(),
        pl.col("least", "low").min(),
        pl.col("high", "most").max(),
        pl.col("not_finite").sum(),
    )
    places = shown.select("space", "tensor").unique(maintain_order=True).rows()
    height = 130 if len(places) <= 2 else 84
    plots = marks.panels(
        places, lambda place, last: _ranges(place[0], place[1], group, words if last else None), theme.WIDTH, height
    )
    return marks.framed(plots, shown, "Range of each channel of one head", caption, channel_caption(frame))


def channel_caption(frame: pl.DataFrame) -> str:
    """Say how much the largest channel of a panel exceeds the median one, and what is not finite."""
    ratios, both = {}, frame["tensor"].n_unique() > 1
    for (space, tensor), own in frame.group_by("space", "tensor", maintain_order=True):
        usual, largest = own["rms"].median(), own["rms"].max()
        if usual and largest is not None:
            words = SPACE_WORDS[str(space)]
            ratios[f"{tensor} {words}" if both else words] = float(largest) / float(usual)  # type: ignore[arg-type]
    if len(ratios) > MOST_SAID:
        ratios = dict(end(ratios.items(), key=lambda named: named[1]) for end in (max, min))
    said = ", ".join(f"{words} {ratio:.1f}" for words, ratio in ratios.items()) or "no channel has any size"
    lost = marks.broken(int(frame["not_finite"].sum()))
    return marks.sentence(f"{marks.head_words(frame)}. Largest channel over the median one: {said}", lost)


def _ranges(space: str, tensor: str, group: int, words: str | None) -> marks.Plot:
    colour = theme.TENSORS[tensor]
    own = marks.only(tensor=tensor, space=space)
    unit = [UNITS[space]] if space in UNITS else []
    y = alt.Y("least:Q", title=[tensor, *SPACE_WORDS[space].split(", "), *unit]).axis(tickCount=4)
    base = own.transform_calculate(begin="datum.channel - 0.45", to=f"datum.channel + {group} - 0.55").encode(
        x=alt.X("begin:Q", title=words).scale(nice=False).axis(tickMinStep=1, labels=words is not None), x2="to:Q"
    )
    told = base.encode(tooltip=columns.tips("channel", "mean", "rms", "least", "low", "high", "most"))
    whole = told.mark_rect(color=colour, opacity=0.25).encode(y=y, y2="most:Q")
    usual = told.mark_rect(color=colour, opacity=0.45).encode(y=alt.Y("low:Q"), y2="high:Q")
    mean = base.mark_rule(color=colour, strokeWidth=2).encode(y=alt.Y("mean:Q"))
    zero = own.transform_aggregate(channels="count()").mark_rule(strokeWidth=0.5).encode(y=alt.datum(0))
    lost = marks.crosses(own, x=alt.X("channel:Q"), tooltip=columns.tips("channel", "not_finite"))
    return alt.layer(zero, whole, usual, mean, lost)


def density(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the density of all coordinates of one head, a panel for each space, keys and values together.

    Rows of one head of `veloxlab.measure.distributions.DENSITIES`.
    """
    numbers = ("value", "width", "density", "below", "above", "not_finite")
    shown = columns.require_head(frame, "density", "tensor", "space", *numbers).drop(*numbers[3:])
    spaces = shown["space"].unique(maintain_order=True).to_list()
    height = 150 if len(spaces) == 1 else 80
    plots = marks.panels(spaces, lambda space, _: _curve(space, legend=space == spaces[0]), theme.WIDTH, height)
    return marks.framed(plots, shown, "Density of all coordinates of one head", caption, density_caption(frame))


def density_caption(frame: pl.DataFrame) -> str:
    """Say what share of coordinates lies beyond the ends, at most, and how many are not finite."""
    ends = frame.select(outside=pl.col("below") + pl.col("above"))["outside"].max()
    heads = frame.group_by("tensor", "space").agg(pl.col("not_finite").first())
    said = f"{marks.head_words(frame)}. Beyond the ends lie {100 * float(ends or 0):.2f} % of coordinates at most"  # type: ignore[arg-type]
    return marks.sentence(said, marks.broken(int(heads["not_finite"].sum())))


def _curve(space: str, *, legend: bool) -> marks.Plot:
    x = alt.X("value:Q", title=f"coordinate, {UNITS.get(space, 'in the unit of the activations')}").scale(nice=False)
    # a square root lets the tails be seen, and has a place for 0
    y = alt.Y("density:Q", title=[*SPACE_WORDS[space].split(", "), "density, √ scale"], stack=None).scale(type="sqrt")
    colour, told = marks.tensor_colour(legend=legend), columns.tips("tensor", "value", "density")
    return marks.step_area(marks.only(space=space)).encode(x=x, y=y.axis(tickCount=4), color=colour, tooltip=told)


def levels_on_density(frame: pl.DataFrame, *, method: str = "", caption: str | None = None) -> alt.VConcatChart:
    """Draw the density of what a method quantizes, and its levels as lines upon it; keys and values apart.

    Rows of one head of `veloxlab.measure.levels.LEVELS`. Of vector codes, which have no levels of single coordinates,
    the density of the decoded ones is a line. ``method``: its name, for the caption.
    """
    numbers = ("bits", "value", "width", "density", "share", "outside")
    shown = columns.require_head(frame, "levels_on_density", "tensor", "kind", *numbers).drop("outside")

    def draw(tensor: str, last: bool) -> marks.Plot:
        return _levels(tensor, shown.filter(tensor=tensor, kind="level").height, last)

    plots = marks.panels(marks.tensors_of(frame), draw, theme.WIDTH, 110)
    usual = levels_caption(frame, method)
    chart = marks.framed(plots, shown, "Density of what is quantized, and the quantization levels", caption, usual)
    return chart.resolve_scale(x="shared")  # type: ignore[no-any-return]


def levels_caption(frame: pl.DataFrame, method: str = "") -> str:
    """Say of which method and head, and how many levels stand for the coordinates of keys and of values."""
    counts = {tensor: own.filter(pl.col("kind") == "level").height for tensor, own in marks.by_tensor(frame)}
    said = [f"{tensor}: {f'{n} levels' if n else 'no common levels, a line'}" for tensor, n in counts.items()]
    bits = frame["bits"][0]
    name = f"{method} at {bits} {'bit' if bits == 1 else 'bits'}. " if method else ""
    return f"{name}{marks.head_words(frame)}. " + ", ".join(said)


def _levels(tensor: str, count: int, last: bool) -> marks.Plot:
    colour = theme.TENSORS[tensor]
    x = alt.X("value:Q", title="coordinate in the space of the codes, over the stored scale" if last else None)
    y = alt.Y("density:Q", title=[tensor, "density"]).axis(tickCount=4)
    base = marks.only(tensor=tensor).encode(x=x)
    of_kind = {kind: base.transform_filter(f"datum.kind === '{kind}'") for kind in ("exact", "decoded", "level")}
    exact = of_kind["exact"].mark_area(interpolate="step", color=colour, opacity=0.35)
    room = exact.transform_calculate(room="1.15 * datum.density").mark_point(opacity=0).encode(y=alt.Y("room:Q"))
    decoded = of_kind["decoded"].mark_line(interpolate="step", strokeWidth=1.5, color=colour)
    rules = of_kind["level"].mark_rule(color=colour, strokeWidth=1.5)
    told = columns.tips(("value", "level", ".4~g"), ("share", "share of codes"))
    layers: list[alt.Chart] = [
        exact.encode(y=y),
        room,
        decoded.encode(y=alt.Y("density:Q")),
        rules.encode(y=alt.value(14), y2=alt.value("height"), tooltip=told),
    ]
    if count <= SHARES_SHOWN:
        shares = of_kind["level"].mark_text(dy=-8)
        layers.append(shares.encode(y=alt.value(14), text=alt.Text("share:Q", format=".0%")))
    return alt.layer(*layers)


def angle_densities(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the density of one head's polar angles, a panel for each level; dashed, what the codebooks expect.

    Rows of one head of `veloxlab.measure.levels.ANGLES`.
    """
    shown = columns.require_head(frame, "angle_densities", "tensor", "level", "angle", "density", "expected")
    plots = marks.panels(shown["level"].unique().sort().to_list(), _angles, theme.WIDTH - 90, 84)
    return marks.framed(plots, shown, "Density of PolarQuant's angles, by level", caption, angle_caption(frame))


def angle_caption(frame: pl.DataFrame) -> str:
    """Say which share of each level's angles lies elsewhere than expected: ½ Σ|density − expected| over the bins."""
    apart = (pl.col("density") - pl.col("expected")).abs().sum() / (pl.col("density").sum() * 2)
    shares = marks.by_tensor(frame.group_by("level", "tensor").agg(apart=100 * apart).sort("level"))
    said = marks.sentence(
        *(f"{tensor} {', '.join(f'{share:.0f}' for share in own['apart'])} %" for tensor, own in shares)
    )
    return f"{marks.head_words(frame)}. Elsewhere than expected (dashed), by level: {said}"


def _angles(level: int, last: bool) -> marks.Plot:
    x = alt.X("angle:Q", title="angle, radians" if last or level == 1 else None).scale(nice=False)
    y = alt.Y("density:Q", title=[f"level {level}", "density"]).axis(tickCount=3)
    base = marks.only(level=level).encode(x=x)
    measured = base.mark_line(interpolate="step", strokeWidth=1.5)
    means = base.transform_aggregate(expected="mean(expected)", groupby=["angle"])
    expected = means.mark_line(strokeDash=[4, 3], strokeWidth=1.5, color=theme.NEUTRAL).encode(y=alt.Y("expected:Q"))
    colour, told = marks.tensor_colour(legend=level == 1), columns.tips("tensor", "angle", "density")
    return alt.layer(measured.encode(y=y, color=colour, tooltip=told), expected)
