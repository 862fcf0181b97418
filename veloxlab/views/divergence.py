"""What each cache costs and what it changes: the divergence of predictions against bits or bytes."""

from __future__ import annotations

from typing import Any, Literal

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, scales, theme

# what a cache costs: words for an axis, and the number drawn
COSTS = {
    "bits": (
        "true bits per value, mean of keys and values",
        # a cache that is not ours states no bits of its own: what it holds, over what it keeps, says the same
        "isValid(datum.key_bits) ? (datum.key_bits + datum.value_bits) / 2 : datum.held_bits",
    ),
    "held_bytes": ("bytes held (MB)", "datum.held_bytes / 1e6"),
}
FEW = 12  # points: beyond these only the tooltip says what each one is
EXACT = "none"
STEPS: dict[str, Any] = {"interpolate": "step-after", "color": theme.NEUTRAL, "strokeWidth": 4, "opacity": 0.3}


def frontier(
    frame: pl.DataFrame,
    *,
    x: Literal["bits", "held_bytes"] = "bits",
    domain: scales.Domain | None = None,
    caption: str | None = None,
) -> alt.VConcatChart:
    """Draw each measured cache by its cost and by how far it moves the model's predictions.

    Rows of ``name``, ``key_bits``, ``value_bits``, ``kl_mean`` (nats), ``held_bytes``, ``top1_flips`` (0 to 1) and
    ``perplexity``. A name starts with its method's id; a column ``method`` is used where there is one. Where bits are
    null, a column ``held_bits`` stands in. The exact cache (``"none"``) is told of in the caption, and a divergence of
    zero is drawn at the floor. ``x``: ``"bits"`` for true bits per value, or ``"held_bytes"``. ``domain``: least and
    greatest KL of the scale; give one to keep it steady while points are added.
    """
    columns.known(x, COSTS, "cost")
    numbers = ("key_bits", "value_bits", "kl_mean", "held_bytes", "top1_flips", "perplexity")
    columns.require(frame, "frontier", "name", *numbers)
    method = pl.col("method") if "method" in frame.columns else pl.col("name").str.split(" ").list.first()
    shown = frame.select("name", *numbers, *_held_bits(frame), method=method).drop_nulls("name")
    shown = shown.sort("method", "key_bits", "value_bits", "name")
    drawn = shown.filter(pl.col("method") != EXACT)
    scale = domain or scales.log_domain(drawn["kl_mean"])
    plot = _plane(_cache_marks(drawn, x, scale), "cost", COSTS[x][0], "kl_mean", scale).properties(height=260)
    heading = f"KL divergence of predictions against {'bytes held' if x == 'held_bytes' else 'true bits per value'}"
    return marks.framed([plot], shown, heading, caption, fidelity_caption(frame, x))


def fidelity_caption(frame: pl.DataFrame, x: Literal["bits", "held_bytes"] = "bits") -> str:
    """Say which way is better, what the exact cache gives where it was measured, and what could not be drawn."""
    said = ["Lower left is better; grey steps join the Pareto front."]
    exact = frame.filter(pl.col("name") == EXACT).head(1).iter_rows(named=True)
    said += [f"Exact cache: KL {row['kl_mean']:.1g}, perplexity {row['perplexity']:.2f}." for row in exact]
    finite = pl.col("kl_mean").is_finite().fill_null(value=False)
    bits = pl.coalesce("key_bits", *_held_bits(frame)) + pl.col("value_bits").fill_null(0)
    cost = {"bits": bits, "held_bytes": pl.col("held_bytes")}[x]
    bare = finite & (cost.is_null() | pl.col("name").is_null())
    for what, rows in (("Not finite", ~finite), ("Not drawn", bare)):
        names = frame.filter(rows)["name"].fill_null("a row without a name")
        said += [f"{what}: {', '.join(names)}."] if len(names) else []
    return " ".join(said)


def _held_bits(frame: pl.DataFrame) -> list[str]:
    return ["held_bits"] if "held_bits" in frame.columns else []


def _plane(layers: list[alt.Chart], cost: str, title: str, kl: str, scale: scales.Domain) -> alt.LayerChart:
    """Lay charts over one another by a cost and a divergence."""
    x = alt.X(f"{cost}:Q", title=title).scale(zero=False, nice=False, padding=24).axis(tickCount=6)
    y = scales.log_y(kl, ["mean KL from the exact model", "nats"], scale)
    return alt.layer(*layers).encode(x=x, y=y).properties(width=theme.WIDTH - 90)


def _cache_marks(drawn: pl.DataFrame, x: str, scale: scales.Domain) -> list[alt.Chart]:
    colour, shape = marks.method_look(_by_divergence(drawn))
    base = (
        scales.on_log_scale(alt.Chart(), "kl_mean", scale)
        .transform_calculate(cost=COSTS[x][1], method="datum.method || split(datum.name, ' ')[0]")
        .transform_filter(f"datum.method !== '{EXACT}' && isValid(datum.cost)")
    )
    best = (
        base.transform_window(
            best="min(kl_mean)", frame=[None, 0], sort=[alt.SortField("cost"), alt.SortField("kl_mean")]
        )
        .transform_filter("datum.kl_mean <= datum.best")
        .mark_line(**STEPS)
    )
    told = columns.tips("name", "kl_mean", "top1_flips", "perplexity", "key_bits", "value_bits", "held_bytes")
    lines = base.mark_line(strokeWidth=1.2, opacity=0.7).encode(color=colour)
    layers = [best, lines, marks.points(base, told, 70, color=colour, shape=shape)]
    if drawn.height <= FEW:
        named = base.transform_calculate(short="slice(datum.name, length(datum.method) + 1)")
        layers.append(named.mark_text(align="left", dx=7, dy=-7, fontSize=10).encode(text="short:N"))
    return layers


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
    columns.require(frame, "pareto_front", "method", "state", *NUMBERS)
    protected = pl.col("protected").cast(pl.List(pl.String)).list.join(", ")
    shown = frame.filter(pl.col("kl").is_finite()).select("method", "state", *NUMBERS, protected=protected)
    scale = scales.log_domain(shown["kl"])
    layers = _front_marks(shown, scale)
    plot = _plane(layers, "bytes_per_token", "bytes held per token", "kl", scale).properties(height=280)
    return marks.framed([plot], shown, "KL divergence against bytes: the Pareto front", caption, pareto_caption(frame))


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


def _front_marks(shown: pl.DataFrame, scale: scales.Domain) -> list[alt.Chart]:
    colour, shape = marks.method_look(shown["method"].unique().sort().to_list())
    setting = ("key_bits", "value_bits", "sinks", "window", "protected", "bytes_per_token")
    told = columns.tips("row", "method", *setting, "kl", ("low", "interval from"), ("high", "to"), "windows", "state")
    measured = scales.on_log_scale(alt.Chart(), "kl", scale)
    front, others = (measured.transform_filter(f"datum.state {test} '{FRONT}'") for test in ("===", "!=="))
    ends = scales.on_log_scale(scales.on_log_scale(front, "low", scale), "high", scale)
    intervals = ends.mark_rule(strokeWidth=1.5, opacity=0.7).encode(y="low_drawn:Q", y2="high_drawn:Q", color=colour)
    look: dict[str, Any] = {"color": colour, "shape": shape}
    faint = others.mark_point(filled=True, size=36, opacity=0.3).encode(**look, tooltip=told)
    return [front.mark_line(**STEPS), faint, intervals, marks.points(front, told, 80, **look)]
