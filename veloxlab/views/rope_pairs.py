"""The pairs of channels that RoPE turns: how much energy each holds, and one of them before and after."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import one_head, require
from veloxlab.views.furniture import caption_title, framed, head_words

STAGES = ("before RoPE", "after RoPE")
PARTS = {"mean vector": 1.0, "around it": 0.4}


def pair_energy(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw the energy of each RoPE pair of one head's keys, and how much of it is their mean before RoPE.

    Parameters
    ----------
    frame
        Rows of one head of `veloxlab.measure.rope_pairs.PAIRS`.
    caption
        The line under the heading; by default how the energy lies between fast and slow pairs.
    """
    numbers = ("layer", "head", "pair", "first", "second", "wavelength", "energy_share", "mean_share")
    require(frame, dict.fromkeys(numbers, "number"), "pair_energy")
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
        .mark_bar(color=palette.KEYS)
        .encode(
            x=alt.X("pair:O", title=title),
            y=alt.Y("share:Q", title=["keys", "share of energy"]).axis(format="%", tickCount=5),
            opacity=alt.Opacity("what:N", title=None)
            .scale(domain=list(PARTS), range=list(PARTS.values()))
            .legend(symbolFillColor=palette.KEYS, symbolStrokeWidth=0, symbolType="square"),
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("pair:O"),
                alt.Tooltip("first:O", title="channel"),
                alt.Tooltip("second:O", title="and channel"),
                alt.Tooltip("wavelength:Q", title="tokens a turn", format=",.3~g"),
                alt.Tooltip("what:N"),
                alt.Tooltip("share:Q", format=".2%"),
            ],
        )
        .properties(width=palette.WIDTH - 90, height=150, title=caption_title())
    )
    words = pair_caption(frame) if caption is None else caption
    return framed([bars], shown, "Energy of the pairs of channels that RoPE turns", words, pickable=False)


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

    Parameters
    ----------
    frame
        Rows of `veloxlab.measure.rope_pairs.PAIR_POINTS`. Later tokens are stronger.
    heading
        What is seen, such as layer, head and pair.
    caption
        The line under the heading; by default how many tokens are drawn.
    """
    require(frame, {"stage": "text", "position": "number", "x": "number", "y": "number"}, "pair_turns")
    shown = frame.select("stage", "position", "x", "y")
    reach = float(max(shown["x"].abs().max(), shown["y"].abs().max(), 1e-12)) * 1.05  # type: ignore[type-var, arg-type]
    panels = [_cloud(stage, reach, first=stage == STAGES[0]) for stage in STAGES]
    side_by_side: alt.HConcatChart = alt.hconcat(*panels, spacing=24).properties(title=caption_title())
    words = caption or f"{shown['position'].n_unique()} tokens, from faint to strong; a cross marks their mean"
    return framed([side_by_side], shown, heading, words, pickable=False)


def _cloud(stage: str, reach: float, *, first: bool) -> alt.LayerChart:
    own = alt.Chart().transform_filter(f"datum.stage === '{stage}'")
    x = alt.X("x:Q", title=f"first coordinate, {stage}").scale(domain=[-reach, reach], nice=False)
    y = alt.Y("y:Q", title="second coordinate" if first else None).scale(domain=[-reach, reach], nice=False)
    points = own.mark_circle(size=14, color=palette.KEYS).encode(
        x=x.axis(tickCount=5),
        y=y.axis(tickCount=5),
        opacity=alt.Opacity("position:Q", legend=None).scale(range=[0.15, 0.9]),
        tooltip=[alt.Tooltip("position:Q"), alt.Tooltip("x:Q", format=".3~g"), alt.Tooltip("y:Q", format=".3~g")],
    )
    mean = (
        own.transform_aggregate(x="mean(x)", y="mean(y)")
        .mark_text(text="+", fontSize=22, fontWeight="bold")
        .encode(x="x:Q", y="y:Q")
    )
    layered: alt.LayerChart = alt.layer(points, mean)  # type: ignore[assignment]
    return layered.properties(width=230, height=230)
