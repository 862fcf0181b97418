"""The texts of the page of advice: a table of caches, and whether an answer changed."""

from __future__ import annotations

import html

import polars as pl

from veloxlab.measure.advice import loss_source
from veloxlab.measure.generation import SIDES, first_parting
from veloxlab.measure.narrow import Narrow
from veloxlab.views.memory import amount
from veloxlab.views.picture import html_table
from veloxlab.widgets.selection import Choice

ROWS = 12  # of the table
ENOUGH = 0.25  # of the tokens in codes: with fewer, an equal answer says little
ALL_CODES = "all through codes"
TITLES = ["", "cache", "fits", "bytes held", "most tokens", "nats a token", "other first choice", "loss is"]


def advice_table(frame: pl.DataFrame, picked: str, note: str = "") -> str:
    """HTML of the first rows of `veloxlab.measure.advice.ADVICE`, and of the picked row, which is marked if it fits.

    ``note``: the sentence under the table.
    """
    rows = [row for place, row in enumerate(frame.to_dicts()) if place < ROWS or row["name"] == picked]
    lines = [
        (
            "\u25b6" if row["name"] == picked and row["fits"] else "",
            row["name"],
            "yes" if row["fits"] else "no",
            amount(row["held_bytes"]).replace(" ", "\u00a0"),
            f"{row['most_tokens']:,}",
            f"{row['kl_mean']:.3f}",
            f"{row['top1_flips']:.0%}",
            loss_source(row),
        )
        for row in rows
    ]
    return html_table(TITLES, lines, cell="padding: 1px 14px 1px 0", left=2) + f"<p>{html.escape(note)}</p>"


def narrow_said(name: str, found: Narrow, goal: str) -> str:
    """HTML: which layers may have fewer bits, at which limit, and how that was measured."""
    limit = f"The limit for {goal} is {found.limit} nats a token: see \u201cused for\u201d."
    said = f"{found} {limit} Measured with all tokens except the sinks in codes."
    return f"<b>{html.escape(name)}</b>: {html.escape(said)}"


def narrow_lines(choice: Choice) -> str:
    """Lines of Python that make a cache in which some layers have bits of their own, the same in all of these."""
    key_bits, value_bits = next(iter(choice.own_bits.values()))
    lines = [
        f'plan = vl.Plan.uniform(model, "{choice.method}", key_bits={choice.key_bits}, value_bits={choice.value_bits})',
        f"for layer in {sorted(choice.own_bits)}:",
        f"    plan = plan.with_layer(layer, key_bits={key_bits}, value_bits={value_bits})",
    ]
    return "\n".join([*lines, *choice.lines("plan")])


def answer_said(rows: pl.DataFrame, choice: Choice, read: int) -> str:
    """HTML: whether two answers differ, from which token, and how probable both tokens were there.

    ``rows``: `veloxlab.measure.generation.GENERATION`; a token without text ends an answer. ``read``: tokens of the
    chat and the answer, which `Choice.coded` divides.
    """
    parting = first_parting(rows)
    sides = [rows.filter(side=side) for side in SIDES]
    exact, ours = (html.escape("".join(own["text"])) for own in sides)
    about = f"At its end, {choice.in_codes(read)}"
    coded = choice.coded(read)
    if parting is None and coded < ENOUGH * read:
        words = f"This chat is too short to tell: {coded} of {read} tokens are in codes."
        return f"{words} Tick \u201c{ALL_CODES}\u201d, or give a longer chat.<br>\u201c{exact}\u201d"
    if parting is None:
        return f"The answer does not change in {sides[0].height} tokens. {about}<br>\u201c{exact}\u201d"
    words = f"The answer changes at token {parting + 1}. {about}"
    if parting < min(own.height for own in sides):
        (mine, is_mine), (theirs, is_theirs) = (
            (html.escape(own["text"][parting]) or "(end)", own["exact_probability"][parting]) for own in sides
        )
        words += (
            f" There the exact cache gives \u201c{mine}\u201d {is_mine:.0%} and \u201c{theirs}\u201d {is_theirs:.0%}."
        )
    return f"{words}<br>exact: \u201c{exact}\u201d<br>compressed: \u201c{ours}\u201d"
