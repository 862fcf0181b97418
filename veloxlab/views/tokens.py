"""From a token to its causes: moved predictions, the errors of each head at a token, and the keys it attends to."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from veloxlab.measure.tokens import pooled_keys
from veloxlab.views import columns, marks, theme
from veloxlab.views.generation import BREAK, LOST, SIDES

BLOCKS = 160  # blocks of keys drawn along the text, each with its greatest weight
KEYS = 10  # in the list
CHOICES = 8  # tokens in the list
WEIGHTS = (1e-4, 1.0)
ERRORS = (1e-6, 1.0)  # relative squared
PARTS = {"output": "output", "values": "its value", "keys": "its key"}
WEIGHED = {"exact": "exact_weight", "compressed": "weight"}
LIKELY = {"exact": "exact_probability", "compressed": "probability"}
ATTENDED = "key key_end weight exact_weight error state text"  # columns that are drawn
ROW = 17  # pixels of a line of a list
WHITE = {" ": "\u2423", "\n": BREAK, "\t": "\u21e5"}  # signs for white space


def seen(text: str) -> str:
    """Return a token's text as a name without outer spaces; signs replace line breaks, and a text of spaces only."""
    signs = WHITE if not text.strip() else {"\n": BREAK}
    return "".join(signs.get(letter, letter) for letter in text).strip(" ")


