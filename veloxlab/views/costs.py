"""Cost and effect of each cache: divergence against bits or bytes, and time and memory by length."""

from __future__ import annotations

from typing import Any, Literal

import altair as alt
import polars as pl

from veloxlab.checks import choice
from veloxlab.views import columns, marks, theme

# cost of a cache: axis title, Vega expression, and words of the heading
COSTS = {
    "bits": (
        "true bits per value, mean of keys and values",
        # a cache of another project has no bits of its own: held bytes over stored values take their place
        "isValid(datum.key_bits) ? (datum.key_bits + datum.value_bits) / 2 : datum.held_bits",
        "true bits per value",
    ),
    "held_bytes": ("bytes held (MB)", "datum.held_bytes / 1e6", "bytes held"),
}
FEW = 12  # points; with more, only the tooltip names each one
EXACT = "none"
STEPS: dict[str, Any] = {"interpolate": "step-after", "color": theme.NEUTRAL, "strokeWidth": 4, "opacity": 0.3}


def frontier(
    frame: pl.DataFrame,
    *,
    x: Literal["bits", "held_bytes"] = "bits",
    domain: columns.Domain | None = None,
    tokens: int | None = None,
    exact_bytes: int | None = None,
    caption: str = "",
) -> alt.VConcatChart:
    """Draw each measured cache by its cost and by the divergence of the model's predictions.

    Rows of ``name``, ``key_bits``, ``value_bits``, ``kl_mean`` (nats), ``held_bytes``, ``top1_flips`` (0 to 1) and
    ``perplexity``. A name starts with the method's id, unless there is a column ``method``. Where bits are null, the
    column ``held_bits`` is used. The exact cache (``"none"``) appears in the caption only. A divergence of zero is
    drawn at the floor. ``x``: ``"bits"`` for true bits per value, or ``"held_bytes"``. ``domain``: least and greatest
    KL of the scale; set it to keep the scale steady while points are added. ``tokens``: the context of the predicted
    bytes. ``exact_bytes``: bytes of the exact cache at that context, drawn as a line; the byte scale is then
    logarithmic. With a column ``point``, the number of a cache, a click picks a cache.
    """
    choice(*COSTS)("x", x)
    needed = "name key_bits value_bits kl_mean held_bytes top1_flips perplexity"
    columns.require(frame, "frontier", needed)
    method = pl.col("method") if "method" in frame.columns else pl.col("name").str.split(" ").list.first()
    point = ["point"] if "point" in frame.columns else []
    shown = frame.select(*needed.split(), *_held_bits(frame), *point, method=method).drop_nulls("name")
    shown = shown.sort("method", "key_bits", "value_bits", "name")
    drawn = shown.filter(pl.col("method") != EXACT)
    scale = domain or columns.log_domain(drawn["kl_mean"])
    title, cost, words = COSTS[x]
    base = (
        columns.on_log_scale(alt.Chart(), "kl_mean", scale)
        .transform_calculate(cost=cost, method="datum.method || split(datum.name, ' ')[0]")
        .transform_filter(f"datum.method !== '{EXACT}' && isValid(datum.cost)")
    )
    order: list[Any] = [alt.SortField("cost"), alt.SortField("kl_mean")]
    best = base.transform_window(best="min(kl_mean)", frame=[None, 0], sort=order)
    look = marks.method_look(_lines_down(drawn))
    told = columns.tips("name kl_mean top1_flips perplexity key_bits value_bits held_bytes")
    layers = [
        best.transform_filter("datum.kl_mean <= datum.best").mark_line(**STEPS),
        base.mark_line(strokeWidth=1.2, opacity=0.7).encode(color=look["color"]),
        marks.points(base, told, 70, **look),
    ]
    if drawn.height <= FEW:
        layers.append(_names(base, in_heaps=bool(point)))
    if point:
        picked = base.transform_filter(f"datum.point === {marks.PICKED_POINT}")
        layers.append(picked.mark_point(size=190, stroke=theme.PICKED, strokeWidth=2.5))
        layers.append(base.mark_point(filled=True, size=260, opacity=0, cursor="pointer").encode(tooltip=told))
    if exact_bytes is not None:
        layers += _exact_line(exact_bytes)
    if tokens is not None:
        title = f"bytes predicted for {tokens:,} tokens (MB)"
    plot = _plane(layers, "cost", title, "kl_mean", scale, 260, log=exact_bytes is not None)
    heading = f"KL divergence of predictions against {words}"
    picks = [marks.PICKED_POINT] if point else []
    return marks.framed([plot], shown, heading, caption or fidelity_caption(frame, x), picks=picks)


