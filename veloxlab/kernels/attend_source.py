"""The text of attention's kernels, and how they divide the work."""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

from veloxlab.kernels.backend import Backend
from veloxlab.kernels.call import Queries, Tokens, changing_names, lasting_inputs, places_of_constants
from veloxlab.kernels.readers import Room
from veloxlab.kernels.splits import NUMBERS, SIMDGROUPS
from veloxlab.kernels.text import SIMD, Source, source_file
from veloxlab.kernels.vectors import hartley_row

MANY_SIMDGROUPS = 16  # of a threadgroup alone on a processor
_PROCESSOR_BYTES = 227 * 1024  # of threadgroup memory that such a threadgroup has
GROUPS_PER_PROCESSOR = 4  # threadgroups that a processor of an NVIDIA GPU works on at once
PADDED_ROWS = MOST_ROWS = 8  # query rows that share one read of the codes
COMBINE_SIMDGROUPS = 4  # that share the splits of a row, in the second kernel
_MOST_COMBINED = 192  # splits of a KV head that one threadgroup combines: to read more takes longer than another launch
_SPLIT_SUMS = 4  # numbers of a split beside its values; two of them align these
_SMALL = 128  # largest dimension at which registers allow this number of threadgroups
# index of a query, with a mask and without: with some readers, strides and a mask exceed Metal's number of arrays
_QUERY_PLACES = (
    "((sequence * KV_HEADS * SHARED + query_head) * QUERIES + query) * EXACT_KEY",
    "sequence * q_strides[0] + query_head * q_strides[1] + query * q_strides[2]",
)

Defines = dict[str, int | str]


@dataclass(frozen=True)
class Division:
    """How attention's kernels divide the work."""

    rows: int  # of a KV head's queries in a threadgroup
    row_tiles: int  # threadgroups for all of them
    groups: int  # of all splits of packed tokens, at most
    large: int  # bytes of threadgroup memory for a table with a copy for every lane
    split_row: int  # numbers of a split and a row: mixed values, or their code if that is larger, and sums
    combines: bool  # whether the last threadgroups of the first kernel combine the splits
    joins: bool  # whether it also writes the newest token into the window

    @property
    def simdgroups(self) -> int:
        """The number of simdgroups of a threadgroup."""
        return MANY_SIMDGROUPS if self.large else SIMDGROUPS


