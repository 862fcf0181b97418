"""Encoding the keys and values of all layers, beside the attention of one token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from veloxlab.codecs.codec import Codec
from veloxlab.codecs.method import Role
from veloxlab.measure.bench.attention import METHOD_BITS, SHAPES, TOKENS, fitted, ours
from veloxlab.measure.bench.timing import IN_A_ROW, Progress, Row, Shape, microseconds, vectors
from veloxlab.measure.buffers import CHUNK

ENCODED = ("turboquant", "rvq", "rabitq", "ratequant", "spectralquant", "qjl")  # methods whose encoding is timed
_ROLES: tuple[Role, Role] = ("keys", "values")


def encode_steps(
    shape: Shape = SHAPES[0],
    behind: int = TOKENS[1],
    chunk: int = CHUNK,
    methods: Sequence[str] = ENCODED,
    progress: Progress = print,
) -> list[Row]:
    """What it takes to encode the keys and values of all layers: of one decoded token, and of a chunk of a prefill.

    Rows: ``cache, query_heads, kv_heads, head_dim, layers, tokens, microseconds, attention_microseconds, ratio``. Both
    times are of all layers, evaluated together; ``attention`` is that of one token to ``behind`` others, in 4-bit
    codes, and ``ratio`` is to it. Calibrated methods are fitted to random vectors, once for all layers.
    """
    attention = microseconds(ours(shape, behind, METHOD_BITS)).evaluating
    rows: list[Row] = []
    for name in methods:
        codecs = [fitted(name, shape, role) for role in _ROLES]
        for count in (1, chunk):
            pairs = [[vectors(shape, count) for _ in codecs] for _ in range(IN_A_ROW)]
            mx.eval(pairs)
            calls = [partial(_encode, codecs, pair) for pair in pairs]
            each = microseconds(calls).evaluating
            rows.append(
                {
                    "cache": f"{name} {METHOD_BITS} bit",
                    "query_heads": shape.query_heads,
                    "kv_heads": shape.kv_heads,
                    "head_dim": shape.head_dim,
                    "layers": IN_A_ROW,
                    "tokens": count,
                    "microseconds": each * IN_A_ROW,
                    "attention_microseconds": attention * IN_A_ROW,
                    "ratio": each / attention,
                }
            )
            progress(f"encoding {count} tokens of {IN_A_ROW} layers: {name}, {each * IN_A_ROW:.0f} µs")
            del calls, pairs
            mx.clear_cache()
    return rows


def _encode(codecs: Sequence[Codec], vectors: Sequence[mx.array]) -> list[dict[str, mx.array]]:
    return [codec.encode(x).arrays for codec, x in zip(codecs, vectors, strict=True)]
