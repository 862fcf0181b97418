"""Charts of generation: two texts from one prompt, token by token, passkeys found, and right answers by task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import altair as alt
import polars as pl

from veloxlab.views import columns, marks, theme

SIDES = {"exact": theme.NEUTRAL, "compressed": theme.CHOSEN}  # the two caches, and their colours
FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
COLUMNS = 84  # characters of a line
ADVANCE = 7.25  # pixels of a character at a size of 12
LINE = 25  # pixels
PLACED = {"shown": pl.String, "line": pl.Int32, "column": pl.Int32, "end": pl.Int32}
PLACES = {"top": 0.08, "middle": 0.45, "low": 0.8, "high": 0.95}  # vertical places, as shares of a line
LOST = (1e-3, 10.0)  # nats: KL that is drawn
BREAK = "\u21b5"  # stands for a new line
HEADING = "Text from one prompt, exact and compressed, with the KL divergence of each token"
ROW = 34  # pixels of a side in the map of passkeys


def token_strip(
    frame: pl.DataFrame,
    *,
    parting: int | None = None,
    lines: int | None = None,
    heading: str = HEADING,
    caption: str = "",
) -> alt.VConcatChart:
    """Draw texts as tokens. A bar under each token of the compressed cache has the colour of its divergence.

    A click on a token of the compressed cache picks it.

    Rows of `veloxlab.measure.generation.GENERATION`: ``side``, ``position``, ``text``, ``probability``,
    ``exact_probability`` and ``kl`` (nats). ``parting``: the first position at which the texts differ; it has a frame.
    ``lines``: least number of lines in the chart; set it to keep the height steady while tokens arrive.
    """
    needed = columns.require(frame, "token_strip", "side text position probability exact_probability kl")
    parted = pl.lit(None, pl.Boolean) if parting is None else pl.col("position") == parting
    place = pl.when(pl.col("side") == "compressed").then("position")
    shown = needed.with_columns(parts=parted.fill_null(False), place=place)
    rows = pl.concat(
        own.hstack(pl.DataFrame([*_places(own["text"])], PLACED, orient="row")) for _, own in _by_side(shown)
    )
    count = max(lines or 0, int(rows["line"].max()) + 1)  # type: ignore[arg-type]
    places = {name: f"datum.line + {share}" for name, share in PLACES.items()}
    down = {"domain": [0, count], "reverse": True, "nice": False, "labels": False, "ticks": False, "grid": False}

    def draw(side: str, _: bool) -> marks.Plot:
        title = side if rows["side"].n_unique() > 1 else None
        top, middle, low = (columns.y(place, title, **down) for place in ("top", "middle", "low"))
        base = marks.only(side=side).transform_calculate(**places)
        base = base.encode(
            x=alt.X("column:Q", axis=None).scale(domain=[0, COLUMNS], nice=False),
            x2=alt.X2("end:Q"),
            tooltip=columns.tips("text position probability exact_probability kl"),
        )
        frame: marks.Look = {"stroke": theme.PICKED, "cornerRadius": 2, "xOffset": -2, "x2Offset": 2}
        layers = [
            base.transform_filter("datum.parts")
            .mark_rect(filled=False, fill=None, **frame)
            .encode(y=top, y2=alt.Y2("high:Q")),
            base.mark_text(align="left", baseline="middle", font=FONT, fontSize=12).encode(
                y=middle, text=alt.Text("shown:N")
            ),
        ]
        if side == "compressed":
            layers = [_lost_bars(base, low), *layers, *_pickable(base, top)]
        return marks.layered(*layers)

    plots = marks.panels([side for side, _ in _by_side(frame)], draw, COLUMNS * ADVANCE, LINE * count)
    said = caption or strip_caption(frame, parting)
    chart = marks.framed(plots, rows, heading, said, picks=[marks.PICKED_TOKEN])
    chart.usermeta = {"veloxlab": {"fixed": True}}  # the width of letters is fixed
    return chart


def _lost_bars(base: alt.Chart, low: alt.Y) -> Any:  # noqa: ANN401 - one of Altair's charts
    """Draw a bar under each token, coloured by its divergence."""
    look: marks.Look = {"orient": "bottom", "format": "~g", "gradientLength": 220, "tickCount": 4}
    legend = alt.Legend(title="KL from the exact cache (nats)", **look)
    colour = alt.Color("kl_drawn:Q", legend=legend).scale(type="log", domain=LOST, clamp=True)
    bars = columns.on_log_scale(base, "kl", LOST).mark_rect(cornerRadius=1)
    return bars.encode(y=low, y2=alt.Y2("high:Q"), color=colour)


def _pickable(base: alt.Chart, top: alt.Y) -> list[marks.Plot]:
    """Draw a background behind the picked token, and a transparent layer that receives clicks on all tokens."""
    picked = base.transform_filter(f"datum.place === {marks.PICKED_TOKEN}")
    ground = picked.mark_rect(color=theme.PICKED, opacity=0.25, xOffset=-2, x2Offset=2)
    return [each.encode(y=top, y2=alt.Y2("high:Q")) for each in (ground, base.mark_rect(opacity=0, cursor="pointer"))]


def strip_caption(frame: pl.DataFrame, parting: int | None) -> str:
    """State where the texts first differ, and the mean divergence up to there, or over all predictions."""
    ours = frame.filter(pl.col("side") == "compressed")
    kls = ours["kl"].drop_nulls()
    total = kls.filter(kls.is_finite()).mean()
    mean = f"mean KL {total:.3g} nats" if isinstance(total, float) else "no prediction yet"
    mean = "; ".join([mean, *columns.not_drawn(kls)])
    if parting is None:
        return f"The same text for {len(ours)} tokens; {mean}."
    return f"The texts part at token {parting + 1} (framed); {mean} over {len(ours)} predictions."


def held_while_generating(frame: pl.DataFrame, *, tokens: int | None = None, caption: str = "") -> alt.VConcatChart:
    """Draw the bytes that the compressed cache holds during generation, beside those of the exact cache.

    Rows of `veloxlab.measure.generation.GENERATION`: ``side``, ``position``, ``held_bytes`` and ``fp16_bytes``. The
    exact cache is drawn at 16 bits a number, for the generated tokens. ``tokens``: length of the axis; by default the
    tokens in the frame. Set it to keep the axis steady while tokens arrive.
    """
    shown = columns.require(frame, "held_while_generating", "side position held_bytes fp16_bytes")
    exact = pl.col("side") == "exact"
    shown = shown.with_columns(held_bytes=pl.when(exact).then("fp16_bytes").otherwise("held_bytes"))
    last = (tokens or int(shown["position"].max()) + 1) - 1  # type: ignore[arg-type]
    told = columns.tips("side position held_bytes")
    base = alt.Chart().transform_calculate(megabytes="datum.held_bytes / 1e6")
    base = base.encode(
        x=columns.x("position", domain=[0, max(last, 1)], nice=False),
        y=columns.y("megabytes", tickCount=4, zero=True),
        color=marks.scaled(alt.Color, "side", SIDES),
        tooltip=told,
    )
    line = base.mark_line(interpolate="step-after", strokeWidth=2)
    plot = marks.sized(marks.layered(line, marks.points(base, told, 14)), theme.WIDTH - 100, 120)
    return marks.framed([plot], shown, "Bytes held while the texts are generated", caption or held_caption(frame))


def held_caption(frame: pl.DataFrame) -> str:
    """State the held bytes of the compressed cache, their ratio to 16 bits, and the allocation of mlx-lm's cache."""
    last = {side: own.sort("position").row(-1, named=True) for side, own in _by_side(frame)}
    allocated = f"mlx-lm allocates {last['exact']['held_bytes'] / 1e6:,.3g} MB, in steps" if "exact" in last else ""
    if "compressed" not in last:
        return allocated.capitalize()
    held, exact = (last["compressed"][name] for name in ("held_bytes", "fp16_bytes"))
    sizes = f"{held / 1e6:,.3g} MB, exact in 16 bits {exact / 1e6:,.3g} MB"
    less = f"{exact / held:.2f} times less" if held <= exact else "more, for exact tokens have the model's own type"
    return marks.sentence(f"Held now: compressed {sizes} ({less})", allocated)