def division_of(queries: Queries, tokens: Tokens, backend: Backend, *, joins: bool) -> Division:
    """The division for calls of one kind; ``joins``: whether the newest token is in no buffer yet."""
    keys = tokens.keys
    all_rows = queries.q.shape[1] // keys.kv_heads * queries.q.shape[2]
    rows = min(all_rows, MOST_ROWS)
    row_tiles = -(-all_rows // rows)
    large = _large_bytes(tokens, backend)
    groups = backend.groups * _at_once(tokens, large) // GROUPS_PER_PROCESSOR
    return Division(
        rows=rows,
        row_tiles=row_tiles,
        groups=groups,
        large=large,
        split_row=max(tokens.value_dim, tokens.values.dim) + _SPLIT_SUMS,
        combines=backend.knows_last and groups // (keys.kv_heads * row_tiles) <= _MOST_COMBINED,
        joins=joins and row_tiles == 1,
    )


def sources_of(queries: Queries, tokens: Tokens, backend: Backend, division: Division) -> tuple[Source, Source | None]:
    """The first kernel, and the one that combines the splits if the first does not."""
    values, query_heads, length = tokens.values, *queries.q.shape[1:3]
    spread = values.signs is not None
    common: Defines = {
        "ALL_ROWS": f"{query_heads // tokens.keys.kv_heads * length}u",
        "QUERIES": f"{length}u",
        "LOG2_E": "1.4426950408889634f",
        "SIZES": f"{NUMBERS}u",
        "EXACT_VALUE": tokens.value_dim,
        "CODED_VALUE": values.dim,
        "LARGEST_VALUE": max(tokens.value_dim, values.dim),
        "SPLIT_ROW": f"{division.split_row}u",
        "VALUE_SPREAD": int(spread),
        "HAS_LOGITS": int(queries.logits is not None),
        "OUT_TYPE": backend.types[queries.q.dtype],
    }
    ending = _Ending(
        () if queries.logits is None else ("logits",),
        ("out",) if spread else ("out", "out_coded"),
        Template(source_file("finish.metal")).substitute(value_hartley=hartley_row(values.dim) if spread else ""),
    )
    attend = _attend_source(queries, tokens, backend, common, division, ending if division.combines else None)
    if division.combines:
        return attend, None
    combine = Source(
        name="combine",
        inputs=("of_splits", "common", "sizes", *(("v_signs",) if spread else ()), *ending.inputs),
        outputs=ending.outputs,
        defines=(
            *common.items(),
            ("ALL_PADDED", f"{division.row_tiles * division.rows}u"),
            ("SIMDGROUPS", COMBINE_SIMDGROUPS),
            ("QUERY_HEADS", f"{query_heads}u"),
        ),
        headers=("simd.h", "lanes.h", "window.h", "combine.h"),
        body=Template(source_file("combine.metal")).substitute(finish=ending.text),
    )
    return attend, combine


@dataclass(frozen=True)
class _Ending:
    """The text that writes a row, once its splits are joined, and its arrays: it is part of either kernel."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class _Memory:
    """Words of threadgroup memory."""

    shared: int  # of queries, and of what simdgroups have of their tiles
    tiles_at: int  # where the latter begins
    tables: int  # room for the tables of keys, and of values if they have their own
    apart: bool  # whether simdgroups join their sums all at once, in the room of a large table


def _memory_of(tokens: Tokens, backend: Backend, division: Division) -> _Memory:
    keys, values, rows, simdgroups = tokens.keys, tokens.values, division.rows, division.simdgroups
    largest_key, largest_value = max(tokens.key_dim, keys.coordinates), max(tokens.value_dim, values.dim)
    of_queries = PADDED_ROWS * (largest_key + 16)
    tiles_at = of_queries if division.large else 0  # of many simdgroups lanes do not hold queries
    shared = max(of_queries, tiles_at + max(simdgroups * keys.tile_words, rows * (largest_value + 8)))
    taken = shared + simdgroups * 2 * rows + 32
    taken += keys.own_words(backend.product_tokens) + values.own_words(backend.product_tokens)
    shared_bytes = min(backend.shared_bytes, _PROCESSOR_BYTES - division.large)
    words = min(shared_bytes // 4 - taken, backend.table_words) // (1 if tokens.one_table else 2)
    return _Memory(shared, tiles_at, words, 4 * simdgroups * rows * (largest_value + 8) <= division.large)


def _attend_source(
    queries: Queries, tokens: Tokens, backend: Backend, common: Defines, division: Division, ending: _Ending | None
) -> Source:
    keys, values, joins, memory = tokens.keys, tokens.values, division.joins, _memory_of(tokens, backend, division)
    room = Room(memory.tables, backend.pair_words, division.large // 4, backend.large)
    key = keys.fragment("k", "k", room)
    value = values.fragment("v", "k" if tokens.one_table else "v", room)
    of_readers = dict.fromkeys((*keys.headers, *values.headers))
    of_sums = dict.fromkeys((*keys.sum_headers, *values.sum_headers))
    of_joins, windows = (("join.h",), ("next_keys", "next_values")) if joins else ((), ())
    of_ending = ("combine.h",) if ending else ()
    changing = changing_names(queries, rotates=keys.signs is not None, joins=joins)
    last = (*ending.inputs, "arrived") if ending else ()
    return Source(
        name=f"attend_{keys.name}_{values.name}",
        inputs=(*changing, *lasting_inputs(tokens), *last),
        outputs=("of_splits", *windows, *(ending.outputs if ending else ())),
        defines=(
            *common.items(),
            *_defines(queries, tokens, backend, division, memory).items(),
            ("KEY_KEPT(i)", key.kept),
            ("KEY_PLACE(i)", key.place),
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
            joined=("k_levels" if keys.large_words else "v_levels") if memory.apart else "shared + TILES_AT",
            query_place=_QUERY_PLACES[queries.mask is None],
            key_setup=key.setup.replace("\n", "\n  "),
            value_setup=value.setup.replace("\n", "\n  "),
            key_queries=key.queries.replace("\n", "\n    "),
            finish="" if ending is None else ending.text.replace("\n", "\n  "),
            added=key.added,
            summed=value.summed,
            key_hartley="" if keys.signs is None else hartley_row(keys.dim),
        ),
        large_bytes=division.large,
    )


def _defines(queries: Queries, tokens: Tokens, backend: Backend, division: Division, memory: _Memory) -> Defines:
    """What ``attend.metal`` has in constants, besides what both kernels have."""
    keys = tokens.keys
    return {
        "ROWS": division.rows,
        "ROW_TILES": f"{division.row_tiles}u",
        "SHARED": f"{queries.q.shape[1] // keys.kv_heads}u",
        "KV_HEADS": f"{keys.kv_heads}u",
        "SCALE": f"{queries.scale!r}f",
        "CAP": f"{queries.cap or 0.0!r}f",
        "HAS_MASK": int(queries.mask is not None),
        "JOINS": int(division.joins),
        "COMBINES": int(division.combines),
        "KEY_SPREAD": int(keys.signs is not None),
        "EXACT_KEY": tokens.key_dim,
        "CODED_KEY": keys.coordinates,
        "KEY_ROW": keys.dim,
        "SHARED_FLOAT4S": memory.shared // 4,
        "TILES_AT": memory.tiles_at // 4,
        "JOINED_APART": int(memory.apart),
        "EXACT_TYPE": backend.types[tokens.exact_type],
        "QUERY_TYPE": backend.types[queries.q.dtype],
        "SIMDGROUPS": division.simdgroups,
        "THREADS": division.simdgroups * SIMD,
        "GROUPS_PER_PROCESSOR": _at_once(tokens, division.large),
    }


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
