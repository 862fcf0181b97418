"""Effective dimensions of keys and values: the spectrum of one head, effective dimensions by layer, and RoPE pairs."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, theme

ABOUT = {"origin": "with the mean vector", "mean": "without it"}
DASHES = dict(zip(ABOUT.values(), ([4, 3], [1, 0]), strict=True))
WITH_MEAN = marks.scaled(alt.StrokeDash, "seen", DASHES).legend(symbolType="stroke")
SEEN = "datum.{} ? '{origin}' : '{mean}'".format("{}", **ABOUT)  # a Vega expression that chooses the words by a test
FLOOR = 1e-4  # smaller shares are drawn here
MEANS = [pl.col(n).filter(pl.col(n).is_finite()).mean() for n in ("uncentred", "centred", "mean_share")]


def spectrum(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the share of energy in each direction of one head, with its mean vector (dashed) and without.

    Rows of one head of `veloxlab.measure.spectra.SPECTRUM`.
    """
    shown = columns.require_head(frame, "spectrum", "tensor about rank share")
    domain = (FLOOR, 1.0)
    base = columns.on_log_scale(alt.Chart(), "share", domain)
    line = (
        base.transform_calculate(seen=SEEN.format("about === 'origin'"))
        .mark_line(strokeWidth=1.8)
        .encode(
            x=columns.x("rank", nice=False, domainMin=1, tickMinStep=1),
            y=columns.log_y("share", ["one direction's", "share of energy"], domain),
            color=marks.tensor_colour(),
            strokeDash=WITH_MEAN,
            tooltip=columns.tips("tensor seen rank share"),
        )
    )
    plots = [marks.sized(line, theme.WIDTH - 110, 190)]
    heading = "Share of energy in each direction of one head"
    return marks.framed(plots, shown, heading, caption or spectrum_caption(frame))


def spectrum_caption(frame: pl.DataFrame) -> str:
    """State the effective dimensions (Σλ)² / Σλ² of keys and of values, with the mean vector and without."""
    said = []
    for tensor, own in marks.by_tensor(frame.filter(pl.col("share").is_finite())):
        squares = [own.filter(pl.col("about") == about)["share"].pow(2).sum() for about in ABOUT]
        found = [1 / square if square else 0.0 for square in squares]  # a head of zeros has no direction
        said.append(f"{tensor} {found[0]:.1f} with the mean, {found[1]:.1f} without it")
    said += columns.not_drawn(frame["share"])
    return f"{marks.head_words(frame)}. Effective dimensions: {marks.sentence(*said)}"


