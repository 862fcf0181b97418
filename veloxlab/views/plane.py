"""What bits of keys and bits of values are worth: the divergence of each pair, and the best pair of each budget."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, theme

CELL = 62  # pixels
SIZE = 900  # square pixels


def bit_plane(frame: pl.DataFrame, *, domain: columns.Domain | None = None, caption: str = "") -> alt.VConcatChart:
    """Draw the divergence of each pair of widths, and outline the best pair of each budget.

    Rows of ``key_bits`` and ``value_bits`` (bits of a code) and ``kl`` (nats), one for each pair. Pairs with one sum of
    bits share a budget. A divergence of zero has the colour of the floor; one that is not finite is left out.
    ``domain``: least and greatest KL of the scale; give one to compare charts.
    """
    needed = columns.require(frame, "bit_plane", "key_bits value_bits kl")
    best = best_pairs(needed).select("key_bits", "value_bits", best=True)
    shown = needed.join(best, on=["key_bits", "value_bits"], how="left").with_columns(pl.col("best").fill_null(False))
    scale = domain or columns.log_domain(shown["kl"])
    base = columns.on_log_scale(alt.Chart(), "kl", scale).encode(
        x=columns.x("value_bits:O", "code bits of values"),
        y=columns.y("key_bits:O", "code bits of keys", reverse=True),
        tooltip=columns.tips("key_bits value_bits kl"),
    )
    cells = base.mark_square(size=SIZE, opacity=1).encode(color=columns.log_colour("kl", "nats", scale))
    outlined = base.transform_filter("datum.best").mark_square(
        size=SIZE, filled=False, stroke=theme.PICKED, strokeWidth=3, strokeOpacity=1
    )
    # below its square: no one colour of words reads on all colours of a scale
    words = base.mark_text(fontSize=11, dy=24).encode(text=alt.Text("kl:Q", format=".2~g"))
    widths = [needed[name].n_unique() for name in ("value_bits", "key_bits")]
    plot = marks.sized(marks.layered(cells, outlined, words), *(CELL * count for count in widths))
    return marks.framed([plot], shown, "KL divergence by bits of keys and of values", caption or plane_caption(frame))


def best_pairs(frame: pl.DataFrame) -> pl.DataFrame:
    """Give the pair with the least finite ``kl`` of each sum of bits that more than one pair has: rows, by the sum."""
    sums = frame.filter(pl.col("kl").is_finite()).with_columns(sum=pl.col("key_bits") + pl.col("value_bits"))
    several = sums.filter(pl.len().over("sum") > 1)
    return several.sort("sum", "kl").group_by("sum", maintain_order=True).first()


def plane_caption(frame: pl.DataFrame) -> str:
    """Say which pair is best at each budget, and how many are not drawn."""
    pairs = [f"K{key} V{value}" for key, value in best_pairs(frame).select("key_bits", "value_bits").iter_rows()]
    said = f"Outlined, the best pair of each sum of bits: {', '.join(pairs)}" if pairs else ""
    return marks.sentence(said, *columns.not_drawn(frame["kl"]))
