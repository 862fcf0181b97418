"""Attention of a few queries over a history of exact and packed tokens, in one launch or two.

Flash decoding: each threadgroup takes a split of one KV head's tokens, reads keys, and sums weighted values with an
online softmax. The last threadgroup of a KV head combines the splits of all, where a device can tell which one is the
last. Elsewhere a second kernel does it. Exact tokens (sinks, recent ones) are splits like the others. If codes are of
Hadamard-rotated vectors, the kernels rotate queries, and rotate mixed values back.

Products use the GPU's matrix unit: levels, queries and weights in half precision on NVIDIA, sums in float32, as in
MLX's own fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import get_ident

import mlx.core as mx

from veloxlab.kernels.attend_source import COMBINE_SIMDGROUPS, division_of, sources_of
from veloxlab.kernels.backend import Backend, built, suited
from veloxlab.kernels.call import STEP, Answer, Exact, PreparedCall, Queries, Tokens, lasting_inputs, nothing_of
from veloxlab.kernels.splits import Places, Sizes, Threadgroups, common_numbers, sizes_of, unused_counters
from veloxlab.kernels.text import SIMD, Source

_LARGEST_DIM = 512  # of a vector or its code, for which a thread has registers


@dataclass(frozen=True, eq=False)
class AttendKernel(Threadgroups):
    """Softmax attention over sinks, packed and recent tokens, in that order, by one kernel or two."""

    name: str  # in messages
    backend: Backend
    attend: Source
    combine: Source | None  # None if the last threadgroups of ``attend`` combine the splits
    split_row: int  # numbers of a split and a row: mixed values, or their code if that is larger, and sums
    coded: bool  # whether the packed tokens' part is an output of its own
    joins: bool  # whether it also writes the newest token into the window

    def prepared(self, queries: Queries, tokens: Tokens) -> PreparedCall:
        """See `veloxlab.kernels.call.AttentionKernel`."""
        sinks, room, batch = tokens.exact_counts[0], tokens.keys.tokens, queries.q.shape[0]
        read, known, sizes = self.prepared_anywhere(queries, tokens), (-1, -1), None

        def call(queries: Queries, recent: Exact | None, packed: int | None = None) -> Answer:
            nonlocal known, sizes
            end, columns = (0, 0) if recent is None else (recent.tokens, recent.room)
            now = room if packed is None else packed, columns
            if sizes is None or now != known:
                known = now
                sizes = sizes_of([Places(now[0], 0, sinks, i, 0, i, 0) for i in range(batch)], columns, self)
            return read(queries, recent, sizes, end)

        return call

    def prepared_anywhere(
        self, queries: Queries, tokens: Tokens
    ) -> Callable[[Queries, Exact | None, Sizes, int], Answer]:
        """`prepared` for several sequences, whose places in the arrays of ``tokens`` are in `sizes_of`.

        A call also gets the end of the recent tokens.
        """
        backend, blocks, joins, attend = self.backend, self.blocks, self.joins, built(self.attend, self.backend)
        exactly = backend.least_size == 0  # arrays of any size are inputs as they are
        nothing, rotates = nothing_of(tokens.exact_type), tokens.keys.signs is not None
        lasting = suited([*lasting_inputs(tokens).values()], backend)
        batch, query_heads, length, _ = queries.q.shape
        coded = batch, self.kv_heads, query_heads // self.kv_heads * length, tokens.values.dim
        shapes = [(batch, query_heads, length, tokens.value_dim), *([coded] if self.coded else [])]
        types = [queries.q.dtype, mx.float32][: len(shapes)]
        combine = self._combining(tokens, shapes, types)
        written = [mx.float32, *([tokens.exact_type] * 2 if joins else []), *(types if combine is None else [])]
        threads, padded_rows, known = self.simdgroups * SIMD, batch * blocks * self.rows, (-1, -1)
        group, grid = (threads, 1, 1), (0, 0, 0)
        outputs: list[tuple[int, ...]] = []

        def call(queries: Queries, recent: Exact | None, of_all: Sizes, recent_end: int) -> Answer:
            """Attention; see `veloxlab.kernels.call.PreparedCall`."""
            nonlocal known, grid, outputs
            numbers, splits = of_all
            newest = recent or nothing
            if known != (splits.most, newest.room):
                grid = splits.most * threads, blocks, batch
                windows = [x.shape for x in newest.buffers] if joins else []
                outputs = [(padded_rows, splits.most, self.split_row), *windows, *(shapes if combine is None else [])]
                known = splits.most, newest.room
            thread, mask = get_ident(), queries.mask
            common = common_numbers(recent_end, newest.room, splits, thread)
            q = queries.q if mask is None else mx.contiguous(queries.q)
            own = [q]
            if not rotates:
                own.append(q if queries.coded is None else queries.coded)
            if joins and newest.coming is not None:  # as `changing_names` says
                given = [*own, *newest.buffers, common, numbers, *newest.coming]
            else:
                given = [*own, *newest.complete(), common, numbers, *(() if mask is None else (mask,))]
            given = [*given, *lasting] if exactly else [*suited(given, backend), *lasting]
            if combine is None:
                if queries.logits is not None:
                    given += suited([queries.logits], backend)
                given.append(unused_counters(batch * blocks, thread))
            found = attend(inputs=given, grid=grid, threadgroup=group, output_shapes=outputs, output_dtypes=written)
            if joins:
                newest.joined(found[1], found[2])
            if combine is not None:
                found = combine(found[0], common, numbers, queries.logits)
            return (found[-2], found[-1]) if self.coded else (found[-1], None)

        return call

    def _combining(
        self, tokens: Tokens, shapes: Sequence[tuple[int, ...]], types: Sequence[mx.Dtype]
    ) -> Callable[[mx.array, mx.array, mx.array, mx.array | None], list[mx.array]] | None:
        """The second kernel, for the splits, `common_numbers`, `Sizes.numbers` and logits; None without one."""
        if self.combine is None:
            return None
        backend, combine = self.backend, built(self.combine, self.backend)
        signs = [] if tokens.values.signs is None else [tokens.values.signs]
        threads, rows = COMBINE_SIMDGROUPS * SIMD, math.prod(shapes[0][:3])

        def call(of_splits: mx.array, common: mx.array, numbers: mx.array, logits: mx.array | None) -> list[mx.array]:
            given = [of_splits, common, numbers, *signs, *(() if logits is None else (logits,))]
            return combine(
                inputs=suited(given, backend),
                grid=(rows * threads, 1, 1),
                threadgroup=(threads, 1, 1),
                output_shapes=shapes,
                output_dtypes=types,
            )

        return call


_KERNELS: dict[tuple[object, ...], AttendKernel | None] = {}


def attend_kernel(queries: Queries, tokens: Tokens, backend: Backend) -> AttendKernel | None:
    """The kernel of a call, or None if its dimensions do not fit the matrix unit and the layouts of codes.

    All calls with the same dimensions and layouts share it. It is made once, because its text is long.
    """
    keys, values = tokens.keys, tokens.values
    joins = backend.joins and tokens.joins and queries.mask is None
    which = (
        *(backend, queries.q.shape[1:], queries.q.dtype, *queries.kind),
        *(tokens.key_dim, tokens.value_dim, tokens.exact_type, keys.key, values.key, tokens.one_table, joins),
    )
    if which not in _KERNELS:
        dims = (tokens.key_dim, tokens.value_dim, keys.coordinates, values.coordinates)
        fits = all(dim % STEP == 0 for dim in dims) and max(dims) <= _LARGEST_DIM
        shared = all(reader.shares(n) for reader, n in zip((keys, values), backend.shares, strict=True))
        _KERNELS[which] = _made(queries, tokens, backend, joins=joins) if fits and shared and backend.build else None
    return _KERNELS[which]


def _made(queries: Queries, tokens: Tokens, backend: Backend, *, joins: bool) -> AttendKernel:
    division = division_of(queries, tokens, backend, joins=joins)
    attend, combine = sources_of(queries, tokens, backend, division)
    return AttendKernel(
        name=f"attend ({tokens.keys.name} keys, {tokens.values.name} values)",
        backend=backend,
        attend=attend,
        combine=combine,
        kv_heads=tokens.keys.kv_heads,
        rows=division.rows,
        row_tiles=division.row_tiles,
        groups=division.groups,
        simdgroups=division.simdgroups,
        split_row=division.split_row,
        coded=tokens.values.signs is None,
        joins=division.joins,
    )
