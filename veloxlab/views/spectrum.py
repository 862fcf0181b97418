"""How many directions keys and values take up: the spectrum of one head, and effective dimensions by layer."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import theme
from veloxlab.views.furniture import (
    Plot,
    framed,
    head_words,
    layer_axis,
    layer_step,
    lines_by_layer,
    one_head,
    require,
    tensor_colour,
    tips,
)
from veloxlab.views.scales import log_domain, log_y, not_drawn, on_log_scale

ABOUT = {"origin": "with the mean vector", "mean": "without it"}
DASHES = ([4, 3], [1, 0])
FLOOR = 1e-4  # shares below are drawn there
MEANS = [pl.col(n).filter(pl.col(n).is_finite()).mean() for n in ("uncentred", "centred", "mean_share")]


def spectrum(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the share of energy in each direction of one head, with its mean vector (dashed) and without.

    Rows of one head of `veloxlab.measure.spectra.SPECTRUM`.
    """
    numbers = ("layer", "head", "rank", "share")
    require(frame, "spectrum", "tensor", "about", *numbers)
    one_head(frame, "spectrum")
    shown = frame.select("tensor", "about", "rank", "share")
    domain = (FLOOR, 1.0)
    line = (
        on_log_scale(alt.Chart(), "share", domain)
        .transform_calculate(seen=f"datum.about === 'origin' ? '{ABOUT['origin']}' : '{ABOUT['mean']}'")
        .mark_line(strokeWidth=1.8)
        .encode(
            x=alt.X("rank:Q", title="direction, the strongest first")
            .scale(nice=False, domainMin=1)
            .axis(tickMinStep=1),
            y=log_y("share", ["one direction's", "share of energy"], domain),
            color=tensor_colour(),
            strokeDash=_with_mean(),
            tooltip=tips("tensor:N", "seen:N", "rank:Q", ("share:Q", None, ".3~g")),
        )
        .properties(width=theme.WIDTH - 110, height=190)
    )
    usual = spectrum_caption(frame)
    return framed([line], shown, "Directions that hold the energy of one head", caption, usual, dashed=True)


def spectrum_caption(frame: pl.DataFrame) -> str:
    """Say the effective dimensions (Σλ)² / Σλ² of keys and of values, with the mean vector and without."""
    said = []
    for tensor in theme.TENSORS:
        own = frame.filter(pl.col("tensor") == tensor, pl.col("share").is_finite())
        squares = [own.filter(pl.col("about") == about)["share"].pow(2).sum() for about in ABOUT]
        found = [1 / float(square) if square else 0.0 for square in squares]  # a head of zeros has no direction
        if not own.is_empty():
            said.append(f"{tensor} {found[0]:.1f} with the mean, {found[1]:.1f} without it")
    return f"{head_words(frame)}. Effective dimensions: " + "; ".join([*said, *not_drawn(frame["share"])])


