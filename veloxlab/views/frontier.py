"""What each cache costs and what it changes: the divergence of predictions against bits or bytes."""

from __future__ import annotations

from typing import Literal

import altair as alt
import polars as pl

from veloxlab.views import theme
from veloxlab.views.furniture import framed, known, method_look, require, tips
from veloxlab.views.scales import Domain, log_domain, log_y, on_log_scale

# what a cache costs: words for an axis, and the number drawn
COSTS = {
    "bits": (
        "true bits a value, mean of keys and values",
        # a cache that is not ours states no bits of its own: what it holds, over what it keeps, says the same
        "isValid(datum.key_bits) ? (datum.key_bits + datum.value_bits) / 2 : datum.held_bits",
    ),
    "held_bytes": ("bytes held (MB)", "datum.held_bytes / 1e6"),
}
FEW = 12  # points: beyond these only the tooltip says what each one is
EXACT = "none"


def frontier(
    frame: pl.DataFrame,
    *,
    x: Literal["bits", "held_bytes"] = "bits",
    domain: Domain | None = None,
    caption: str | None = None,
) -> alt.VConcatChart:
    """Draw each measured cache by its cost and by how far it moves the model's predictions.

    Rows of ``name``, ``key_bits``, ``value_bits``, ``kl_mean`` (nats), ``held_bytes``, ``top1_flips`` (0 to 1) and
    ``perplexity``. A name starts with its method's id; a column ``method`` is used where there is one. Where bits are
    null, a column ``held_bits`` stands in. The exact cache (``"none"``) is told of in the caption, and a divergence of
    zero is drawn at the floor. ``x``: ``"bits"`` for true bits per value, or ``"held_bytes"``. ``domain``: least and
    greatest KL of the scale; give one to keep it steady while points are added.
    """
    known(x, COSTS, "cost")
    numbers = ("key_bits", "value_bits", "kl_mean", "held_bytes", "top1_flips", "perplexity")
    require(frame, "frontier", "name", *numbers)
    method = pl.col("method") if "method" in frame.columns else pl.col("name").str.split(" ").list.first()
    held = [pl.col("held_bits")] if "held_bits" in frame.columns else []
    shown = frame.select("name", *numbers, *held, method=method).drop_nulls("name")
    shown = shown.sort("method", "key_bits", "value_bits", "name")
    drawn = shown.filter(pl.col("method") != EXACT)
    scale = domain or log_domain(drawn["kl_mean"])
    plot = (
        alt.layer(*_marks(drawn, x, scale, named=drawn.height <= FEW))
        .encode(
            x=alt.X("cost:Q", title=COSTS[x][0]).scale(zero=False, nice=False, padding=24).axis(tickCount=6),
            y=log_y("kl_mean", ["mean KL from the exact model", "nats"], scale),
        )
        .properties(width=theme.WIDTH - 90, height=260)
    )
    usual = fidelity_caption(frame, x)
    return framed([plot], shown, "What a smaller cache changes in the model's predictions", caption, usual)


def fidelity_caption(frame: pl.DataFrame, x: Literal["bits", "held_bytes"] = "bits") -> str:
    """Say which way is better, what the exact cache gives where it was measured, and what could not be drawn."""
    better = ["Lower left is better; grey steps join what nothing else beats."]
    exact = [
        f"Exact cache: KL {row['kl_mean']:.1g}, perplexity {row['perplexity']:.2f}."
        for row in frame.filter(pl.col("name") == EXACT).head(1).iter_rows(named=True)
    ]
    names = pl.col("name").fill_null("a row without a name")
    finite = pl.col("kl_mean").is_finite().fill_null(value=False)
    bits = pl.coalesce("key_bits", *(["held_bits"] if "held_bits" in frame.columns else []))
    cost = {"bits": bits + pl.col("value_bits").fill_null(0), "held_bytes": pl.col("held_bytes")}[x]
    lost = frame.filter(~finite).select(names)["name"].to_list()
    bare = frame.filter(finite & (cost.is_null() | pl.col("name").is_null())).select(names)["name"].to_list()
    told = [f"{what}: {', '.join(own)}." for what, own in (("Not finite", lost), ("Not drawn", bare)) if own]
    return " ".join([*better, *exact, *told])