def _names(base: alt.Chart, *, in_heaps: bool) -> alt.Chart:
    """Write the settings of each cache beside its point; one name stands for a group of close points of one width."""
    named = base.transform_calculate(short="slice(datum.name, length(datum.method) + 1)")
    if in_heaps:
        order: list[Any] = [alt.SortField("cost"), alt.SortField("kl_mean_drawn")]
        apart = (
            "abs(log(datum.cost / datum.before_cost)) > 0.1 || abs(log(datum.kl_mean_drawn / datum.before_kl)) > 0.4"
        )
        named = named.transform_window(
            groupby=["short"], sort=order, before_cost="lag(cost)", before_kl="lag(kl_mean_drawn)"
        )
        named = named.transform_filter(f"!isValid(datum.before_cost) || {apart}")
    words: alt.Chart = named.mark_text(align="left", dx=7, dy=-7, fontSize=10).encode(text=alt.Text("short:N"))
    return words


def _lines_down(drawn: pl.DataFrame) -> list[str]:
    """Return the methods in the order of their lines from the top down, for the legend."""
    height = pl.col("kl_mean").filter(pl.col("kl_mean").is_finite() & (pl.col("kl_mean") > 0)).log().mean()
    lines = drawn.group_by("method").agg(height).sort("kl_mean", "method", descending=[True, False], nulls_last=True)
    return lines["method"].to_list()


def _exact_line(exact_bytes: int) -> list[marks.Plot]:
    """Draw a labelled line at the bytes of the exact cache."""
    line = alt.Chart().transform_aggregate(caches="count()").transform_calculate(cost=str(exact_bytes / 1e6))
    label: marks.Look = {"text": "exact, in 16 bits", "align": "right", "baseline": "top", "dx": -4, "dy": 4}
    rule = line.mark_rule(strokeDash=[4, 3]).encode(y=alt.value(0), y2=alt.value("height"))
    return [rule, line.mark_text(**label).encode(y=alt.value(0))]


def fidelity_caption(frame: pl.DataFrame, x: Literal["bits", "held_bytes"] = "bits") -> str:
    """State which direction is better, the values of the exact cache if measured, and what is not drawn."""
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


def _plane(
    layers: list[alt.Chart], cost: str, title: str, kl: str, scale: columns.Domain, height: int, *, log: bool = False
) -> marks.Plot:
    ticks: dict[str, Any] = {"zero": False, "tickCount": 6}
    if log:
        ticks = {"type": "log", "values": columns.log_steps(1, 1.5, 2, 3, 5, 7), "format": "~g"}
    x = columns.x(cost, title, nice=False, padding=24, **ticks)
    y = columns.log_y(kl, ["mean KL from the exact model", "nats"], scale)
    return marks.sized(marks.layered(*layers, x=x, y=y), theme.WIDTH - 90, height)


FRONT = "front"
SEARCHED = "method state row key_bits value_bits sinks window bytes_per_token windows kl low high"