def losses_along(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the KL divergence of predictions along a text; a click picks a token, which a line marks.

    Rows of `veloxlab.measure.tokens.PREDICTIONS`; for a long text, of `veloxlab.measure.tokens.worst_of_blocks`.
    """
    shown = columns.require(frame, "losses_along", "position text kl probability exact_probability").sort("position")
    place = pl.col("position")
    ends = {
        "begin": (place + place.shift(1, fill_value=place.first() - 1)) / 2,
        "end": (place + place.shift(-1, fill_value=place.last() + 1)) / 2,
    }
    told = columns.tips("text position kl probability exact_probability")
    every = alt.Chart().encode(x=columns.x("begin", "position in the text, tokens", nice=False), x2=alt.X2("end:Q"))
    drawn = columns.on_log_scale(alt.Chart(), "kl", LOST).encode(x=alt.X("position:Q"))
    lost = alt.Chart().transform_filter("!isValid(datum.kl)").mark_text(**marks.CROSS)
    plot = marks.layered(
        drawn.mark_rule(strokeWidth=2, color=theme.CHOSEN).encode(
            y=columns.log_y("kl", ["KL divergence", "nats"], LOST), y2=alt.value("height")
        ),
        marks.above(drawn, "kl", LOST[1]),
        lost.encode(x=alt.X("position:Q"), y=alt.value(6)),
        marks.token_rule(),
        every.mark_rect(opacity=0, cursor="pointer").encode(tooltip=told),  # on top: clicks at any height pick
    )
    heading = "What each prediction of the text lost: click a token"
    said, plots = caption or losses_caption(frame), [marks.sized(plot, theme.WIDTH - 60, 90)]
    return marks.framed(plots, shown.with_columns(**ends), heading, said, picks=[marks.PICKED_TOKEN])


def losses_caption(frame: pl.DataFrame) -> str:
    """State which token lost most, and how many divergences are not finite."""
    finite = frame.filter(pl.col("kl").is_finite()).sort("kl", "position")
    said = [
        f"Most: {row['kl']:.3g} nats at token {row['position']} ({seen(row['text'])!r}), {_own_change(row)}"
        for row in finite.filter(pl.col("kl") > 0).tail(1).iter_rows(named=True)
    ]
    return marks.sentence(*said or ["No prediction moved"], marks.broken(frame.height - finite.height))


def _own_change(row: dict[str, Any]) -> str:
    """A divergence is of the whole prediction: the probability of the text's token may even rise."""
    exact, now = row["exact_probability"], row["probability"]
    fell = f"whose probability fell from {exact:.3g} to {now:.3g}"
    return fell if now < exact else "whose probability did not fall: other tokens changed"


def token_heads(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the errors at one token in every layer and KV head: output of attention, value, key; a click picks a head.

    Rows of `veloxlab.measure.tokens.ERRORS_OF_TOKEN`.
    """
    shown = columns.require(frame, "token_heads", "layer head tensor error")
    grid = marks.HeadMap(shown)
    parts = [part for part in PARTS if part in shown["tensor"]]

    colour = columns.log_colour(
        "error", "relative MSE of output, value or key", ERRORS, orient="bottom", gradientLength=220
    )

    def cells(part: str, last: bool) -> marks.Plot:
        pooled = grid.cells(part, {}, {"error": "max(error)"}, last=last, words=PARTS[part])
        told = columns.tips("layer", ("group", grid.words), ("error", f"relative MSE of {PARTS[part]}", ".3g"))
        return marks.layered(
            columns.on_log_scale(pooled, "error", ERRORS)
            .mark_rect(cursor="pointer")
            .encode(color=colour, tooltip=told),
            pooled.transform_filter("!isValid(datum.error)").mark_text(**marks.CROSS),
            marks.picked_cell(pooled, grid.group),
        )

    plots = marks.panels(parts, cells, grid.width, grid.height)
    maps = [marks.stacked(alt.VConcatChart, plots, 8)]
    heading = "What this token lost in each layer and head"
    picks = [marks.PICKED, marks.PICKED_HEAD]
    return marks.framed(maps, shown, heading, caption or heads_caption(frame), shared=["color"], picks=picks)


def heads_caption(frame: pl.DataFrame) -> str:
    """State the layer and head with the most error for each part."""
    finite = frame.filter(pl.col("error").is_finite()).sort("error", "layer", "head")
    worst = {row["tensor"]: row for row in finite.iter_rows(named=True)}  # the last of each
    said = [
        f"{words} in layer {worst[part]['layer']}, head {worst[part]['head']} ({worst[part]['error']:.2g})"
        for part, words in PARTS.items()
        if part in worst and worst[part]["error"] > 0
    ]
    return marks.sentence(
        f"Most: {', '.join(said)}" if said else "Nothing is lost", marks.broken(frame.height - finite.height)
    )


def attended_keys(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the keys that a token attends to, with exact and compressed weights: along the text, and the first ten.

    Rows of `veloxlab.measure.tokens.ATTENDED`, with a column ``text``, the text of the key's token. Many keys are drawn
    in blocks, each with its greatest weight.
    """
    shown = attended_data(columns.require(frame, "attended_keys", ATTENDED))
    drawn = {f"{side}_side": f"max(datum.{weight}, {WEIGHTS[0]})" for side, weight in WEIGHED.items()}
    along = marks.only(kind="block").transform_calculate(**drawn)
    along = along.encode(x=columns.x("key", nice=False), x2=alt.X2("key_end:Q"))
    axis = {"type": "log", "domain": WEIGHTS, "nice": False, "values": columns.log_ticks(WEIGHTS)}
    exact, ours = (columns.y(f"{side}_side:Q", "weight", labelExpr=columns.LABEL, **axis) for side in SIDES)
    line = marks.layered(  # no text for a screen reader on each block; the list below has it
        along.mark_rect(color=SIDES["exact"], opacity=0.4, aria=False).encode(y=exact, y2=alt.value("height")),
        along.mark_rule(color=SIDES["compressed"], strokeWidth=2, aria=False).encode(y=ours),
        along.mark_rect(opacity=0, aria=False).encode(tooltip=columns.tips("key weight exact_weight error")),
    )
    told = columns.tips("said state weight exact_weight error")
    listing = _beside(marks.only(kind="key"), WEIGHED, "weight, mean over the query heads", told)
    plots = [marks.sized(line, theme.WIDTH - 60, 70), marks.sized(listing, theme.WIDTH - 160, ROW * KEYS)]
    return marks.framed(plots, shown, "The keys that this token attends to", caption or attended_caption(frame))


def attended_data(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of `attended_keys`: blocks of keys along the text, and the listed keys."""
    needed = frame.select(ATTENDED.split())
    blocks = pooled_keys(needed, BLOCKS).with_columns(kind=pl.lit("block"))
    most = needed.sort(pl.max_horizontal("weight", "exact_weight"), descending=True).head(KEYS)
    name = pl.format("{}  {}", "key", pl.col("text").map_elements(seen, pl.String))
    listed = most.with_columns(kind=pl.lit("key"), rank=pl.int_range(pl.len()), said=name)
    return pl.concat([blocks, listed], how="diagonal")


def attended_caption(frame: pl.DataFrame) -> str:
    """State the share of attention that moved, the key with the greatest change, and how many keys are in codes."""
    change = frame["weight"] - frame["exact_weight"]
    moved = float(change.abs().sum()) / 2
    row = frame.row(int(change.abs().arg_max() or 0), named=True)
    coded = frame.filter(state="codes").height
    most = f"most at key {row['key']} ({seen(row['text'])!r}): {row['exact_weight']:.3f} became {row['weight']:.3f}"
    return f"{moved:.1%} of the attention moved; {most}; {coded} of {frame.height} keys are in codes"


def alternatives(frame: pl.DataFrame, *, caption: str = "") -> alt.VConcatChart:
    """Draw the most likely tokens at one position of a text, with the exact and with the compressed cache.

    Rows of one position of `veloxlab.measure.tokens.ALTERNATIVES`; the token of the text is marked.
    """
    columns.require(frame, "alternatives", "rank text probability exact_probability", one="position")
    shown = alternatives_data(frame)
    told = columns.tips("said probability exact_probability")
    listing = _beside(alt.Chart(), LIKELY, "probability of the next token", told)
    plots = [marks.sized(listing, theme.WIDTH - 160, ROW * CHOICES)]
    heading = "What could stand there: the alternatives that it won or lost to"
    return marks.framed(plots, shown, heading, caption or alternatives_caption(frame))


def alternatives_data(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of `alternatives`: the listed tokens and their names."""
    name = pl.col("text").map_elements(seen, pl.String)
    came = pl.col("came")
    said = pl.format("{}. {}", "rank", pl.when(came).then(pl.format("{}  \u25c0 text", name)).otherwise(name))
    # two tokens may have the same text; the same number of rows for every token keeps the chart's height
    shown = frame.sort(~came, "rank").head(CHOICES).sort("rank")
    return shown.select("position", "rank", "text", "probability", "exact_probability", said=said)


def alternatives_caption(frame: pl.DataFrame) -> str:
    """State the choice of each cache, and how the probability of the text's own token changed."""
    first = [seen(frame.sort(column, "rank", descending=[True, False])["text"][0]) for column in LIKELY.values()]
    chosen = (
        f"Both choose {first[0]!r}" if first[0] == first[1] else f"Exact chooses {first[0]!r}, compressed {first[1]!r}"
    )
    (came,) = frame.filter("came").to_dicts()
    text = f"the text has {seen(came['text'])!r}, {came['exact_probability']:.3g} exact, {came['probability']:.3g} now"
    most = frame.sort((pl.col("probability") - pl.col("exact_probability")).abs(), descending=True).row(0, named=True)
    other = (
        f"most changed: {seen(most['text'])!r}, {most['exact_probability']:.3g} exact, {most['probability']:.3g} now"
    )
    return f"Token {came['position']}. {chosen}; {text}" + ("" if most["came"] else f"; {other}")


def _beside(rows: alt.Chart, fields: dict[str, str], title: str, told: list[alt.Tooltip]) -> alt.LayerChart:
    """Draw names ``said`` in the order of ``rank``, each with an exact and a compressed number joined by a line."""
    exact, ours = fields.values()
    y = columns.y("said", None, sort=alt.SortField("rank"), labelLimit=150)
    x = columns.x(exact, title, zero=True, tickCount=5)
    fold = rows.transform_fold([exact, ours], as_=["field", "number"])
    fold = fold.transform_calculate(side=f"datum.field === '{ours}' ? 'compressed' : 'exact'")
    points = fold.mark_point(filled=True, opacity=1).encode(
        x=alt.X("number:Q"),
        y=y,
        color=marks.scaled(alt.Color, "side", SIDES),
        shape=marks.scaled(alt.Shape, "side", {"exact": "diamond", "compressed": "circle"}),
        size=alt.value(60),
        tooltip=told,
    )
    return marks.layered(rows.mark_rule().encode(x=x, x2=alt.X2(f"{ours}:Q"), y=y), points)
