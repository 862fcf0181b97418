"""One head's attention map: over exact keys, over compressed ones, and what moved between them."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, scales

KINDS = {"exact": "exact keys", "compressed": "compressed keys", "difference": "|difference|"}
DOMAIN = (1e-3, 1.0)
SIDE = 160  # pixels of a map


def attention_maps(
    frame: pl.DataFrame, *, heading: str = "Attention of one head", caption: str | None = None
) -> alt.VConcatChart:
    """Draw attention weights of blocks of queries over blocks of keys, exact and compressed, and the difference.

    Rows of `veloxlab.measure.attention_maps.ATTENTION_MAP`. A weight that is not finite is marked with a cross.
    ``heading``: what is seen, such as layer, head and method.
    """
    numbers = ("query", "query_end", "key", "key_end", "weight", "moved")
    shown = columns.require(frame, "attention_maps", "kind", *numbers).drop("moved")
    side_by_side: alt.HConcatChart = alt.hconcat(
        *marks.panels(list(KINDS), lambda kind, _: _map(kind), SIDE, SIDE), spacing=12
    )
    chart = marks.framed([side_by_side], shown, heading, caption, attention_caption(frame))
    return chart.resolve_scale(color="shared")  # type: ignore[no-any-return]


def attention_caption(frame: pl.DataFrame) -> str:
    """Say what share of attention goes to other keys than before, on average over queries, and of the worst block."""
    lost = marks.broken(frame.height - frame.filter(pl.col("weight").is_finite()).height)
    rows = frame.filter(pl.col("kind") == "exact").group_by("query", "query_end").agg(pl.col("moved").first())
    rows = rows.filter(pl.col("moved").is_finite())
    if rows.is_empty():
        return lost
    queries = rows["query_end"] - rows["query"]
    mean = float((rows["moved"] * queries).sum()) / float(queries.sum())
    worst = rows.sort("moved", "query").row(-1, named=True)
    said = (
        f"{100 * mean:.1f} % of attention moves to other keys; most, {100 * worst['moved']:.1f} %, "
        f"for queries {worst['query']} to {worst['query_end'] - 1}"
    )
    return marks.sentence(said, lost)


def _map(kind: str) -> marks.Plot:
    own, first, words = marks.only(kind=kind), kind == "exact", KINDS[kind]
    y = alt.Y("query:Q", title="position of the query" if first else None).scale(nice=False, reverse=True)
    size = "isValid(datum.weight) ? abs(datum.weight) : null"
    cells = (
        scales.on_log_scale(own.transform_calculate(size=size), "size", DOMAIN)
        .mark_rect()
        .encode(
            x=alt.X("key:Q", title="position of the key").scale(nice=False).axis(tickCount=4),
            x2="key_end:Q",
            y=y.axis(tickCount=4, labels=first, minExtent=40 if first else 0),
            y2="query_end:Q",
            color=scales.log_colour("size", ["attention", "weight"], DOMAIN),
            tooltip=columns.tips("query", "key", ("weight", words, ".3~g")),
        )
    )
    lost = own.transform_filter("!isValid(datum.weight)").mark_text(text="×", fontWeight="bold")
    name = alt.Chart().transform_aggregate(cells="count()").mark_text(text=words, baseline="bottom")
    return alt.layer(cells, lost.encode(x="key:Q", y="query:Q"), name.encode(x=alt.value(SIDE / 2), y=alt.value(-5)))
