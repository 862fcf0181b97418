"""Effects of one cache on a model's predictions, along a text and by window, and bytes and times of its layers."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.measure.paired import Mean, by_window
from veloxlab.views import columns, marks, theme
from veloxlab.views.generation import SIDES

POOLS = 64  # marks along a window
NAME = 320  # pixels of a cache's name in a legend: room for settings of two layers
MB = 1e6
LOOKS = ((theme.NEUTRAL, "circle"), (theme.CHOSEN, "diamond"))  # of the first cache, and of the second
STEP = 44  # pixels of a window


def kl_along(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the divergence of predictions along the window, as means over all windows of the text.

    Rows of `veloxlab.measure.quality.TOKEN_FIDELITY`: ``window``, ``position``, ``kl`` (nats) and ``flip``. A point is
    the mean of neighbouring positions of all windows.
    """
    needed = columns.require(frame, "kl_along", "window position kl").with_columns(frame["flip"])
    step = max(1, -(-(1 + int(needed["position"].max())) // POOLS))  # type: ignore[arg-type]  # positions are numbers
    place = (pl.col("position") // step * step).alias("position")
    finite = pl.col("kl").is_finite()
    means = {"kl": pl.col("kl").filter(finite).mean(), "top1_flips": pl.col("flip").mean()}
    pooled = needed.group_by(place).agg(**means, not_finite=(~finite).sum()).sort("position")
    scale = columns.log_domain(pooled["kl"])
    base = columns.on_log_scale(alt.Chart(), "kl", scale)
    x = columns.x("position", f"position in the window, means of {step} tokens", nice=False)
    base = base.encode(x=x, y=columns.log_y("kl", ["KL from the exact", "cache, nats"], scale))
    told = columns.tips("position kl top1_flips not_finite")
    plot = marks.layered(
        base.mark_line(strokeWidth=1.5, color=theme.CHOSEN),
        marks.points(base, told, 20, color=alt.value(theme.CHOSEN)),
        marks.crosses(base),
    )
    plots = [marks.sized(plot, theme.WIDTH - 40, 150)]
    return marks.framed(plots, pooled, "KL divergence along the text", caption or kl_caption(frame))


def kl_caption(frame: pl.DataFrame) -> str:
    """State the mean over windows with its interval, and the share of top-1 tokens that changed."""
    windows = by_window(frame)
    found = Mean.of(windows["kl_mean"].to_list())
    flips = frame["flip"].sum() / frame.height
    return f"Mean {found.mean:.3g} nats ({found.interval}); {flips:.1%} of first choices change."


def window_losses(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the mean divergence of two caches in each window, with a line between the two points of a window.

    Rows of `veloxlab.measure.paired.WINDOWS` with a column ``cache``, the name of the cache.
    """
    shown = columns.require(frame, "window_losses", "window positions kl_mean top1_flips cache")
    scale = columns.log_domain(shown["kl_mean"])
    base = columns.on_log_scale(alt.Chart(), "kl_mean", scale)
    x, y = (
        columns.x("window:O", "window of the text", labelAngle=0),
        columns.log_y("kl_mean", ["mean KL", "nats"], scale),
    )
    base, names = base.encode(x=x, y=y), shown["cache"].unique(maintain_order=True).to_list()
    colours, shapes = (dict(zip(names, looks, strict=False)) for looks in zip(*LOOKS, strict=True))
    colour = marks.scaled(alt.Color, "cache", colours).legend(labelLimit=NAME)
    shape = marks.scaled(alt.Shape, "cache", shapes).legend(labelLimit=NAME)
    plot = marks.layered(
        base.mark_line(strokeWidth=1.5, color=theme.NEUTRAL, opacity=0.5).encode(detail=alt.Detail("window:O")),
        marks.points(base, columns.tips("cache window positions kl_mean top1_flips"), 80, color=colour, shape=shape),
    )
    plots = [marks.sized(plot, alt.Step(STEP), 160)]
    return marks.framed(plots, shown, "Divergence window by window", caption or window_caption(frame))


def window_caption(frame: pl.DataFrame) -> str:
    """State the mean of each cache over its windows."""
    needed = columns.require(frame, "window_caption", "kl_mean cache")
    means = needed.group_by("cache", maintain_order=True).agg(pl.col("kl_mean").mean())
    return f"Mean KL in nats: {', '.join(f'{name} {kl:.3g}' for name, kl in means.iter_rows())}."


def bytes_by_layer(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the held bytes of each layer beside those of exact keys and values in 16 bits; tooltips have the true bits.

    Rows of `veloxlab.measure.memory.REPORT`: ``layer``, ``path``, ``reason``, ``key_bits``, ``value_bits``,
    ``held_bytes`` and ``fp16_bytes``. Shared tables appear in the caption only.
    """
    needed = "layer path reason key_bits value_bits held_bytes fp16_bytes"
    shown = columns.require(frame, "bytes_by_layer", needed).drop_nulls("layer")
    told = columns.tips("layer held_bytes fp16_bytes key_bits value_bits path reason")
    base = alt.Chart().encode(x=marks.layer_axis(gap=0.2), tooltip=told)
    amounts = {name: f"datum.{name} / {MB}" for name in ("held_bytes", "fp16_bytes")}
    base = base.transform_calculate(megabytes=amounts["held_bytes"], exact=amounts["fp16_bytes"])
    plot = marks.layered(
        base.mark_bar(color=theme.NEUTRAL, opacity=0.25).encode(
            y=columns.y("exact", ["MB held", "(grey: exact)"], zero=True)
        ),
        base.mark_bar(color=theme.CHOSEN).encode(y=alt.Y("megabytes:Q")),
    )
    layers = shown["layer"].n_unique()
    plots = [marks.sized(plot, marks.layer_step(layers) * layers, 130)]
    return marks.framed(plots, shown, "Bytes held by layer", caption or bytes_caption(frame))


def bytes_caption(frame: pl.DataFrame) -> str:
    """State the held bytes of all layers, their ratio to 16 bits, and the layers on other paths than ``"codes"``."""
    layers, tables = frame.drop_nulls("layer"), int(frame.filter(path="shared")["held_bytes"].sum())
    held, exact = (int(layers[name].sum()) for name in ("held_bytes", "fp16_bytes"))
    less = f", {exact / held:.2f} times less than exact in 16 bits" if 0 < held <= exact else ""
    if held > exact:
        less = f", more than exact in 16 bits ({exact / MB:,.3g} MB), as many tokens stay in the model's own type"
    others = layers.filter(pl.col("path") != "codes").group_by("path", maintain_order=True).agg(pl.col("layer"))
    apart = [f"{path}: layer{'s' * (len(own) > 1)} {', '.join(map(str, own))}" for path, own in others.iter_rows()]
    shared = f"tables, held once, {tables / MB:.3g} MB" if tables else ""
    return f"{marks.sentence(f'{held / MB:,.3g} MB{less}', shared, *apart)}."


PARTS = {"store": ["store,", "µs a token"], "decode": ["decode,", "µs a token"], "attend": ["attend,", "µs a query"]}


def times_by_layer(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the times of storing, decoding and attention in every layer, exact and compressed.

    Rows of `veloxlab.measure.times.LAYER_TIMES`.
    """
    shown = columns.require(frame, "times_by_layer", "layer part side microseconds tokens held_bytes fp16_bytes")
    there = [part for part in PARTS if part in shown["part"]]
    layers = shown["layer"].n_unique()

    def draw(part: str, last: bool) -> marks.Plot:
        base = marks.only(part=part).encode(
            x=marks.layer_axis(labelled=last, labelAngle=0, labelOverlap=True),
            y=columns.y("microseconds", PARTS[part], zero=True, tickCount=4),
            color=marks.scaled(alt.Color, "side", SIDES, legend=part == there[0]),
        )
        told = columns.tips("layer side", ("microseconds", "µs", ".3~g"), "tokens held_bytes fp16_bytes")
        return marks.line_points(base, told, 26)

    width = marks.layer_step(layers) * layers
    plots = marks.panels(there, draw, width, 84)
    return marks.framed(plots, shown, "Time of each layer", caption or times_by_layer_caption(frame))


def times_by_layer_caption(frame: pl.DataFrame) -> str:
    """State the time of all layers together over that of the exact cache."""
    needed = columns.require(frame, "times_by_layer_caption", "part side microseconds")
    sums = needed.group_by("part", "side").agg(pl.col("microseconds").sum())
    told = []
    for part in ("store", "attend"):
        both = dict(sums.filter(part=part).select("side", "microseconds").iter_rows())
        if set(SIDES) <= {*both}:
            told.append(f"to {part} {both['compressed'] / both['exact']:.2f}")
    return f"All layers, over the exact cache's time: {', '.join(told)}. Medians of this machine, now."