def dimensions_by_layer(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw effective dimensions of every layer with and without the mean vector, and what the mean vector holds.

    Rows of `veloxlab.measure.spectra.DIMENSIONS`; heads are averaged.
    """
    numbers = ("layer", "head", "head_dim", "uncentred", "centred", "mean_share")
    require(frame, "dimensions_by_layer", "tensor", *numbers)
    means = frame.group_by("layer", "tensor", maintain_order=True).agg(*MEANS)
    step = 0.88 * layer_step(means["layer"].n_unique())  # room for a broad legend
    plots = [
        _counts(means).properties(width=alt.Step(step), height=150),
        _mean_shares().properties(width=alt.Step(step), height=80),
    ]
    return framed(
        plots,
        means,
        "Effective dimensions, and the mean vector's share",
        caption,
        dimensions_caption(frame),
        pickable=True,
        dashed=True,
    )


def dimensions_caption(frame: pl.DataFrame) -> str:
    """Say the mean effective dimensions over all heads, and the share of energy that is the mean vector."""
    means = frame.group_by("tensor").agg(*MEANS).drop_nulls()
    rows = {row["tensor"]: row for row in means.iter_rows(named=True)}
    own = [(tensor, rows[tensor]) for tensor in theme.TENSORS if tensor in rows]
    counts = "; ".join(
        f"{tensor} {row['uncentred']:.1f} with the mean, {row['centred']:.1f} without" for tensor, row in own
    )
    shares = " and ".join(f"{100 * row['mean_share']:.0f} %" for _, row in own)
    said = f"Of {frame['head_dim'][0]}: {counts}. The mean vector holds {shares}"
    return "; ".join([said, *not_drawn(pl.concat([frame["uncentred"], frame["centred"].rename("uncentred")]))])


def _counts(means: pl.DataFrame) -> Plot:
    domain = log_domain([*means["uncentred"], *means["centred"]])
    counts = alt.Chart().transform_fold(["uncentred", "centred"], as_=["which", "dimensions"])
    marks = (
        on_log_scale(counts, "dimensions", domain)
        .transform_calculate(seen=f"datum.which === 'uncentred' ? '{ABOUT['origin']}' : '{ABOUT['mean']}'")
        .encode(
            x=layer_axis(labelled=False),
            y=log_y("dimensions", ["effective dimensions", "mean over KV heads"], domain),
            color=tensor_colour(),
            strokeDash=_with_mean(),
        )
    )
    tooltip = tips("layer:O", "tensor:N", "seen:N")
    points = marks.mark_point(filled=True, size=26, opacity=1, cursor="pointer").encode(
        strokeDash=alt.StrokeDash(), tooltip=[*tooltip, alt.Tooltip("dimensions:Q", format=".3~g")]
    )
    return lines_by_layer(marks, points)


def _mean_shares() -> Plot:
    marks = alt.Chart().encode(
        x=layer_axis(labelled=True),
        y=alt.Y("mean_share:Q", title=["mean vector's", "share of energy"])
        .scale(domain=[0, 1])
        .axis(format="%", tickCount=3),
        color=tensor_colour(legend=False),
    )
    tooltip = tips("layer:O", "tensor:N", ("mean_share:Q", None, ".1%"))
    points = marks.mark_point(filled=True, size=26, opacity=1, cursor="pointer").encode(tooltip=tooltip)
    return lines_by_layer(marks, points)


def _with_mean() -> alt.StrokeDash:
    dash: alt.StrokeDash = alt.StrokeDash("seen:N", title=None).scale(domain=list(ABOUT.values()), range=list(DASHES))
    return dash.legend(symbolType="stroke")


STAGES = ("before RoPE", "after RoPE")
PARTS = {"mean vector": 1.0, "around it": 0.4}


def pair_energy(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the energy of each RoPE pair of one head's keys, and how much of it is their mean before RoPE.

    Rows of one head of `veloxlab.measure.spectra.PAIRS`.
    """
    numbers = ("layer", "head", "pair", "first", "second", "wavelength", "energy_share", "mean_share")
    require(frame, "pair_energy", *numbers)
    one_head(frame, "pair_energy")
    shown = frame.select(*numbers[2:])
    ends = shown.sort("pair")["wavelength"]
    title = f"pair, from a turn in {ends[0]:,.3g} tokens to one in {ends[-1]:,.0f}"
    parts = "datum.part === 'mean' ? '{}' : '{}'".format(*PARTS)
    bars = (
        alt.Chart()
        .transform_calculate(mean="datum.energy_share * datum.mean_share", rest="datum.energy_share - datum.mean")
        .transform_fold(["mean", "rest"], as_=["part", "share"])
        .transform_calculate(what=parts, order="datum.part === 'mean' ? 0 : 1")
        .mark_bar(color=theme.KEYS)
        .encode(
            x=alt.X("pair:O", title=title),
            y=alt.Y("share:Q", title=["keys", "share of energy"]).axis(format="%", tickCount=5),
            opacity=alt.Opacity("what:N", title=None)
            .scale(domain=list(PARTS), range=list(PARTS.values()))
            .legend(symbolFillColor=theme.KEYS, symbolStrokeWidth=0, symbolType="square"),
            order=alt.Order("order:Q"),
            tooltip=tips(
                "pair:O",
                ("first:O", "channel"),
                ("second:O", "and channel"),
                ("wavelength:Q", "tokens a turn", ",.3~g"),
                "what:N",
                ("share:Q", None, ".2%"),
            ),
        )
        .properties(width=theme.WIDTH - 90, height=150)
    )
    return framed([bars], shown, "Energy of the pairs of channels that RoPE turns", caption, pair_caption(frame))


def pair_caption(frame: pl.DataFrame) -> str:
    """Say which pair holds most, and what the slower half of the pairs holds together."""
    own = frame.sort("energy_share", "pair")
    most = own.row(-1, named=True)
    slow = frame.filter(pl.col("pair") >= pl.col("pair").max() / 2)["energy_share"].sum()
    channels = f"channels {most['first']} and {most['second']}"
    return (
        f"{head_words(frame)}. Pair {most['pair']} ({channels}) holds {100 * most['energy_share']:.0f} %, "
        f"{100 * most['mean_share']:.0f} % of it its mean; the slower half {100 * slow:.0f} %"
    )


def pair_turns(
    frame: pl.DataFrame, *, heading: str = "One pair of channels of the keys", caption: str = ""
) -> alt.VConcatChart:
    """Draw one pair of channels over the tokens, before and after RoPE, side by side in one scale.

    Rows of `veloxlab.measure.spectra.PAIR_POINTS`. Later tokens are stronger. ``heading``: what is seen, such as layer,
    head and pair.
    """
    require(frame, "pair_turns", "stage", "position", "x", "y")
    shown = frame.select("stage", "position", "x", "y")
    reach = float(max(shown["x"].abs().max(), shown["y"].abs().max(), 1e-12)) * 1.05  # type: ignore[type-var, arg-type]
    panels = [_cloud(stage, reach, first=stage == STAGES[0]) for stage in STAGES]
    side_by_side: alt.HConcatChart = alt.hconcat(*panels, spacing=24)
    usual = f"{shown['position'].n_unique()} tokens, from faint to strong; a cross marks their mean"
    return framed([side_by_side], shown, heading, caption or None, usual)


def _cloud(stage: str, reach: float, *, first: bool) -> alt.LayerChart:
    own = alt.Chart().transform_filter(f"datum.stage === '{stage}'")
    x = alt.X("x:Q", title=f"first coordinate, {stage}").scale(domain=[-reach, reach], nice=False)
    y = alt.Y("y:Q", title="second coordinate" if first else None).scale(domain=[-reach, reach], nice=False)
    points = own.mark_circle(size=14, color=theme.KEYS).encode(
        x=x.axis(tickCount=5),
        y=y.axis(tickCount=5),
        opacity=alt.Opacity("position:Q", legend=None).scale(range=[0.15, 0.9]),
        tooltip=tips("position:Q", ("x:Q", None, ".3~g"), ("y:Q", None, ".3~g")),
    )
    mean = (
        own.transform_aggregate(x="mean(x)", y="mean(y)")
        .mark_text(text="+", fontSize=22, fontWeight="bold")
        .encode(x="x:Q", y="y:Q")
    )
    layered: alt.LayerChart = alt.layer(points, mean)  # type: ignore[assignment]
    return layered.properties(width=230, height=230)
