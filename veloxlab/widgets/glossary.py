"""Words that pages use, each with one sentence."""

from __future__ import annotations

import html

WORDS = {
    "keys, values": "what a layer keeps of every token; attention compares keys with a query, and mixes values",
    "KV head": "one of the parts of a layer that keep keys and values of their own; several query heads share it",
    "sinks": "the first tokens of a text, kept exact, because much attention goes to them",
    "window": "the newest tokens, kept exact; up to 32 more wait to be coded together",
    "code bits": "bits of the code of one coordinate of a key (K) or value (V)",
    "true bits": "all bits stored for a value, with scales and norms",
    "relative MSE": "squared error over squared size: 0.01 means that a hundredth of the energy is error",
    "KL (nats)": "how far the next token's probabilities move from those of the exact cache; 0 is no change",
    "other first choice": "share of tokens whose most probable next token is another one than with the exact cache",
    "fp16, exact": "the uncompressed cache, 16 bits a number: what all bytes are compared with",
    "measured": "run on this model and text, or counted in live buffers",
    "predicted": "computed from the layout of codes, or from the committed results of another model",
    "stale": "of older settings: these are being measured, or cannot be",
    "geometric mean": "the mean of logarithms; a mean far above it says that a few heads matter much more than others",
}


def note(why: str, badge: str) -> dict[str, str]:
    """The line above a chart: why it is there, and whether its numbers are "measured", "predicted" or "stale"."""
    return {"why": why, "badge": badge, "tip": "; ".join(WORDS[word] for word in badge.split(", then "))}


def glossary() -> str:
    """HTML that opens at a click."""
    lines = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(said)}</dd>" for word, said in WORDS.items())
    return f"<details class='veloxlab-glossary'><summary>Words used here</summary><dl>{lines}</dl></details>"