def pareto_front(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw candidates by held bytes per token and by the divergence of the model's predictions.

    Rows of a search (``SEARCHED``). Rows of the state ``"front"`` are joined, and have intervals. Other measured rows
    are faint. The caption counts the rows that were not measured.
    """
    columns.require(frame, "pareto_front", SEARCHED)
    protected = pl.col("protected").cast(pl.List(pl.String)).list.join(", ")
    shown = frame.filter(pl.col("kl").is_finite()).select(*SEARCHED.split(), protected=protected)
    scale = columns.log_domain(shown["kl"])
    look = marks.method_look(shown["method"].unique().sort().to_list())
    setting = "row method key_bits value_bits sinks window protected bytes_per_token kl"
    told = columns.tips(setting, ("low", "interval from"), ("high", "to"), "windows state")
    measured = columns.on_log_scale(alt.Chart(), "kl", scale)
    front, others = (measured.transform_filter(f"datum.state {test} '{FRONT}'") for test in ("===", "!=="))
    ends = columns.on_log_scale(columns.on_log_scale(front, "low", scale), "high", scale)
    bars = ends.mark_rule(strokeWidth=1.5, opacity=0.7)
    layers = [
        front.mark_line(**STEPS),
        others.mark_point(filled=True, size=36, opacity=0.3).encode(**look, tooltip=told),
        bars.encode(y=alt.Y("low_drawn:Q"), y2=alt.Y2("high_drawn:Q"), color=look["color"]),
        marks.points(front, told, 80, **look),
    ]
    plot = _plane(layers, "bytes_per_token", "bytes held per token", "kl", scale, 280)
    heading = "KL divergence against bytes: the Pareto front"
    return marks.framed([plot], shown, heading, caption or pareto_caption(frame))


def pareto_caption(frame: pl.DataFrame) -> str:
    """State how many candidates are on the front, stopped early, and were not run."""
    finite = frame.filter(pl.col("kl").is_finite())
    counts = {
        "dropped early": finite.filter(pl.col("windows") < frame["windows"].max()).height,
        "not run": frame.filter(windows=0).height,
        "not finite": frame.filter(pl.col("windows") > 0).height - finite.height,
    }
    told = [f"{what}: {count}" for what, count in counts.items() if count]
    front = f"{frame.filter(state=FRONT).height} of {frame.height} candidates are on the front"
    return "; ".join([front, *told]) + ". Lower left is better; bars are intervals."


ROW = 17  # pixels: height of a cache's bar


def attention_times(
    frame: pl.DataFrame, *, heading: str = "Attention of one token", caption: str = ""
) -> alt.VConcatChart:
    """Draw the time of attention as bars, a panel for each context length, with a tick for the time of memory traffic.

    Rows of one shape of `veloxlab.measure.bench.timing.decode_attention`: ``cache``, ``tokens``, ``microseconds``,
    ``roofline_microseconds`` (bytes of the call over the device's copying speed) and ``ratio`` (to the exact cache).
    ``heading``: for instance the device.
    """
    needed = columns.require(frame, "attention_times", "cache tokens microseconds roofline_microseconds ratio")
    shown = needed.sort("tokens", maintain_order=True)
    caches, lengths = (shown[name].unique(maintain_order=True).to_list() for name in ("cache", "tokens"))
    told = columns.tips("cache tokens microseconds roofline_microseconds", ("ratio", "ratio to exact", ".2f"))
    words = "format(datum.microseconds, '.0f') + ' µs  ' + format(datum.ratio, '.2f') + '×'"

    def draw(tokens: int, last: bool) -> marks.Plot:
        y = columns.y("cache", None, sort=caches, ticks=False, labelLimit=160, minExtent=110)
        base = marks.only(tokens=tokens).encode(y=y)
        title = [f"µs at {tokens:,} tokens", *["(ratio to exact beside each bar)"] * last]
        bars = base.mark_bar(height=ROW - 5, cornerRadiusEnd=2)
        ticks = base.mark_tick(thickness=2, size=ROW - 3, color=theme.PICKED)
        text = base.transform_calculate(label=words).mark_text(align="left", dx=5)
        return marks.layered(
            bars.encode(x=columns.x("microseconds", title), color=marks.cache_colour(caches), tooltip=told),
            ticks.encode(x=alt.X("roofline_microseconds:Q")),
            text.encode(x=alt.X("microseconds:Q"), text=alt.Text("label:N")),
        )

    plots = marks.panels(lengths, draw, theme.WIDTH - 150, ROW * len(caches))
    return marks.framed(plots, shown, heading, caption or times_caption(frame))


def times_caption(frame: pl.DataFrame) -> str:
    """Compare the fastest cache that is neither exact nor mlx-lm's with the exact one, at the longest context."""
    longest = frame.filter(pl.col("tokens") == pl.col("tokens").max())
    ours = longest.filter(~pl.col("cache").str.contains("^(exact|mlx-lm)")).sort("microseconds")
    if ours.is_empty():
        return "Bars: measured; ticks: what moving the bytes alone would take"
    said = "At {tokens:,} tokens {cache} takes {ratio:.2f} of exact's time; ticks: what its bytes alone would take"
    return said.format(**ours.row(0, named=True))


PANELS = {  # column: axis title and unit
    "prefill_peak_bytes": (["peak while reading", "MB"], 1e6),
    "decode_peak_bytes": (["peak while continuing", "MB"], 1e6),
    "decode_seconds": (["a token behind it", "ms"], 1e-3),
}


def costs_by_length(
    frame: pl.DataFrame,
    *,
    heading: str = "Peak memory and time per token against the length of a text",
    caption: str = "",
) -> alt.VConcatChart:
    """Draw peaks of memory and the time of a token against the tokens of the text, a line for each cache.

    Rows of `veloxlab.measure.bench.models.LENGTHS`: ``cache``, ``tokens`` and the three measures of `PANELS`.
    ``heading``: for instance the model.
    """
    shown = columns.require(frame, "costs_by_length", "cache tokens", *PANELS).sort("tokens", maintain_order=True)
    caches, values = shown["cache"].unique(maintain_order=True).to_list(), _lengths(shown)

    def draw(name: str, last: bool) -> marks.Plot:
        title, unit = PANELS[name]
        bottom = {"values": values, "format": ",d", "labels": last, "ticks": last}
        legend = alt.Legend(title=None, orient="top") if name == next(iter(PANELS)) else None
        rows = columns.on_log_scale(alt.Chart(), "tokens").transform_filter(f"isValid(datum.{name})")
        base = rows.transform_calculate(shown=f"datum.{name} / {unit}").encode(
            x=columns.x("tokens_drawn", "" if last else None, type="log", base=2, nice=False, **bottom),
            y=columns.y("shown", title, tickCount=4, zero=True),
            color=marks.cache_colour(caches).legend(legend),
        )
        return marks.line_points(base, columns.tips("cache tokens", ("shown", " in ".join(title), ",.3~r")))

    plots = marks.panels(list(PANELS), draw, theme.WIDTH, 130)
    return marks.framed(plots, shown, heading, caption or lengths_caption(frame))


def lengths_caption(frame: pl.DataFrame) -> str:
    """Compare the peaks of the last cache with those of the first at the longest text that both have."""
    caches = frame["cache"].unique(maintain_order=True).to_list()
    peaks = ("prefill_peak_bytes", "decode_peak_bytes")
    whole = frame.drop_nulls(["tokens", *peaks])
    first, last = (whole.filter(cache=caches[i]) for i in (0, -1))
    shared = {*_lengths(first)} & {*_lengths(last)}
    said = "Memory beside the model's weights, and the time of one more token"
    if len(caches) > 1 and shared:
        rows = [own.filter(tokens=max(shared)).row(-1, named=True) for own in (first, last)]
        reading, continuing = (f"{rows[1][name] / rows[0][name]:.2f}" for name in peaks)
        said = (
            f"At {max(shared):,} tokens {caches[-1]} peaks at {reading} of {caches[0]}'s memory while reading, "
            f"at {continuing} while continuing"
        )
    return marks.sentence(said, *columns.not_drawn(frame["tokens"], zero=True))


def _lengths(frame: pl.DataFrame) -> list[int]:
    """Return the numbers of tokens for a log scale."""
    tokens = frame["tokens"].unique().sort()
    return tokens.filter(tokens.is_finite() & (tokens > 0)).to_list()