def dimensions_by_layer(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the effective dimensions of every layer, with and without the mean vector, and the mean vector's share.

    Rows of `veloxlab.measure.spectra.DIMENSIONS`; heads are averaged.
    """
    columns.require(frame, "dimensions_by_layer", "tensor layer head head_dim uncentred centred mean_share")
    means = frame.group_by("layer", "tensor", maintain_order=True).agg(*MEANS)
    domain = columns.log_domain([*means["uncentred"], *means["centred"]])
    both = alt.Chart().transform_fold(["uncentred", "centred"], as_=["which", "dimensions"])
    both = columns.on_log_scale(both, "dimensions", domain)
    counts = both.transform_calculate(seen=SEEN.format("which === 'uncentred'")).encode(
        x=marks.layer_axis(labelled=False),
        y=columns.log_y("dimensions", ["effective dimensions", "mean over KV heads"], domain),
        color=marks.tensor_colour(),
        strokeDash=WITH_MEAN,
    )
    shares = alt.Chart().encode(
        x=marks.layer_axis(),
        y=columns.y("mean_share", domain=[0, 1], format="%", tickCount=3),
        color=marks.tensor_colour(legend=False),
    )
    above = marks.lines_by_layer(counts, columns.tips("layer tensor seen dimensions"), 26, strokeDash=alt.StrokeDash())
    below = marks.lines_by_layer(shares, columns.tips("layer tensor mean_share"), 26)
    width = alt.Step(0.88 * marks.layer_step(means["layer"].n_unique()))  # room for a broad legend
    plots = [marks.sized(plot, width, height) for plot, height in ((above, 150), (below, 80))]
    said = caption or dimensions_caption(frame)
    return marks.framed(plots, means, "Effective dimensions, and the mean vector's share", said, pickable=True)


def dimensions_caption(frame: pl.DataFrame) -> str:
    """State the mean effective dimensions over all heads, and the mean vector's share of energy."""
    means = frame.group_by("tensor").agg(*MEANS).drop_nulls()
    rows = [own.row(0, named=True) for _, own in marks.by_tensor(means)]
    counts = ("{tensor} {uncentred:.1f} with the mean, {centred:.1f} without".format(**row) for row in rows)
    shares = " and ".join(f"{100 * row['mean_share']:.0f} %" for row in rows)
    said = f"Of {frame['head_dim'][0]}: {marks.sentence(*counts)}. The mean vector holds {shares}"
    both = pl.concat([frame["uncentred"], frame["centred"].rename("uncentred")])
    return marks.sentence(said, *columns.not_drawn(both))


STAGES = ("before RoPE", "after RoPE")
PARTS = {"mean vector": 1.0, "around it": 0.4}


def pair_energy(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the energy of each RoPE pair of one head's keys, and the share of it in the keys' mean before RoPE.

    Rows of one head of `veloxlab.measure.spectra.PAIRS`.
    """
    shown = columns.require_head(frame, "pair_energy", "pair first second wavelength energy_share mean_share")
    ends = shown.sort("pair")["wavelength"]
    parts = "datum.part === 'mean' ? '{}' : '{}'".format(*PARTS)
    bars = (
        alt.Chart()
        .transform_calculate(mean="datum.energy_share * datum.mean_share", rest="datum.energy_share - datum.mean")
        .transform_fold(["mean", "rest"], as_=["part", "share"])
        .transform_calculate(what=parts, order="datum.part === 'mean' ? 0 : 1")
        .mark_bar(color=theme.KEYS)
        .encode(
            x=columns.x("pair", f"pair, from a turn in {ends[0]:,.3g} tokens to one in {ends[-1]:,.0f}"),
            y=columns.y("share", ["keys", "share of energy"], format="%", tickCount=5),
            opacity=marks.part_opacity("what", PARTS, theme.KEYS),
            order=alt.Order("order:Q"),
            tooltip=columns.tips("pair first second wavelength what share"),
        )
        .properties(width=theme.WIDTH - 90, height=150)
    )
    said = caption or pair_caption(frame)
    return marks.framed([bars], shown, "Energy of the pairs of channels that RoPE turns", said)


def pair_caption(frame: pl.DataFrame) -> str:
    """State the pair with the most energy, and the energy of the slower half of the pairs."""
    most = frame.sort("energy_share", "pair").row(-1, named=True)
    slow = frame.filter(pl.col("pair") >= pl.col("pair").max() / 2)["energy_share"].sum()
    return (
        f"{marks.head_words(frame)}. Pair {most['pair']} (channels {most['first']} and {most['second']}) holds "
        f"{100 * most['energy_share']:.0f} %, {100 * most['mean_share']:.0f} % of it its mean; "
        f"the slower half {100 * slow:.0f} %"
    )


def pair_turns(
    frame: pl.DataFrame, *, heading: str = "One pair of channels of the keys", caption: str = ""
) -> alt.VConcatChart:
    """Draw one pair of channels over the tokens, before and after RoPE, side by side on one scale.

    Rows of `veloxlab.measure.spectra.PAIR_POINTS`. Later tokens have stronger colours. ``heading``: for instance layer,
    head and pair.
    """
    shown = columns.require(frame, "pair_turns", "stage position x y")
    reach = 1.05 * max(1e-12, *shown.select(pl.col("x", "y").abs().max()).row(0))
    look = {"domain": [-reach, reach], "nice": False, "tickCount": 5}

    def draw(stage: str, last: bool) -> marks.Plot:
        own = marks.only(stage=stage)
        dots = own.mark_circle(size=14, color=theme.KEYS).encode(
            x=columns.x("x", f"first coordinate, {stage}", **look),
            y=columns.y("y", None if last else "second coordinate", **look),
            opacity=alt.Opacity("position:Q", legend=None).scale(range=[0.15, 0.9]),
            tooltip=columns.tips("position x y"),
        )
        mean = own.transform_aggregate(x="mean(x)", y="mean(y)").mark_text(text="+", fontSize=22, fontWeight="bold")
        return marks.layered(dots, mean.encode(x=alt.X("x:Q"), y=alt.Y("y:Q")))

    plots = marks.stacked(alt.HConcatChart, marks.panels(STAGES, draw, 230, 230), 24)
    usual = f"{shown['position'].n_unique()} tokens, from faint to strong; a cross marks their mean"
    return marks.framed([plots], shown, heading, caption or usual)
