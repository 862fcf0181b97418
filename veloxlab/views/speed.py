"""How long attention over a long context takes, beside what moving its bytes alone would."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import theme
from veloxlab.views.furniture import cache_colour, framed, require, tips
from veloxlab.views.memory import MEGABYTE
from veloxlab.views.scales import not_drawn, on_log_scale

ROW = 17  # pixels of a cache's bar


def attention_times(
    frame: pl.DataFrame, *, heading: str = "Attention of one token", caption: str | None = None
) -> alt.VConcatChart:
    """Draw the time of attention as bars, a panel for each length of the context, and as a tick what memory would take.

    Rows of one shape of `veloxlab.measure.bench.decode_attention`: ``cache``, ``tokens``, ``microseconds``,
    ``roofline_microseconds`` (the call's bytes at the device's copying speed) and ``ratio`` (to the exact cache).
    ``heading``: what is seen, such as the device.
    """
    needed = ("tokens", "microseconds", "roofline_microseconds", "ratio")
    require(frame, "attention_times", "cache", *needed)
    shown = frame.select("cache", *needed).sort("tokens", maintain_order=True)
    caches = shown["cache"].unique(maintain_order=True).to_list()
    lengths = shown["tokens"].unique(maintain_order=True).to_list()
    plots = [_panel(length, caches, last=length == lengths[-1]) for length in lengths]
    return framed(plots, shown, heading, caption, times_caption(frame))


def times_caption(frame: pl.DataFrame) -> str:
    """Say how the fastest cache that is neither exact nor mlx-lm's compares at the longest context."""
    longest = frame.filter(pl.col("tokens") == pl.col("tokens").max())
    ours = longest.filter(~pl.col("cache").str.contains("^(exact|mlx-lm)")).sort("microseconds")
    if ours.is_empty():
        return "Bars: measured; ticks: what moving the bytes alone would take"
    best = ours.row(0, named=True)
    return (
        f"At {best['tokens']:,} tokens {best['cache']} takes {best['ratio']:.2f} of exact's time; "
        "ticks: what its bytes alone would take"
    )


def _panel(tokens: int, caches: list[str], *, last: bool) -> alt.LayerChart:
    base = (
        alt.Chart()
        .transform_filter(f"datum.tokens === {tokens}")
        .encode(y=alt.Y("cache:N", sort=caches, title=None).axis(ticks=False, labelLimit=160, minExtent=110))
    )
    colours = cache_colour(caches)
    title = [f"µs at {tokens:,} tokens"]
    x = alt.X("microseconds:Q", title=title if not last else [*title, "(ratio to exact beside each bar)"])
    tooltip = tips(
        "cache:N",
        ("tokens:Q", None, ",d"),
        ("microseconds:Q", "µs, measured", ".0f"),
        ("roofline_microseconds:Q", "µs, bytes alone", ".0f"),
        ("ratio:Q", "of exact's time", ".2f"),
    )
    bars = base.mark_bar(height=ROW - 5, cornerRadiusEnd=2).encode(x=x, color=colours, tooltip=tooltip)
    ticks = base.mark_tick(thickness=2, size=ROW - 3, color=theme.PICKED).encode(x="roofline_microseconds:Q")
    text = (
        base.transform_calculate(label="format(datum.microseconds, '.0f') + ' µs  ' + format(datum.ratio, '.2f') + '×'")
        .mark_text(align="left", dx=5)
        .encode(x="microseconds:Q", text="label:N")
    )
    layered: alt.LayerChart = alt.layer(bars, ticks, text)  # type: ignore[assignment]
    return layered.properties(width=theme.WIDTH - 150, height=ROW * len(caches))


PANELS = (
    ("prefill_peak_bytes", ["peak while reading", "MB"], MEGABYTE),
    ("decode_peak_bytes", ["peak while continuing", "MB"], MEGABYTE),
    ("decode_seconds", ["a token behind it", "ms"], 1e-3),
)


def costs_by_length(
    frame: pl.DataFrame, *, heading: str = "What a length of text costs", caption: str | None = None
) -> alt.VConcatChart:
    """Draw peaks of memory and the time of a token against the tokens of the text, a line for each cache.

    Rows of `veloxlab.measure.lengths.LENGTHS`: ``cache``, ``tokens`` and the three measures of `PANELS`. ``heading``:
    what is seen, such as the model.
    """
    needed = ("cache", "tokens", *(name for name, _, _ in PANELS))
    require(frame, "costs_by_length", *needed)
    shown = frame.select(*needed).sort("tokens", maintain_order=True)
    caches = shown["cache"].unique(maintain_order=True).to_list()
    plots = [
        _cost_panel(name, title, unit, caches, _lengths(shown), place)
        for place, (name, title, unit) in enumerate(PANELS)
    ]
    return framed(plots, shown, heading, caption, lengths_caption(frame))


def lengths_caption(frame: pl.DataFrame) -> str:
    """Say how the last cache's peaks compare with the first one's at the longest text that both have."""
    caches = frame["cache"].unique(maintain_order=True).to_list()
    peaks = ("prefill_peak_bytes", "decode_peak_bytes")
    whole = frame.drop_nulls(["tokens", *peaks])
    shared = [set(_lengths(whole.filter(pl.col("cache") == name))) for name in (caches[0], caches[-1])]
    left_out = not_drawn(frame["tokens"], zero=True)
    if len(caches) < 2 or not shared[0] & shared[1]:
        return "; ".join(["Memory beside the model's weights, and the time of one more token", *left_out])
    longest = max(shared[0] & shared[1])
    rows = {row["cache"]: row for row in whole.filter(pl.col("tokens") == longest).iter_rows(named=True)}
    first, last = rows[caches[0]], rows[caches[-1]]
    shares = [f"{last[name] / first[name]:.2f}" for name in peaks]
    said = (
        f"At {longest:,} tokens {caches[-1]} peaks at {shares[0]} of {caches[0]}'s memory while reading, "
        f"at {shares[1]} while continuing"
    )
    return "; ".join([said, *left_out])


def _lengths(frame: pl.DataFrame) -> list[int]:
    """Numbers of tokens that have a place on a log scale."""
    tokens = frame["tokens"].unique().sort()
    return tokens.filter(tokens.is_finite() & (tokens > 0)).to_list()


def _cost_panel(
    name: str, title: list[str], unit: float, caches: list[str], tokens: list[int], place: int
) -> alt.LayerChart:
    last = place == len(PANELS) - 1
    colour = alt.Color("cache:N", legend=None if place else alt.Legend(title=None, orient="top")).scale(
        domain=caches, range=[theme.colour_of(cache) for cache in caches]
    )
    axis = alt.Axis(values=tokens, format=",d", labels=last, ticks=last, title="tokens of text" if last else None)
    base = (
        on_log_scale(alt.Chart(), "tokens")
        .transform_filter(f"isValid(datum.{name})")
        .transform_calculate(shown=f"datum.{name} / {unit}")
        .encode(
            x=alt.X("tokens_drawn:Q", axis=axis).scale(type="log", base=2, nice=False),
            y=alt.Y("shown:Q", title=title).axis(tickCount=4).scale(zero=True),
            color=colour,
        )
    )
    tooltip = tips("cache:N", ("tokens:Q", None, ",d"), ("shown:Q", " in ".join(title), ",.3~r"))
    line = base.mark_line(strokeWidth=2)
    points = base.mark_point(filled=True, size=34, opacity=1).encode(tooltip=tooltip)
    return alt.layer(line, points).properties(width=theme.WIDTH, height=130)  # type: ignore[return-value]