def _marks(drawn: pl.DataFrame, x: str, scale: Domain, *, named: bool) -> list[alt.Chart]:
    methods = _by_divergence(drawn)
    colour, shape = method_look(methods)
    base = (
        on_log_scale(alt.Chart(), "kl_mean", scale)
        .transform_calculate(cost=COSTS[x][1], method="datum.method || split(datum.name, ' ')[0]")
        .transform_filter(f"datum.method !== '{EXACT}' && isValid(datum.cost)")
    )
    best = (
        base.transform_window(
            best="min(kl_mean)", frame=[None, 0], sort=[alt.SortField("cost"), alt.SortField("kl_mean")]
        )
        .transform_filter("datum.kl_mean <= datum.best")
        .mark_line(interpolate="step-after", color=theme.NEUTRAL, strokeWidth=4, opacity=0.3)
    )
    tooltip = tips(
        "name:N",
        ("kl_mean:Q", "mean KL (nats)", ".3g"),
        ("top1_flips:Q", "top-1 changed", ".2%"),
        ("perplexity:Q", None, ".3f"),
        ("key_bits:Q", "bits a key value", ".2f"),
        ("value_bits:Q", "bits a value's value", ".2f"),
        ("held_bytes:Q", "held bytes", ",d"),
    )
    lines = base.mark_line(strokeWidth=1.2, opacity=0.7).encode(color=colour)
    points = base.mark_point(filled=True, size=70, opacity=1).encode(color=colour, shape=shape, tooltip=tooltip)
    names = (
        base.transform_calculate(short="slice(datum.name, length(datum.method) + 1)")
        .mark_text(align="left", dx=7, dy=-7, fontSize=10)
        .encode(text="short:N")
    )
    return [best, lines, points, *([names] if named else [])]


def _by_divergence(drawn: pl.DataFrame) -> list[str]:
    """List methods as their lines lie, from the top down, so that the legend reads like the chart."""
    height = pl.col("kl_mean").filter(pl.col("kl_mean").is_finite() & (pl.col("kl_mean") > 0)).log().mean()
    mean = drawn.group_by("method").agg(height)
    return mean.sort("kl_mean", "method", descending=[True, False], nulls_last=True)["method"].to_list()


FRONT = "front"
NUMBERS = ("row", "key_bits", "value_bits", "sinks", "window", "bytes_per_token", "windows", "kl", "low", "high")


def pareto_front(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw candidates by the bytes they hold for a token and by how far they move the model's predictions.

    Rows of a search (``SEARCHED``). Those of the state ``"front"`` are joined, with their intervals; others that were
    measured are faint; those that were not are counted in the caption.
    """
    require(frame, "pareto_front", "method", "state", *NUMBERS)
    protected = pl.col("protected").cast(pl.List(pl.String)).list.join(", ")
    shown = frame.filter(pl.col("kl").is_finite()).select("method", "state", *NUMBERS, protected=protected)
    scale = log_domain(shown["kl"])
    plot = (
        alt.layer(*_front_marks(shown, scale))
        .encode(
            x=alt.X("bytes_per_token:Q", title="bytes held for a token")
            .scale(zero=False, nice=False, padding=24)
            .axis(tickCount=6),
            y=log_y("kl", ["mean KL from the exact model", "nats"], scale),
        )
        .properties(width=theme.WIDTH - 90, height=280)
    )
    return framed([plot], shown, "KL divergence against bytes: the Pareto front", caption, pareto_caption(frame))


def pareto_caption(frame: pl.DataFrame) -> str:
    """Say how many candidates are on the front, how many stopped early, and how many were not run."""
    finite = frame.filter(pl.col("kl").is_finite())
    counts = {
        "dropped early": finite.filter(pl.col("windows") < frame["windows"].max()).height,
        "not run": frame.filter(windows=0).height,
        "not finite": frame.filter(pl.col("windows") > 0).height - finite.height,
    }
    told = [f"{what}: {count}" for what, count in counts.items() if count]
    front = f"{frame.filter(state=FRONT).height} of {frame.height} candidates are on the front"
    return "; ".join([front, *told]) + ". Lower left is better; bars are intervals."


def _front_marks(shown: pl.DataFrame, scale: Domain) -> list[alt.Chart]:
    methods = shown["method"].unique(maintain_order=True).sort().to_list()
    colour, shape = method_look(methods)
    tooltip = tips(
        "row:Q",
        "method:N",
        ("key_bits:Q", "bits of keys"),
        ("value_bits:Q", "bits of values"),
        "sinks:Q",
        "window:Q",
        ("protected:N", "exact layers"),
        ("bytes_per_token:Q", "bytes a token", ",.1f"),
        ("kl:Q", "mean KL (nats)", ".3g"),
        ("low:Q", "interval from", ".3g"),
        ("high:Q", "to", ".3g"),
        ("windows:Q", "windows measured"),
        "state:N",
    )
    measured = on_log_scale(alt.Chart(), "kl", scale)
    front = measured.transform_filter(f"datum.state === '{FRONT}'")
    steps = front.mark_line(interpolate="step-after", color=theme.NEUTRAL, strokeWidth=4, opacity=0.3)
    ends = on_log_scale(on_log_scale(front, "low", scale), "high", scale)
    intervals = ends.mark_rule(strokeWidth=1.5, opacity=0.7).encode(y="low_drawn:Q", y2="high_drawn:Q", color=colour)
    others = (
        measured.transform_filter(f"datum.state !== '{FRONT}'")
        .mark_point(filled=True, size=36, opacity=0.3)
        .encode(color=colour, shape=shape, tooltip=tooltip)
    )
    points = front.mark_point(filled=True, size=80, opacity=1).encode(color=colour, shape=shape, tooltip=tooltip)
    return [steps, others, intervals, points]
