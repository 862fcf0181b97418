"""Distributions of one head's coordinates: by channel, of all coordinates, and with a method's levels."""

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
MARKS = 1_800  # at most; more make a slider slow, so channels are then drawn in groups
MOST_SAID = 2  # a caption names each of at most this many panels
SHARES_SHOWN = 8  # the share of codes is written beside at most this many levels


def channel_ranges(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the range over the tokens of each channel of one head, a panel for each space and tensor.

    Rows of one head of `veloxlab.measure.distributions.CHANNELS`. A cross marks a channel with tokens that are not
    finite.
    """
    numbers = "channel mean rms least low high most"
    needed = columns.require_head(frame, "channel_ranges", f"tensor space {numbers} not_finite")
    group, words = marks.grouped(3 * frame.height, MARKS, "channel")
    shown = needed.group_by("space", "tensor", channel=pl.col("channel") // group * group, maintain_order=True).agg(
        pl.col("mean").mean(),
        pl.col("rms").pow(2).mean().sqrt(),
        pl.col("least", "low").min(),
        pl.col("high", "most").max(),
        pl.col("not_finite").sum(),
    )
    places = shown.select("space", "tensor").unique(maintain_order=True).rows()
    ends = {"begin": "datum.channel - 0.45", "to": f"datum.channel + {group} - 0.55"}

    def draw(place: tuple[str, str], last: bool) -> marks.Plot:
        space, tensor = place
        own, colour = marks.only(tensor=tensor, space=space), theme.TENSORS[tensor]
        x = columns.x("begin", words if last else None, nice=False, tickMinStep=1, labels=last)
        unit = [UNITS[space]] if space in UNITS else []
        y = columns.y("least", [tensor, *SPACE_WORDS[space].split(", "), *unit], tickCount=4)
        base = own.transform_calculate(**ends).encode(x=x, x2=alt.X2("to:Q"))
        told = base.encode(tooltip=columns.tips(numbers))
        zero = own.transform_aggregate(channels="count()").mark_rule(strokeWidth=0.5).encode(y=alt.datum(0))
        return marks.layered(
            zero,
            told.mark_rect(color=colour, opacity=0.25).encode(y=y, y2=alt.Y2("most:Q")),
            told.mark_rect(color=colour, opacity=0.45).encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q")),
            base.mark_rule(color=colour, strokeWidth=2).encode(y=alt.Y("mean:Q")),
            marks.crosses(own, x=alt.X("channel:Q"), tooltip=columns.tips("channel not_finite")),
        )

    plots = marks.panels(places, draw, theme.WIDTH, 130 if len(places) <= 2 else 84)
    return marks.framed(plots, shown, "Range of each channel of one head", caption or channel_caption(frame))


def channel_caption(frame: pl.DataFrame) -> str:
    """State the ratio of the largest channel to the median one in each panel, and the values that are not finite."""
    ratios, both = {}, frame["tensor"].n_unique() > 1
    rms = frame.group_by("space", "tensor", maintain_order=True).agg(usual=pl.median("rms"), largest=pl.max("rms"))
    for space, tensor, usual, largest in rms.iter_rows():
        if usual and largest is not None:
            ratios[f"{tensor} {SPACE_WORDS[space]}" if both else SPACE_WORDS[space]] = largest / usual
    if len(ratios) > MOST_SAID:
        ratios = dict(end(ratios.items(), key=lambda named: named[1]) for end in (max, min))
    said = ", ".join(f"{words} {ratio:.1f}" for words, ratio in ratios.items()) or "no channel has any size"
    lost = marks.broken(frame["not_finite"].sum())
    return marks.sentence(f"{marks.head_words(frame)}. Largest channel over the median one: {said}", lost)


def density(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the density of all coordinates of one head, a panel for each space, keys and values together.

    Rows of one head of `veloxlab.measure.distributions.DENSITIES`.
    """
    shown = columns.require_head(frame, "density", "tensor space value width density below above not_finite")
    shown = shown.drop("below", "above", "not_finite")
    spaces = shown["space"].unique(maintain_order=True).to_list()

    def draw(space: str, _: bool) -> marks.Plot:
        unit = UNITS.get(space, "in the unit of the activations")
        # a square root shows the tails, and 0
        title = [*SPACE_WORDS[space].split(", "), "density, √ scale"]
        area: alt.Chart = marks.only(space=space).mark_area(**marks.STEP_AREA)
        return area.encode(
            x=columns.x("value", f"coordinate, {unit}", nice=False),
            y=columns.y("density", title, stack=None, type="sqrt", tickCount=4),
            color=marks.tensor_colour(legend=space == spaces[0]),
            tooltip=columns.tips("tensor value density"),
        )

    plots = marks.panels(spaces, draw, theme.WIDTH, 150 if len(spaces) == 1 else 80)
    return marks.framed(plots, shown, "Density of all coordinates of one head", caption or density_caption(frame))


def density_caption(frame: pl.DataFrame) -> str:
    """State the greatest share of coordinates outside the range, and how many are not finite."""
    outside = max((100 * (frame["below"] + frame["above"])).drop_nulls(), default=0.0)
    heads = frame.group_by("tensor", "space").agg(pl.col("not_finite").first())
    said = f"{marks.head_words(frame)}. Beyond the ends lie {outside:.2f} % of coordinates at most"
    return marks.sentence(said, marks.broken(heads["not_finite"].sum()))


def levels_on_density(frame: pl.DataFrame, *, method: str = "", caption: str = "") -> alt.VConcatChart:
    """Draw the density of the quantized coordinates, with the levels of the method as lines; keys and values apart.

    Rows of one head of `veloxlab.measure.levels.LEVELS`. Vector codes have no levels of single coordinates: there, a
    line is the density of the decoded coordinates. ``method``: its name, for the caption.
    """
    shown = columns.require_head(frame, "levels_on_density", "tensor kind bits value width density share outside")
    shown = shown.drop("outside")

    def draw(tensor: str, last: bool) -> marks.Plot:
        colour = theme.TENSORS[tensor]
        base = marks.only(tensor=tensor).encode(x=columns.x("value", "" if last else None))
        of_kind = {kind: base.transform_filter(f"datum.kind === '{kind}'") for kind in ("exact", "decoded", "level")}
        exact = of_kind["exact"].mark_area(interpolate="step", color=colour, opacity=0.35)
        room = exact.transform_calculate(room="1.15 * datum.density").mark_point(opacity=0).encode(y=alt.Y("room:Q"))
        decoded = of_kind["decoded"].mark_line(interpolate="step", strokeWidth=1.5, color=colour)
        rules = of_kind["level"].mark_rule(color=colour, strokeWidth=1.5)
        told = columns.tips(("value", "level", ".4~g"), ("share", "share of codes"))
        layers = [
            exact.encode(y=columns.y("density", [tensor, "density"], tickCount=4)),
            room,
            decoded.encode(y=alt.Y("density:Q")),
            rules.encode(y=alt.value(14), y2=alt.value("height"), tooltip=told),
        ]
        if shown.filter(tensor=tensor, kind="level").height <= SHARES_SHOWN:
            share = alt.Text("share:Q", format=".0%")
            layers.append(of_kind["level"].mark_text(dy=-8).encode(y=alt.value(14), text=share))
        return marks.layered(*layers)

    plots = marks.panels(marks.tensors_of(frame), draw, theme.WIDTH, 110)
    said = caption or levels_caption(frame, method)
    heading = "Density of what is quantized, and the quantization levels"
    return marks.framed(plots, shown, heading, said, shared=["x"])


def levels_caption(frame: pl.DataFrame, method: str = "") -> str:
    """State method and head, and the number of levels for the coordinates of keys and of values."""
    counts = {tensor: own.filter(pl.col("kind") == "level").height for tensor, own in marks.by_tensor(frame)}
    said = [f"{tensor}: {f'{n} levels' if n else 'no common levels, a line'}" for tensor, n in counts.items()]
    bits = frame["bits"][0]
    name = f"{method} at {bits:g} {'bit' if bits == 1 else 'bits'}. " if method else ""
    return f"{name}{marks.head_words(frame)}. " + ", ".join(said)


def angle_densities(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the density of one head's polar angles, a panel for each level; dashed is the density of the codebooks.

    Rows of one head of `veloxlab.measure.levels.ANGLES`.
    """
    shown = columns.require_head(frame, "angle_densities", "tensor level angle density expected")

    def draw(level: int, last: bool) -> marks.Plot:
        base = marks.only(level=level).encode(x=columns.x("angle", "" if last or level == 1 else None, nice=False))
        means = base.transform_aggregate(expected="mean(expected)", groupby=["angle"])
        expected = means.mark_line(strokeDash=[4, 3], strokeWidth=1.5, color=theme.NEUTRAL)
        measured = base.mark_line(interpolate="step", strokeWidth=1.5).encode(
            y=columns.y("density", [f"level {level}", "density"], tickCount=3),
            color=marks.tensor_colour(legend=level == 1),
            tooltip=columns.tips("tensor angle density"),
        )
        return marks.layered(measured, expected.encode(y=alt.Y("expected:Q")))

    plots = marks.panels(shown["level"].unique().sort().to_list(), draw, theme.WIDTH - 90, 84)
    return marks.framed(plots, shown, "Density of PolarQuant's angles, by level", caption or angle_caption(frame))


def angle_caption(frame: pl.DataFrame) -> str:
    """State each level's share of angles outside the expected density: ½ Σ|density − expected| over the bins."""
    apart = 100 * (pl.col("density") - pl.col("expected")).abs().sum() / (pl.col("density").sum() * 2)
    shares = marks.by_tensor(frame.group_by("level", "tensor").agg(apart=apart).sort("level"))
    said = [f"{tensor} {', '.join(f'{share:.0f}' for share in own['apart'])} %" for tensor, own in shares]
    return f"{marks.head_words(frame)}. Share outside the expected density (dashed), by level: {marks.sentence(*said)}"
