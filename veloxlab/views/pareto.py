"""A search's measured Pareto front, and behind it what was measured and is not on it."""

from __future__ import annotations

import altair as alt
import polars as pl

from veloxlab.views import palette
from veloxlab.views.columns import require
from veloxlab.views.furniture import caption_title, framed, method_look
from veloxlab.views.logscale import LABEL, Domain, log_domain, log_ticks, on_log_scale

FRONT = "front"
NUMBERS = ("row", "key_bits", "value_bits", "sinks", "window", "bytes_per_token", "windows", "kl", "low", "high")


def pareto_front(frame: pl.DataFrame, *, caption: str | None = None) -> alt.VConcatChart:
    """Draw candidates by the bytes they hold for a token and by how far they move the model's predictions.

    Parameters
    ----------
    frame
        Rows of `veloxlab.pareto.SEARCHED`. Those of the state ``"front"`` are joined, with their intervals; others
        that were measured are faint; those that were not are counted in the caption.
    caption
        The line under the heading; by default `pareto_caption`.
    """
    texts = dict.fromkeys(("method", "state"), "text")
    require(frame, texts | dict.fromkeys(NUMBERS, "number"), "pareto_front")  # type: ignore[arg-type]
    protected = pl.col("protected").cast(pl.List(pl.String)).list.join(", ")
    shown = frame.filter(pl.col("kl").is_finite()).select(*texts, *NUMBERS, protected=protected)
    scale = log_domain(shown["kl"])
    plot = (
        alt.layer(*_marks(shown, scale))
        .encode(
            x=alt.X("bytes_per_token:Q", title="bytes held for a token")
            .scale(zero=False, nice=False, padding=24)
            .axis(tickCount=6),
            y=alt.Y("kl_drawn:Q", title=["mean KL from the exact model", "nats"])
            .scale(type="log", domain=scale, nice=False, clamp=True)
            .axis(values=log_ticks(scale), labelExpr=LABEL),
        )
        .properties(width=palette.WIDTH - 90, height=280, title=caption_title())
    )
    words = pareto_caption(frame) if caption is None else caption
    return framed([plot], shown, "The caches that nothing else beats", words, pickable=False)


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


def _marks(shown: pl.DataFrame, scale: Domain) -> list[alt.Chart]:
    methods = shown["method"].unique(maintain_order=True).sort().to_list()
    colour, shape = method_look(methods)
    tooltip = [
        alt.Tooltip("row:Q"),
        alt.Tooltip("method:N"),
        alt.Tooltip("key_bits:Q", title="bits of keys"),
        alt.Tooltip("value_bits:Q", title="bits of values"),
        alt.Tooltip("sinks:Q"),
        alt.Tooltip("window:Q"),
        alt.Tooltip("protected:N", title="exact layers"),
        alt.Tooltip("bytes_per_token:Q", title="bytes a token", format=",.1f"),
        alt.Tooltip("kl:Q", title="mean KL (nats)", format=".3g"),
        alt.Tooltip("low:Q", title="interval from", format=".3g"),
        alt.Tooltip("high:Q", title="to", format=".3g"),
        alt.Tooltip("windows:Q", title="windows measured"),
        alt.Tooltip("state:N"),
    ]
    measured = on_log_scale(alt.Chart(), "kl", scale)
    front = measured.transform_filter(f"datum.state === '{FRONT}'")
    steps = front.mark_line(interpolate="step-after", color=palette.NEUTRAL, strokeWidth=4, opacity=0.3)
    ends = on_log_scale(on_log_scale(front, "low", scale), "high", scale)
    intervals = ends.mark_rule(strokeWidth=1.5, opacity=0.7).encode(y="low_drawn:Q", y2="high_drawn:Q", color=colour)
    others = (
        measured.transform_filter(f"datum.state !== '{FRONT}'")
        .mark_point(filled=True, size=36, opacity=0.3)
        .encode(color=colour, shape=shape, tooltip=tooltip)
    )
    points = front.mark_point(filled=True, size=80, opacity=1).encode(color=colour, shape=shape, tooltip=tooltip)
    return [steps, others, intervals, points]
