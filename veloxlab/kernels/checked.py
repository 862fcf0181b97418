"""Kernels that have shown, on this device, that they agree with their twins.

Before a kernel is first used it runs on a little that is made up, beside its twin. One that disagrees, or that the
compiler refuses, is switched off with one warning, and graph ops do its work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from veloxlab.kernels.assign import assign
from veloxlab.kernels.attend import Exact, Queries, Shape, Tokens, attend, attend_twin, can_attend
from veloxlab.kernels.backend import GpuBackend, gpu
from veloxlab.kernels.decode import decode, spread
from veloxlab.kernels.lanes import can_spread
from veloxlab.kernels.readers import Spread, TableReader

_TOKENS = (3, 333, 70)  # sinks, packed and recent ones: no multiples of anything
# half precision in levels, queries and weights: 4e-4 seen on an H100, for every width; a wrong table entry gives 1e-2
_TOLERANCE = 3e-3

# a coordinate on a boundary, to float rounding, may be coded either way: a few in 10,000, and one in a word of ten
_SAME_WORDS = 0.99
_SCALES_APART = 2e-3  # two steps of half precision

_states: dict[object, str] = {}  # of each kernel: empty where it agrees, else what is wrong


class Encoder(Protocol):
    """A kernel that turns vectors into named arrays of a code, and what it is to be built for."""

    @property
    def kernel(self) -> tuple[object, ...]:
        """What tells the kernel from others for vectors of one dimension and type; first its name."""

    def takes(self, x: mx.array) -> bool:
        """Whether the kernel is for such vectors ``[B, H, S, D]``."""

    def __call__(self, *given: Any) -> dict[str, mx.array]:
        """Encode, given the GPU, the vectors, and what else `encoded` says."""


def checked_attend(queries: Queries, tokens: Tokens, backend: GpuBackend) -> tuple[mx.array, mx.array | None] | None:
    """`attend`, or None where the kernel for this case cannot be had or does not agree with its twin."""
    shape = Shape.of(queries, tokens)
    which = shape, backend
    if _states.get(which) != "":  # asked at every token of every layer
        name = f"attend ({tokens.keys.key[0]} keys, {tokens.values.key[0]} values)"
        if not can_attend(tokens, backend):
            return None
        if not _agrees(which, name, backend, lambda: _disagreement(queries, tokens, backend)):
            return None
    return attend(queries, tokens, shape, backend)


def checked_assign(
    points: mx.array,
    centroids: mx.array,
    bits: int,
    backend: GpuBackend,
    twin: Callable[[mx.array, mx.array, int], mx.array],
) -> mx.array | None:
    """`assign`, or None where the kernel for these shapes and types cannot be had or does not agree with ``twin``."""
    which = "assign", points.shape[-1], points.dtype, centroids.shape, centroids.dtype, bits, backend

    def trial() -> str:
        # whole numbers: no distance is rounded, and ties, of which there are many, go to the first
        keys = mx.random.split(mx.random.key(0))
        some = mx.random.randint(-8, 9, (67, points.shape[-1]), key=keys[0]).astype(points.dtype)
        tables = mx.random.randint(-8, 9, centroids.shape, key=keys[1]).astype(centroids.dtype)
        same = mx.array_equal(assign(some, tables, bits, backend), twin(some, tables, bits)).item()
        return "" if same else "it finds other indices than its twin"

    return assign(points, centroids, bits, backend) if _agrees(which, "assign", backend, trial) else None


def encoded(
    kernel: Callable[[], Encoder | None],
    twin: Callable[..., dict[str, mx.array]],
    x: mx.array,
    matrix: mx.array | None = None,
) -> dict[str, mx.array]:
    """A code's arrays of ``x`` ``[B, H, S, D]``: on a GPU by what ``kernel`` gives, or by ``twin``.

    Both are given ``x`` and, if there is a ``matrix`` ``[D, M]`` or ``[H, D, M]``, ``x @ matrix`` in float32. The twin
    does the work where there is no GPU or no encoder, and where its kernel cannot be had or does not agree with it.
    """
    backend, vectors = gpu(), _vectors(x, matrix)
    encoder = None if backend is None else kernel()
    if backend is None or encoder is None or not encoder.takes(x):
        return twin(*vectors)
    name, *others = encoder.kernel
    which = name, *others, x.dtype, *(v.shape[-1] for v in vectors), backend

    def trial() -> str:
        some = mx.random.normal((1, x.shape[1], 67, x.shape[-1]), key=mx.random.key(0)).astype(x.dtype)
        made_up = _vectors(some, matrix)
        found, wanted = encoder(backend, *made_up), twin(*made_up)
        return "" if all(_same(found[name], array) for name, array in wanted.items()) else "it writes other codes"

    return encoder(backend, *vectors) if _agrees(which, str(name), backend, trial) else twin(*vectors)


def checked_decode(
    codes: mx.array,
    root_scale: mx.array,
    signs: mx.array,
    levels: mx.array,
    bits: int,
    dtype: mx.Dtype,
    backend: GpuBackend,
    twin: Callable[[mx.array, mx.array], mx.array],
) -> mx.array | None:
    """`decode`, or None where the kernel for these dimensions cannot be had or does not agree with ``twin``."""
    dim = signs.shape[0]
    if not can_spread(dim):
        return None

    def trial() -> str:
        keys = mx.random.split(mx.random.key(0), 3)
        high, low = (mx.random.randint(0, 1 << 16, (1, 2, 67, codes.shape[-1]), key=k) for k in keys[:2])
        some = high.astype(mx.uint32) << 16 | low.astype(mx.uint32)
        roots = mx.random.uniform(0.5, 1.5, (1, 2, 67, 1), key=keys[2]).astype(mx.float16)
        error = _relative(decode(some, roots, signs, levels, bits, dtype, backend), twin(some, roots))
        return "" if error <= _TOLERANCE else f"it differs from its twin by {error:.1g}"

    if not _agrees(("decode", dim, dtype, bits, backend), "decode", backend, trial):
        return None
    return decode(codes, root_scale, signs, levels, bits, dtype, backend)


def checked_spread(
    x: mx.array, signs: mx.array, backend: GpuBackend, twin: Callable[[mx.array], mx.array], *, inverse: bool
) -> mx.array | None:
    """`spread`, or None where the kernel for these dimensions cannot be had or does not agree with ``twin``."""
    dim = signs.shape[0]
    if not can_spread(dim):
        return None

    def trial() -> str:
        some = mx.random.normal((1, 2, 67, dim), key=mx.random.key(0)).astype(x.dtype)
        error = _relative(spread(some, signs, backend, inverse=inverse), twin(some))
        return "" if error <= _TOLERANCE else f"it differs from its twin by {error:.1g}"

    if not _agrees(("spread", dim, x.dtype, inverse, backend), "spread", backend, trial):
        return None
    return spread(x, signs, backend, inverse=inverse)


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
                checked_attend(Queries(q, dim**-0.5), Tokens(side, side, None, None, dim, dim), backend)


def _disagreement(queries: Queries, tokens: Tokens, backend: GpuBackend) -> str:
    """What is wrong with the kernel for this case, in words, or nothing."""
    key = mx.random.key(0)
    batch, query_heads, length = 1, queries.q.shape[1], queries.q.shape[2]
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
    query = normal(batch, query_heads, length, tokens.key_dim, dtype=queries.q.dtype)
    total = packed + sum(made_up.exact_counts)
    mask, logits = None, None
    if queries.mask is not None:
        mask = mx.where(normal(batch, query_heads, length, total) < 1, 0.0, -1e9)
    if queries.logits is not None:
        logits = normal(query_heads)
    # as large as queries that were brought there from unit ones; the space itself is the codec's business
    coded_queries = normal(batch, kv_heads, rows, tokens.keys.dim)
    space = tokens.keys.space
    if space is not None:
        grouped = query.astype(mx.float32).reshape(batch, kv_heads, rows, tokens.key_dim)
        coded_queries = space.enter(grouped)
    asked = Queries(query, queries.scale, coded_queries, mask, logits)
    given = asked if queries.coded is not None else replace(asked, coded=None)
    out, coded = attend(given, made_up, Shape.of(given, made_up), backend)
    plain, wanted_coded = attend_twin(asked, made_up)
    if made_up.values.space is not None:
        plain = plain + made_up.values.space.leave(wanted_coded)
    errors = [_relative(out.reshape(plain.shape), plain)]
    if coded is not None:
        errors.append(_relative(coded, wanted_coded))
    worst = max(errors)
    return "" if worst <= _TOLERANCE else f"it differs from its twin by {worst:.1g}"  # NaN differs too


def _agrees(which: object, name: str, backend: GpuBackend, trial: Callable[[], str]) -> bool:
    """Whether a kernel does what its twin does. The first time ``trial`` says what is wrong with it, or nothing."""
    if which not in _states:
        try:
            _states[which] = trial()
        except (RuntimeError, ValueError) as error:  # the compiler's, or the driver's
            _states[which] = f"it does not run ({str(error).strip().splitlines()[-1][:200]})"
        if _states[which]:
            warnings.warn(
                f"The kernel {name} is switched off on this {backend} device: {_states[which]}. MLX graph ops do its "
                "work, slower.",
                stacklevel=3,
            )
    return not _states[which]


def _vectors(x: mx.array, matrix: mx.array | None) -> tuple[mx.array, ...]:
    return (x,) if matrix is None else (x, x.astype(mx.float32) @ matrix)


def _same(found: mx.array, wanted: mx.array) -> bool:
    """Whether words, or roots of scales, are the same but for rounding; no NaN is."""
    if wanted.dtype == mx.uint32:
        return _number((found == wanted).mean()) >= _SAME_WORDS
    apart = mx.abs(found.astype(mx.float32) - wanted.astype(mx.float32))
    return bool((apart <= _SCALES_APART * mx.abs(wanted.astype(mx.float32))).all().item())


def _relative(x: mx.array, wanted: mx.array) -> float:
    size = mx.maximum(mx.linalg.norm(wanted), 1e-9)
    error = mx.linalg.norm(x.astype(mx.float32) - wanted) / size
    return _number(mx.where(mx.isnan(error), mx.inf, error))


def _number(x: mx.array) -> float:
    return float(np.asarray(x))
