"""Attention of one token: exact, mlx-lm's own quantized, and over codes.

Every one of many calls has a cache of its own, as far as memory allows, and a query of its own: mlx-lm's quantized
attention scales the one that it is given in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
from mlx_lm.models import base

from veloxlab.cache.attention import History, Segment
from veloxlab.cache.room import CHUNK
from veloxlab.codecs import METHODS
from veloxlab.codecs.base import Code, Codec, Sample
from veloxlab.codecs.method import Role
from veloxlab.codecs.parts.rope import Rope
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.measure.bench.timing import (
    IN_A_ROW,
    Progress,
    Row,
    Shape,
    bandwidth,
    copies,
    microseconds,
    query,
    vectors,
)

SHAPES = (Shape(32, 8, 128), Shape(16, 2, 128), Shape(8, 1, 256))
TOKENS = (4096, 32768, 131072)
BITS = (2, 3, 4, 8)
METHOD_BITS = 4
_SIXTEEN = 2  # bytes of a number of the exact cache
_TILE = 1024  # tokens of random vectors that are encoded once, and repeated
_ROLES: tuple[Role, Role] = ("keys", "values")
_Calls = list[Callable[[], mx.array]]


def decode_attention(
    shapes: Sequence[Shape] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    bits: Sequence[int] = BITS,
    progress: Progress = print,
) -> list[Row]:
    """One query token that attends to ``tokens`` others: exact in 16 bits, mlx-lm at 4 and 8 bits, ours.

    Rows: ``cache, query_heads, kv_heads, head_dim, tokens, microseconds`` (evaluating, see `timing`),
    ``making_microseconds, alone_microseconds, bytes, gigabytes_per_second, roofline_microseconds`` (`with_roofline`),
    ``ratio`` (to the exact cache's time of the same shape).
    """
    rows: list[Row] = []
    for shape in shapes:
        for count in tokens:
            ways: dict[str, Callable[[], _Calls]] = {
                "exact 16 bit": partial(_exact, shape, count),
                **{f"mlx-lm {b} bit": partial(_mlx_lm, shape, count, b) for b in (4, 8)},
                **{f"turboquant {b} bit": partial(ours, shape, count, b) for b in bits},
            }
            exact_time = 0.0
            for name, make in ways.items():
                row = _row(name, shape, count, make(), _bytes(name, shape, count))
                exact_time = exact_time or row["microseconds"]
                rows.append(row | {"ratio": row["microseconds"] / exact_time})
                progress(_line(row))
                mx.clear_cache()
    return with_roofline(rows, bandwidth())


def with_roofline(rows: Sequence[Row], gigabytes_per_second: float) -> list[Row]:
    """The rows, each with the time that its bytes alone would take at the fastest that anything here moved them.

    A kernel that only reads moves them faster than a copy does.
    """
    fastest = max(gigabytes_per_second, *(row["gigabytes_per_second"] for row in rows))
    return [row | {"roofline_microseconds": row["bytes"] / fastest / 1e3} for row in rows]


def attention_of_methods(
    methods: Sequence[str], shape: Shape = SHAPES[0], tokens: int = TOKENS[1], progress: Progress = print
) -> list[Row]:
    """The same at `METHOD_BITS` for each of ``methods``, fitted to random vectors; ``ratio`` is to exact attention."""
    exact = _row("exact 16 bit", shape, tokens, _exact(shape, tokens), _bytes("exact 16 bit", shape, tokens))
    rows = [exact | {"ratio": 1.0}]
    for method in methods:
        codecs = [fitted(method, shape, role) for role in _ROLES]
        codes = [_repeated(codec.encode(vectors(shape, _TILE)), tokens) for codec in codecs]
        held = sum(code.nbytes for code in codes)
        histories = [
            History((Segment(codecs[0], _copied(codes[0]), codecs[1], _copied(codes[1])),)) for _ in range(copies(held))
        ]
        row = _row(f"{method} {METHOD_BITS} bit", shape, tokens, _attending(shape, histories), held)
        rows.append(row | {"ratio": row["microseconds"] / exact["microseconds"]})
        progress(_line(row))
        mx.clear_cache()
    return with_roofline(rows, bandwidth())


def fitted(method: str, shape: Shape, role: Role, bits: int = METHOD_BITS) -> Codec:
    """A codec of a method, fitted to random vectors; of RateQuant with heads of two widths."""
    options: Row = {}
    if method == "ratequant":
        options["head_bits"] = tuple(bits + (-1) ** head for head in range(shape.kv_heads))
    sample = Sample(vectors(shape, 2 * shape.head_dim), rope=Rope(shape.head_dim))
    return METHODS[method].codec(shape.head_dim, bits, role, **options).fit(sample)


def ours(shape: Shape, tokens: int, bits: int) -> _Calls:
    """Calls of attention over TurboQuant's codes, random ones: how long it takes to read them depends on neither codes
    nor scales.
    """
    keys, values = TurboQuant(shape.head_dim, bits), TurboQuant(shape.head_dim, bits, "mse")
    count = copies(2 * shape.kv_heads * tokens * shape.head_dim * bits // 8)
    histories = [
        History((Segment(keys, _code(keys, shape, tokens), values, _code(values, shape, tokens)),))
        for _ in range(count)
    ]
    return _attending(shape, histories)


def _attending(shape: Shape, histories: Sequence[History]) -> _Calls:
    q, scale = query(shape), shape.head_dim**-0.5
    mx.eval(q)
    return [lambda h=h: h.attend(mx.array(q), scale, None) for h in histories]  # type: ignore[misc]


def _row(name: str, shape: Shape, tokens: int, calls: _Calls, size: int) -> Row:
    times = microseconds(calls)
    return {
        "cache": name,
        "query_heads": shape.query_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "tokens": tokens,
        "microseconds": times.evaluating,
        "making_microseconds": times.making,
        "alone_microseconds": times.alone,
        "bytes": size,
        "gigabytes_per_second": size / times.evaluating / 1e3,
    }


def _line(row: Row) -> str:
    shape = f"{row['query_heads']}/{row['kv_heads']}×{row['head_dim']}"
    times = f"{row['microseconds']:.0f} µs, and {row['making_microseconds']:.0f} to make the graph"
    return f"{shape}, {row['tokens']} tokens: {row['cache']}, {times}"


def _exact(shape: Shape, tokens: int) -> _Calls:
    q, scale = query(shape), shape.head_dim**-0.5
    count = copies(2 * _SIXTEEN * shape.kv_heads * tokens * shape.head_dim)
    pairs = [(vectors(shape, tokens), vectors(shape, tokens)) for _ in range(count)]
    mx.eval(q, pairs)
    attention = mx.fast.scaled_dot_product_attention
    return [lambda k=k, v=v: attention(mx.array(q), k, v, scale=scale) for k, v in pairs]  # type: ignore[misc]


def _mlx_lm(shape: Shape, tokens: int, bits: int) -> _Calls:
    q, scale, group = query(shape), shape.head_dim**-0.5, 64
    count = copies(2 * shape.kv_heads * tokens * shape.head_dim * bits // 8)
    pairs = [
        tuple(mx.quantize(vectors(shape, tokens), group_size=group, bits=bits) for _ in range(2)) for _ in range(count)
    ]
    mx.eval(q, pairs)
    attention = base.quantized_scaled_dot_product_attention
    return [
        lambda k=k, v=v: attention(mx.array(q), k, v, scale=scale, mask=None, group_size=group, bits=bits)  # type: ignore[misc]
        for k, v in pairs
    ]


def _code(codec: TurboQuant, shape: Shape, tokens: int) -> Code:
    made_up = codec.reader(codec.encode(vectors(shape, 1))).made_up(tokens, seed=tokens)
    mx.eval(made_up.rows, made_up.root_scale)
    assert made_up.root_scale is not None
    return Code({"codes": made_up.rows, "root_scale": made_up.root_scale})


def _bytes(name: str, shape: Shape, tokens: int) -> int:
    """Bytes of keys and values that one call has to read."""
    values = 2 * shape.kv_heads * tokens * shape.head_dim
    if name.startswith("exact"):
        return values * _SIXTEEN
    bits = int(name.split()[1])
    per_value = bits + (32 / 64 if name.startswith("mlx-lm") else 16 / shape.head_dim)
    return round(values * per_value / 8)


def _repeated(code: Code, tokens: int) -> Code:
    """A code of ``tokens`` tokens, those of ``code`` over and over."""
    times = -(-tokens // code.tokens)
    return Code({name: mx.concatenate([array] * times, axis=2)[:, :, :tokens] for name, array in code.arrays.items()})


def _copied(code: Code) -> Code:
    """The same in memory of its own."""
    arrays = {name: mx.contiguous(array + mx.zeros_like(array)) for name, array in code.arrays.items()}
    mx.eval(arrays)
    return Code(arrays)


ENCODED = ("turboquant", "rvq", "rabitq", "ratequant", "spectralquant", "qjl")  # methods whose encoding is timed


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
