"""Attention of a few queries over a history of exact and packed tokens, in one launch or two.

Flash decoding: each threadgroup takes a split of one KV head's tokens, reads keys, and sums weighted values with an
online softmax. The splits are joined by the last threadgroup of the KV head, where a device can tell which one that
is, else by a second kernel. Exact tokens (sinks, recent ones) are splits like the others. If codes are of
Hadamard-rotated vectors, the kernels rotate queries, and rotate mixed values back.

Products use the GPU's matrix unit: levels, queries and weights in half precision on NVIDIA, sums in float32, as in
MLX's own fused attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from string import Template
from threading import get_ident

import mlx.core as mx

from veloxlab.kernels.backend import Backend, built, suited
from veloxlab.kernels.call import (
    STEP,
    Answer,
    Exact,
    PreparedCall,
    Queries,
    Tokens,
    changing_names,
    lasting_inputs,
    nothing_of,
    places_of_constants,
)
from veloxlab.kernels.readers import Room
from veloxlab.kernels.splits import (
    NUMBERS,
    SIMDGROUPS,
    Places,
    Sizes,
    Threadgroups,
    common_numbers,
    sizes_of,
    unused_counters,
)
from veloxlab.kernels.text import SIMD, Source, source_file
from veloxlab.kernels.vectors import hartley_row

MANY_SIMDGROUPS = 16  # of a threadgroup alone on a processor
_PROCESSOR_BYTES = 227 * 1024  # of threadgroup memory that such a threadgroup has
GROUPS_PER_PROCESSOR = 4  # threadgroups that a processor of an NVIDIA GPU works on at once
PADDED_ROWS = MOST_ROWS = 8  # query rows that share one read of the codes
_COMBINE_SIMDGROUPS = 4  # that share the splits of a row, in the second kernel
_MOST_COMBINED = 192  # splits of a KV head that one threadgroup combines: to read more takes longer than another launch
_SPLIT_SUMS = 4  # numbers of a split beside its values; two of them align these
_SMALL = 128  # largest dimension at which registers allow this number of threadgroups
_LARGEST_DIM = 512
# index of a query, with a mask and without: with some readers, strides and a mask exceed Metal's number of arrays
_QUERY_PLACES = (
    "((sequence * KV_HEADS * SHARED + query_head) * QUERIES + query) * EXACT_KEY",
    "sequence * q_strides[0] + query_head * q_strides[1] + query * q_strides[2]",
)

Defines = dict[str, int | str]


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
        backend, values, blocks, joins = self.backend, tokens.values, self.blocks, self.joins
        exactly = backend.least_size == 0  # arrays of any size are inputs as they are
        attend = built(self.attend, backend)
        combine = None if self.combine is None else built(self.combine, backend)
        nothing, signs = nothing_of(tokens.exact_type), [] if values.signs is None else [values.signs]
        lasting, rotates = suited([*lasting_inputs(tokens).values()], backend), tokens.keys.signs is not None
        batch, query_heads, length, _ = queries.q.shape
        rows, padded_rows = batch * query_heads * length, batch * blocks * self.rows
        coded = batch, self.kv_heads, query_heads // self.kv_heads * length, values.dim
        shapes = [(batch, query_heads, length, tokens.value_dim), *([coded] if self.coded else [])]
        types = [queries.q.dtype, mx.float32][: len(shapes)]
        written = [mx.float32, *([tokens.exact_type] * 2 if joins else []), *(types if combine is None else [])]
        threads, joining, known = self.simdgroups * SIMD, (_COMBINE_SIMDGROUPS * SIMD, 1, 1), (-1, -1)
        group, grid = (threads, 1, 1), (0, 0, 0)
        outputs: list[tuple[int, ...]] = []

        def call(queries: Queries, recent: Exact | None, of_all: Sizes, recent_end: int) -> Answer:
            """Attention; see `veloxlab.kernels.call.PreparedCall`."""
            nonlocal known, grid, outputs
            numbers, splits = of_all
            newest = recent or nothing
            if known != (splits.most, newest.room):
                known = splits.most, newest.room
                grid = splits.most * threads, blocks, batch
                outputs = [(padded_rows, splits.most, self.split_row)]
                outputs += [x.shape for x in newest.buffers] if joins else []
                outputs += shapes if combine is None else []
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
                last = signs if queries.logits is None else [*signs, queries.logits]
                found = combine(
                    inputs=suited([found[0], common, numbers, *last], backend),
                    grid=(rows * joining[0], 1, 1),
                    threadgroup=joining,
                    output_shapes=shapes,
                    output_dtypes=types,
                )
            return (found[-2], found[-1]) if self.coded else (found[-1], None)

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
        _KERNELS[which] = _made(queries, tokens, backend, joins) if fits and shared and backend.build else None
    return _KERNELS[which]


@dataclass(frozen=True)
class _Ending:
    """The text that writes a row, once its splits are joined, and its arrays: it is part of either kernel."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    text: str


