"""How long attention over a long context takes, beside what moving its bytes alone would."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, scales, theme
from veloxlab.views.memory import MEGABYTE

ROW = 17  # pixels of a cache's bar


def attention_times(
    frame: pl.DataFrame, *, heading: str = "Attention of one token", caption: str | None = None
) -> alt.VConcatChart:
    """Draw the time of attention as bars, a panel for each length of the context, and as a tick what memory would take.

    Rows of one shape of `veloxlab.measure.bench.decode_attention`: ``cache``, ``tokens``, ``microseconds``,
    ``roofline_microseconds`` (the call's bytes at the device's copying speed) and ``ratio`` (to the exact cache).
    ``heading``: what is seen, such as the device.
    """
    needed = ("cache", "tokens", "microseconds", "roofline_microseconds", "ratio")
    shown = columns.require(frame, "attention_times", *needed).sort("tokens", maintain_order=True)
    caches = shown["cache"].unique(maintain_order=True).to_list()
    lengths = shown["tokens"].unique(maintain_order=True).to_list()
    height = ROW * len(caches)
    plots = marks.panels(lengths, lambda tokens, last: _times(tokens, caches, last), theme.WIDTH - 150, height)
    return marks.framed(plots, shown, heading, caption, times_caption(frame))


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


def _times(tokens: int, caches: list[str], last: bool) -> marks.Plot:
    y = alt.Y("cache:N", sort=caches, title=None).axis(ticks=False, labelLimit=160, minExtent=110)
    base = marks.only(tokens=tokens).encode(y=y)
    title = [f"µs at {tokens:,} tokens", *(["(ratio to exact beside each bar)"] if last else [])]
    told = columns.tips("cache", "tokens", "microseconds", "roofline_microseconds", ("ratio", "ratio to exact", ".2f"))
    bars = base.mark_bar(height=ROW - 5, cornerRadiusEnd=2)
    ticks = base.mark_tick(thickness=2, size=ROW - 3, color=theme.PICKED).encode(x="roofline_microseconds:Q")
    words = "format(datum.microseconds, '.0f') + ' µs  ' + format(datum.ratio, '.2f') + '×'"
    text = base.transform_calculate(label=words).mark_text(align="left", dx=5)
    x = alt.X("microseconds:Q", title=title)
    bars = bars.encode(x=x, color=marks.cache_colour(caches), tooltip=told)
    return alt.layer(bars, ticks, text.encode(x="microseconds:Q", text="label:N"))


PANELS = {  # column: axis title and unit
    "prefill_peak_bytes": (["peak while reading", "MB"], MEGABYTE),
    "decode_peak_bytes": (["peak while continuing", "MB"], MEGABYTE),
    "decode_seconds": (["a token behind it", "ms"], 1e-3),
}


def costs_by_length(
    frame: pl.DataFrame, *, heading: str = "Peak memory and time per token against the length of a text",
    caption: str | None = None,
) -> alt.VConcatChart:  # fmt: skip
    """Draw peaks of memory and the time of a token against the tokens of the text, a line for each cache.

    Rows of `veloxlab.measure.lengths.LENGTHS`: ``cache``, ``tokens`` and the three measures of `PANELS`. ``heading``:
    what is seen, such as the model.
    """
    shown = columns.require(frame, "costs_by_length", "cache", "tokens", *PANELS).sort("tokens", maintain_order=True)
    caches, tokens = shown["cache"].unique(maintain_order=True).to_list(), _lengths(shown)
    plots = marks.panels(list(PANELS), lambda name, last: _costs(name, caches, tokens, last), theme.WIDTH, 130)
    return marks.framed(plots, shown, heading, caption, lengths_caption(frame))


def lengths_caption(frame: pl.DataFrame) -> str:
    """Say how the last cache's peaks compare with the first one's at the longest text that both have."""
    caches = frame["cache"].unique(maintain_order=True).to_list()
    peaks = ("prefill_peak_bytes", "decode_peak_bytes")
    whole = frame.drop_nulls(["tokens", *peaks])
    shared = [set(_lengths(whole.filter(pl.col("cache") == name))) for name in (caches[0], caches[-1])]
    left_out = scales.not_drawn(frame["tokens"], zero=True)
    if len(caches) < 2 or not shared[0] & shared[1]:
        return marks.sentence("Memory beside the model's weights, and the time of one more token", *left_out)
    longest = max(shared[0] & shared[1])
    rows = {row["cache"]: row for row in whole.filter(pl.col("tokens") == longest).iter_rows(named=True)}
    reading, continuing = (f"{rows[caches[-1]][name] / rows[caches[0]][name]:.2f}" for name in peaks)
    said = (
        f"At {longest:,} tokens {caches[-1]} peaks at {reading} of {caches[0]}'s memory while reading, "
        f"at {continuing} while continuing"
    )
    return marks.sentence(said, *left_out)


def _lengths(frame: pl.DataFrame) -> list[int]:
    """Numbers of tokens that have a place on a log scale."""
    tokens = frame["tokens"].unique().sort()
    return tokens.filter(tokens.is_finite() & (tokens > 0)).to_list()


def _costs(name: str, caches: list[str], tokens: list[int], last: bool) -> marks.Plot:
    title, unit = PANELS[name]
    axis = alt.Axis(values=tokens, format=",d", labels=last, ticks=last, title="tokens of text" if last else None)
    legend = alt.Legend(title=None, orient="top") if name == next(iter(PANELS)) else None
    base = (
        scales.on_log_scale(alt.Chart(), "tokens")
        .transform_filter(f"isValid(datum.{name})")
        .transform_calculate(shown=f"datum.{name} / {unit}")
        .encode(
            x=alt.X("tokens_drawn:Q", axis=axis).scale(type="log", base=2, nice=False),
            y=alt.Y("shown:Q", title=title).axis(tickCount=4).scale(zero=True),
            color=marks.cache_colour(caches).legend(legend),
        )
    )
    return marks.line_points(base, columns.tips("cache", "tokens", ("shown", " in ".join(title), ",.3~r")))