def lines_for(tokens: int) -> int:
    """Return the number of lines for so many tokens of ordinary text, with a margin."""
    return math.ceil(tokens * 5.5 / COLUMNS) + 2


def passkey_map(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw which hidden passkeys were found, by depth and cache.

    Rows of `veloxlab.measure.generation.PASSKEY`: ``depth`` (0 to 1), ``side``, ``passkey``, ``answer``, ``hit``.
    """
    needed = columns.require(frame, "passkey_map", "depth side passkey context answer")
    shown = needed.with_columns(pl.col("answer").str.strip_chars(), frame["hit"])
    base = alt.Chart().encode(
        x=columns.x("depth:O", format=".0%"),
        y=columns.y("side", None, sort=list(SIDES)),
        tooltip=columns.tips("side passkey answer depth"),
    )
    found, missed = (base.transform_filter(test) for test in ("datum.hit", "!datum.hit"))
    label = "(datum.hit ? '\u2713 ' : '\u2717 ') + slice(datum.answer, 0, 9)"
    plot = marks.layered(
        found.mark_rect(color=theme.CHOSEN, opacity=0.25, cornerRadius=3),
        missed.mark_rect(filled=False, stroke=theme.PICKED, strokeWidth=1.5, strokeDash=[4, 3], cornerRadius=3),
        base.transform_calculate(label=label).mark_text(font=FONT, fontSize=11).encode(text=alt.Text("label:N")),
    )
    plots = [marks.sized(plot, theme.WIDTH - 60, alt.Step(ROW))]
    heading = "Numbers hidden in a text, and what was answered"
    return marks.framed(plots, shown, heading, caption or passkey_caption(frame))


def passkey_caption(frame: pl.DataFrame) -> str:
    """State how many passkeys each cache found, and the length of the text."""
    found = [f"{side} {own['hit'].sum()} of {len(own)}" for side, own in _by_side(frame)]
    return f"Found in {frame['context'][0]:,} tokens: {', '.join(found)}."


def _by_side(frame: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    return ((side, own) for side in SIDES if len(own := frame.filter(pl.col("side") == side)))


def _places(texts: pl.Series) -> Iterator[tuple[str, int, int, int]]:
    """Yield for each token its text, the line and first column, and the column after its last character."""
    line = column = 0
    for text in texts:
        shown = text.replace("\n", BREAK).replace("\t", " ")
        start = len(shown) - len(shown.lstrip(" "))
        word = shown.strip(" ")
        if column + start + len(word) > COLUMNS and column > 0:
            line, column, start = line + 1, 0, 0
        yield word, line, column + start, column + start + len(word)
        column += start + len(word) + (len(shown) - len(shown.rstrip(" ")) if word else 0)
        if text.endswith("\n"):
            line, column = line + 1, 0


TASK_ROW = 30  # pixels of a task
SHARES = {"domain": [0, 1], "nice": False, "format": "%", "tickCount": 5}


def task_scores(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the shares of right answers with both caches, and below that their difference with its interval.

    Rows of `veloxlab.measure.tasks.EVALUATION`: ``task``, ``questions``, ``chance``, ``exact``, ``compressed``,
    ``difference``, ``low``, ``high``, ``same``, ``nll_exact``, ``nll`` (nats) and ``coded_share``; shares are 0 to 1.
    """
    numbers = "questions chance exact compressed difference low high same nll_exact nll coded_share"
    shown = columns.require(frame, "task_scores", "task", numbers)
    order = shown["task"].to_list()
    interval = [(end, f"interval {word}", ".0%") for end, word in (("low", "from"), ("high", "to"))]
    told = columns.tips(
        "task questions exact compressed difference", *interval, "same nll_exact nll coded_share chance"
    )
    side: Any = {"as_": ["side", "score"]}
    base = alt.Chart().encode(y=columns.y("task", None, sort=order), tooltip=told)
    both = base.transform_fold(["exact", "compressed"], **side)
    score = columns.x("score", "right answers; the dashes are what a guess gets", **SHARES)
    shapes = marks.scaled(alt.Shape, "side", {"exact": "circle", "compressed": "diamond"})
    scores = marks.layered(
        base.mark_rule(strokeWidth=5, opacity=0.2).encode(x=alt.X("exact:Q"), x2=alt.X2("compressed:Q")),
        base.mark_tick(thickness=1.5, size=TASK_ROW - 8, strokeDash=[3, 3], color=theme.NEUTRAL).encode(
            x=alt.X("chance:Q")
        ),
        both.mark_point(filled=True, size=90, opacity=1).encode(
            x=score, color=marks.scaled(alt.Color, "side", SIDES), shape=shapes
        ),
    )
    ends = [end for name in ("low", "high", "difference") for end in shown[name].drop_nulls()]
    reach = max(0.1, *map(abs, ends))
    around = SHARES | {"domain": [-reach, reach]}
    apart = columns.x("difference", "compressed \u2212 exact, with its 95 % interval", **around)
    difference = marks.layered(
        base.mark_rule(strokeWidth=1, opacity=0.4).encode(x=alt.datum(0.0)),
        base.mark_rule(strokeWidth=2, color=theme.CHOSEN).encode(x=alt.X("low:Q"), x2=alt.X2("high:Q")),
        base.mark_point(filled=True, size=60, opacity=1, color=theme.CHOSEN, shape="diamond").encode(x=apart),
    )
    plots = [marks.sized(plot, theme.WIDTH - 100, alt.Step(TASK_ROW)) for plot in (scores, difference)]
    return marks.framed(plots, shown, "Questions asked through the cache", caption or task_caption(frame))


def task_caption(frame: pl.DataFrame) -> str:
    """State the tasks with a significant difference, and those where the exact cache is no better than a guess."""
    rows = columns.require(frame, "task_caption", "task chance exact low high").to_dicts()
    worse = [row["task"] for row in rows if row["high"] is not None and row["high"] < 0]
    better = [row["task"] for row in rows if row["low"] is not None and row["low"] > 0]
    guessed = [row["task"] for row in rows if row["chance"] is not None and row["exact"] <= row["chance"]]
    found = {"fewer right answers": worse, "more right answers": better}
    said = " and ".join(f"{words} on {', '.join(names)}" for words, names in found.items() if names)
    one = all(row["low"] is None for row in rows)
    none = (
        "One context has no interval: ask about several" if one else "No difference is decisive: each interval holds 0"
    )
    said = f"Compressed, {said}" if said else none
    tells_nothing = f"{', '.join(guessed)}: the exact cache guesses too, so this has no meaning" if guessed else ""
    return f"{marks.sentence(said, tells_nothing)}."
