"""Kernels that have shown, on this device, that they agree with their twins.

Before a kernel is first used it runs on a little that is made up, beside its twin. One that disagrees, or that the
compiler refuses, is switched off with one warning, and graph ops do its work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from veloxlab.kernels.assign import assign
from veloxlab.kernels.attend import Exact, Shape, Tokens, attend, attend_twin, can_attend
from veloxlab.kernels.encode import can_spread, decode, encode
from veloxlab.kernels.launch import GpuBackend, gpu
from veloxlab.kernels.readers import Spread, TableReader

_TOKENS = (3, 333, 70)  # sinks, packed and recent ones: no multiples of anything
# half precision in levels, queries and weights: 4e-4 seen on an H100, for every width; a wrong table entry gives 1e-2
_TOLERANCE = 3e-3

# a coordinate on a boundary, to float rounding, may be coded either way: a few in 10,000, and one in a word of ten
_SAME_WORDS = 0.99
_SCALES_APART = 2e-3  # two steps of half precision

_states: dict[object, str] = {}  # of each kernel: empty where it agrees, else what is wrong


class ScalarTable(NamedTuple):
    """What `encode` quantizes with, in its order: see there."""

    signs: mx.array
    boundaries: mx.array
    levels: mx.array
    bits: int
    scale: str


def checked_attend(
    q: mx.array,
    q_coded: mx.array | None,
    tokens: Tokens,
    mask: mx.array | None,
    scale: float,
    backend: GpuBackend,
) -> tuple[mx.array, mx.array | None] | None:
    """`attend`, or None where the kernel for this case cannot be had or does not agree with its twin."""
    shape = Shape.of(q, tokens, mask is not None, scale)
    which = shape, backend
    if which not in _states:
        if not can_attend(tokens, backend):
            return None
        _states[which] = _disagreement(q, q_coded is not None, tokens, mask is not None, scale, backend)
        _warn(f"attend ({tokens.keys.key[0]} keys, {tokens.values.key[0]} values)", _states[which], backend)
    return None if _states[which] else attend(q, q_coded, tokens, mask, shape, backend)


def checked_assign(
    points: mx.array,
    centroids: mx.array,
    bits: int,
    backend: GpuBackend,
    twin: Callable[[mx.array, mx.array, int], mx.array],
) -> mx.array | None:
    """`assign`, or None where the kernel for these shapes and types cannot be had or does not agree with ``twin``."""
    which = "assign", points.shape[-1], points.dtype, centroids.shape, centroids.dtype, bits, backend
    if which not in _states:
        # whole numbers: no distance is rounded, and ties, of which there are many, go to the first
        keys = mx.random.split(mx.random.key(0))
        some = mx.random.randint(-8, 9, (67, points.shape[-1]), key=keys[0]).astype(points.dtype)
        tables = mx.random.randint(-8, 9, centroids.shape, key=keys[1]).astype(centroids.dtype)
        try:
            same = mx.array_equal(assign(some, tables, bits, backend), twin(some, tables, bits)).item()
            _states[which] = "" if same else "it finds other indices than its twin"
        except (RuntimeError, ValueError) as error:  # the compiler's, or the driver's
            _states[which] = _refusal(error)
        _warn("assign", _states[which], backend)
    return None if _states[which] else assign(points, centroids, bits, backend)


def checked_encode(
    x: mx.array,
    table: ScalarTable,
    backend: GpuBackend,
    twin: Callable[[mx.array], tuple[mx.array, mx.array]],
) -> tuple[mx.array, mx.array] | None:
    """`encode`, or None where the kernel for these dimensions cannot be had or does not agree with ``twin``."""
    if not can_spread(x.shape[-1]):
        return None
    which = "encode", x.shape[-1], x.dtype, table.bits, table.scale, backend
    if which not in _states:
        try:
            some = mx.random.normal((1, 2, 67, x.shape[-1]), key=mx.random.key(0)).astype(x.dtype)
            found, wanted = encode(some, *table, backend), twin(some)
            same = _number((found[0] == wanted[0]).mean())
            apart = _number(mx.abs(found[1].astype(mx.float32) / wanted[1].astype(mx.float32) - 1).max())
            _states[which] = "" if same >= _SAME_WORDS and apart <= _SCALES_APART else "it writes other codes"
        except (RuntimeError, ValueError) as error:  # the compiler's, or the driver's
            _states[which] = _refusal(error)
        _warn("encode", _states[which], backend)
    return None if _states[which] else encode(x, *table, backend)


def checked_decode(
    codes: mx.array,
    root_scale: mx.array,
    table: ScalarTable,
    dtype: mx.Dtype,
    backend: GpuBackend,
    twin: Callable[[mx.array, mx.array], mx.array],
) -> mx.array | None:
    """`decode`, or None where the kernel for these dimensions cannot be had or does not agree with ``twin``."""
    dim = table.signs.shape[0]
    if not can_spread(dim):
        return None
    which = "decode", dim, dtype, table.bits, backend
    if which not in _states:
        try:
            keys = mx.random.split(mx.random.key(0), 3)
            high, low = (mx.random.randint(0, 1 << 16, (1, 2, 67, codes.shape[-1]), key=k) for k in keys[:2])
            some = high.astype(mx.uint32) << 16 | low.astype(mx.uint32)
            roots = mx.random.uniform(0.5, 1.5, (1, 2, 67, 1), key=keys[2]).astype(mx.float16)
            wanted = twin(some, roots)
            error = _relative(decode(some, roots, table.signs, table.levels, table.bits, dtype, backend), wanted)
            _states[which] = "" if error <= _TOLERANCE else f"it differs from its twin by {error:.1g}"
        except (RuntimeError, ValueError) as refused:  # the compiler's, or the driver's
            _states[which] = _refusal(refused)
        _warn("decode", _states[which], backend)
    if _states[which]:
        return None
    return decode(codes, root_scale, table.signs, table.levels, table.bits, dtype, backend)


def states() -> dict[str, int]:
    """How many kernels have been tried on this device, by outcome: ``"agrees"``, or what is wrong."""
    counts: dict[str, int] = {}
    for state in _states.values():
        counts[state or "agrees"] = counts.get(state or "agrees", 0) + 1
    return counts


def try_usual() -> None:
    """Try attention over 2-, 3-, 4- and 8-bit scalar codes at head dimensions 64 and 128, four queries a KV head."""
    backend = gpu()
    for dim in (64, 128):
        for bits in (2, 3, 4, 8):
            together = 2 if bits <= 4 else 1
            table = mx.random.normal((1 << (bits * together), together), key=mx.random.key(bits))
            empty = mx.zeros((1, 2, 8, -(-dim * bits // 32)), mx.uint32)
            scales = mx.ones((1, 2, 8, 1), mx.float16)
            side = TableReader(dim, empty, scales, Spread(mx.ones((dim,))), bits * together, table)
            if backend is not None:
                q = mx.zeros((1, 8, 1, dim), mx.float16)
                checked_attend(q, None, Tokens(side, side, None, None, dim, dim), None, dim**-0.5, backend)


def _disagreement(
    q: mx.array, coded_queries: bool, tokens: Tokens, masked: bool, scale: float, backend: GpuBackend
) -> str:
    """What is wrong with the kernel for this case, in words, or nothing."""
    key = mx.random.key(0)
    batch, query_heads, length = 1, q.shape[1], q.shape[2]
    kv_heads, (sinks, packed, recent) = tokens.keys.kv_heads, _TOKENS
    rows = query_heads // kv_heads * length

    def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
        nonlocal key
        key, own = mx.random.split(key)
        return mx.random.normal(shape, key=own).astype(dtype)

    def exact(run: Exact | None, count: int) -> Exact | None:
        if run is None:
            return None
        keys, values = (
            normal(batch, kv_heads, count, dim, dtype=run.keys.dtype) for dim in (tokens.key_dim, tokens.value_dim)
        )
        return Exact(keys, values)

    made_up = replace(
        tokens,
        keys=tokens.keys.made_up(packed, 1),
        values=tokens.values.made_up(packed, 2),
        sinks=exact(tokens.sinks, sinks),
        recent=exact(tokens.recent, recent),
    )
    query = normal(batch, query_heads, length, tokens.key_dim, dtype=q.dtype)
    total = packed + sum(made_up.exact_counts)
    mask = mx.where(normal(batch, query_heads, length, total) < 1, 0.0, -1e9) if masked else None
    # as large as queries that were brought there from unit ones; the space itself is the codec's business
    queries_in_codes = normal(batch, kv_heads, rows, tokens.keys.dim)
    space = tokens.keys.space
    try:
        if space is not None:
            grouped = query.astype(mx.float32).reshape(batch, kv_heads, rows, tokens.key_dim)
            queries_in_codes = space.enter(grouped)
        shape = Shape.of(query, made_up, masked, scale)
        out, coded = attend(query, queries_in_codes if coded_queries else None, made_up, mask, shape, backend)
        plain, wanted_coded = attend_twin(query, queries_in_codes, made_up, mask, scale)
        if made_up.values.space is not None:
            plain = plain + made_up.values.space.leave(wanted_coded)
        errors = [_relative(out.reshape(plain.shape), plain)]
        if coded is not None:
            errors.append(_relative(coded, wanted_coded))
    except (RuntimeError, ValueError) as error:  # the compiler's, or the driver's
        return _refusal(error)
    worst = max(errors)
    return "" if worst <= _TOLERANCE else f"it differs from its twin by {worst:.1g}"  # NaN differs too


def _refusal(error: Exception) -> str:
    return f"it does not run ({str(error).strip().splitlines()[-1][:200]})"


def _warn(name: str, wrong: str, backend: GpuBackend) -> None:
    if wrong:
        warnings.warn(
            f"The kernel {name} is switched off on this {backend} device: {wrong}. MLX graph ops do its work, slower.",
            stacklevel=3,
        )


def _relative(x: mx.array, wanted: mx.array) -> float:
    size = mx.maximum(mx.linalg.norm(wanted), 1e-9)
    error = mx.linalg.norm(x.astype(mx.float32) - wanted) / size
    return _number(mx.where(mx.isnan(error), mx.inf, error))


def _number(x: mx.array) -> float:
    return float(np.asarray(x))