def _made(queries: Queries, tokens: Tokens, backend: Backend, joins: bool) -> AttendKernel:
    keys, values = tokens.keys, tokens.values
    _, query_heads, length, _ = queries.q.shape
    all_rows = query_heads // keys.kv_heads * length
    rows = min(all_rows, MOST_ROWS)
    row_tiles = -(-all_rows // rows)
    joins = joins and row_tiles == 1
    largest_value = max(tokens.value_dim, values.dim)
    large = _large_bytes(tokens, backend)
    groups = backend.groups * _at_once(tokens, large) // GROUPS_PER_PROCESSOR
    combines = backend.knows_last and groups // (keys.kv_heads * row_tiles) <= _MOST_COMBINED
    spread = values.signs is not None
    common: Defines = {
        "ALL_ROWS": f"{all_rows}u",
        "QUERIES": f"{length}u",
        "LOG2_E": "1.4426950408889634f",
        "SIZES": f"{NUMBERS}u",
        "EXACT_VALUE": tokens.value_dim,
        "CODED_VALUE": values.dim,
        "LARGEST_VALUE": largest_value,
        "SPLIT_ROW": f"{largest_value + _SPLIT_SUMS}u",
        "VALUE_SPREAD": int(spread),
        "HAS_LOGITS": int(queries.logits is not None),
        "OUT_TYPE": backend.types[queries.q.dtype],
    }
    ending = _Ending(
        () if queries.logits is None else ("logits",),
        ("out",) if spread else ("out", "out_coded"),
        Template(source_file("finish.metal")).substitute(value_hartley=hartley_row(values.dim) if spread else ""),
    )
    last = ending if combines else None
    combine = Source(
        name="combine",
        inputs=("of_splits", "common", "sizes", *(("v_signs",) if spread else ()), *ending.inputs),
        outputs=ending.outputs,
        defines=(
            *common.items(),
            ("ALL_PADDED", f"{row_tiles * rows}u"),
            ("SIMDGROUPS", _COMBINE_SIMDGROUPS),
            ("QUERY_HEADS", f"{query_heads}u"),
        ),
        headers=("simd.h", "lanes.h", "window.h", "combine.h"),
        body=Template(source_file("combine.metal")).substitute(finish=ending.text),
    )
    return AttendKernel(
        name=f"attend ({keys.name} keys, {values.name} values)",
        backend=backend,
        attend=_attend_source(queries, tokens, backend, common, rows, row_tiles, large, joins, last),
        combine=None if last else combine,
        kv_heads=keys.kv_heads,
        rows=rows,
        row_tiles=row_tiles,
        groups=groups,
        simdgroups=MANY_SIMDGROUPS if large else SIMDGROUPS,
        split_row=largest_value + _SPLIT_SUMS,
        coded=not spread,
        joins=joins,
    )


def _attend_source(
    queries: Queries,
    tokens: Tokens,
    backend: Backend,
    common: Defines,
    rows: int,
    row_tiles: int,
    large: int,
    joins: bool,
    ending: _Ending | None,
) -> Source:
    keys, values, simdgroups = tokens.keys, tokens.values, MANY_SIMDGROUPS if large else SIMDGROUPS
    largest_key, largest_value = max(tokens.key_dim, keys.coordinates), max(tokens.value_dim, values.dim)
    # words of threadgroup memory besides the tables; see ``attend.metal``
    of_queries = PADDED_ROWS * (largest_key + 16)
    tiles_at = of_queries if large else 0  # of many simdgroups lanes do not hold queries
    shared = max(of_queries, tiles_at + max(simdgroups * keys.tile_words, rows * (largest_value + 8)))
    taken = shared + simdgroups * 2 * rows + 32
    taken += keys.own_words(backend.product_tokens) + values.own_words(backend.product_tokens)
    shared_bytes = min(backend.shared_bytes, _PROCESSOR_BYTES - large)
    words = min(shared_bytes // 4 - taken, backend.table_words) // (1 if tokens.one_table else 2)
    room = Room(words, backend.pair_words, large // 4, backend.large)
    apart = 4 * simdgroups * rows * (largest_value + 8) <= large  # so much of the table holds what simdgroups join
    key = keys.fragment("k", "k", room)
    value = values.fragment("v", "k" if tokens.one_table else "v", room)
    of_readers = dict.fromkeys((*keys.headers, *values.headers))
    of_sums = dict.fromkeys((*keys.sum_headers, *values.sum_headers))
    of_joins = ("join.h",) if joins else ()
    of_ending = ("combine.h",) if ending else ()
    last_inputs = (*ending.inputs, "arrived") if ending else ()
    outputs = ("of_splits", *(("next_keys", "next_values") if joins else ()), *(ending.outputs if ending else ()))
    return Source(
        name=f"attend_{keys.name}_{values.name}",
        inputs=(
            *changing_names(queries, rotates=keys.signs is not None, joins=joins),
            *lasting_inputs(tokens),
            *last_inputs,
        ),
        outputs=outputs,
        defines=(
            *common.items(),
            ("ROWS", rows),
            ("ROW_TILES", f"{row_tiles}u"),
            ("SHARED", f"{queries.q.shape[1] // keys.kv_heads}u"),
            ("KV_HEADS", f"{keys.kv_heads}u"),
            ("SCALE", f"{queries.scale!r}f"),
            ("CAP", f"{queries.cap or 0.0!r}f"),
            ("HAS_MASK", int(queries.mask is not None)),
            ("JOINS", int(joins)),
            ("COMBINES", int(ending is not None)),
            ("KEY_SPREAD", int(keys.signs is not None)),
            ("EXACT_KEY", tokens.key_dim),
            ("CODED_KEY", keys.coordinates),
            ("KEY_ROW", keys.dim),
            ("KEY_KEPT(i)", key.kept),
            ("KEY_PLACE(i)", key.place),
            ("SHARED_FLOAT4S", shared // 4),
            ("TILES_AT", tiles_at // 4),
            ("JOINED_APART", int(apart)),
            ("EXACT_TYPE", backend.types[tokens.exact_type]),
            ("QUERY_TYPE", backend.types[queries.q.dtype]),
            ("SIMDGROUPS", simdgroups),
            ("THREADS", simdgroups * SIMD),
            ("GROUPS_PER_PROCESSOR", _at_once(tokens, large)),
            *places_of_constants(tokens).items(),
        ),
        headers=(
            "simd.h",
            "readers.h",
            *of_readers,
            "lanes.h",
            "window.h",
            *of_joins,
            "attend.h",
            *of_ending,
            *of_sums,
        ),
        body=Template(source_file("attend.metal")).substitute(
            declarations=f"{key.declarations}\n{value.declarations}",
            joined=("k_levels" if keys.large_words else "v_levels") if apart else "shared + TILES_AT",
            query_place=_QUERY_PLACES[queries.mask is None],
            key_setup=key.setup.replace("\n", "\n  "),
            value_setup=value.setup.replace("\n", "\n  "),
            key_queries=key.queries.replace("\n", "\n    "),
            finish="" if ending is None else ending.text.replace("\n", "\n  "),
            added=key.added,
            summed=value.summed,
            key_hartley="" if keys.signs is None else hartley_row(keys.dim),
        ),
        large_bytes=large,
    )


def _large_bytes(tokens: Tokens, backend: Backend) -> int:
    """Threadgroup memory for a table with a copy for every lane, if there is one and the device has this much."""
    homes = [tokens.keys] if tokens.one_table else [tokens.keys, tokens.values]
    wanted = sum(reader.large_words > 0 for reader in homes) == 1
    return backend.large_bytes() if wanted and _largest_dim(tokens) <= _SMALL else 0


def _largest_dim(tokens: Tokens) -> int:
    return max(tokens.key_dim, tokens.keys.coordinates, tokens.value_dim, tokens.values.dim)


def _at_once(tokens: Tokens, large: int) -> int:
    """The number of threadgroups that share a processor."""
    if large:
        return 1
    return GROUPS_PER_PROCESSOR if _largest_dim(tokens) <= _SMALL else GROUPS_PER_PROCESSOR // 2
