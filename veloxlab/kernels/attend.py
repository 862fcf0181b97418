"""Attention of a few queries over a history of exact and packed tokens, in two launches.

Flash decoding: each threadgroup takes a split of one KV head's tokens, reads keys, weighs and sums values, with an
online softmax; a second kernel joins the splits. Exact tokens (sinks, recent ones) are splits like the others. Where
the codes lie in a spread space, queries enter it and mixed values leave it inside the kernels.

Products go through the GPU's matrix unit: levels, queries and weights in half precision on NVIDIA, sums in float32, as
in MLX's own fused attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from string import Template
from typing import Any, NamedTuple

import mlx.core as mx

from veloxlab.kernels.backend import SIMD, GpuBackend, Source, launch, source_file, type_name
from veloxlab.kernels.lanes import hartley_row
from veloxlab.kernels.readers import Reader, Room

SIMDGROUPS = 4  # of a threadgroup
GROUPS_PER_PROCESSOR = 4  # threadgroups that a processor of an NVIDIA GPU works on at once
PADDED_ROWS = MOST_ROWS = 8  # query rows that share one reading of the codes
_TILE = 16  # tokens of one turn of a simdgroup
_EXACT_SPLIT, _MOST_EXACT_SPLITS = 128, 64  # exact tokens of one split at least; splits of either run at most
_MEMORY = {"cuda": 48 * 1024, "metal": 32 * 1024}  # bytes of threadgroup memory that a kernel may declare
_TABLE_WORDS = {"cuda": 8192, "metal": 4096}  # of it, at most, for tables
_PAIR_WORDS = {"cuda": 1, "metal": 2}  # of a pair of levels: half precision, or float32
_SHARES = {"cuda": (4, 8), "metal": (4, 4)}  # in which the matrix unit has a key and a value read
_GROUPS = 528  # threadgroups that fill a large GPU: 132 processors, 4 each
_LEAST_SPLIT = 2 * SIMD * SIMDGROUPS  # packed tokens: a table is not filled for fewer
_COMBINE_THREADS = 512
_SMALL = 128  # dimension up to which a thread's registers let as many threadgroups work at once
_STEP = 16  # coordinates that dimensions are multiples of


@dataclass(frozen=True, eq=False)
class Exact:
    """Consecutive tokens that are not compressed: keys ``[B, H, S, Dk]`` and values ``[B, H, S, Dv]`` of one dtype."""

    keys: mx.array
    values: mx.array


@dataclass(frozen=True, eq=False)
class Tokens:
    """A layer's tokens: packed ones, and exact ones before and after them."""

    keys: Reader
    values: Reader
    sinks: Exact | None
    recent: Exact | None
    key_dim: int
    value_dim: int

    @property
    def exact_counts(self) -> tuple[int, int]:
        """Tokens before and after the packed ones."""
        sinks, recent = (0 if run is None else run.keys.shape[2] for run in (self.sinks, self.recent))
        return sinks, recent


@dataclass(frozen=True, eq=False)
class Queries:
    """What attends.

    Attributes
    ----------
    q : ``[B, Hq, L, Dk]``.
    scale : what scores are multiplied with.
    coded : the queries in the space of the keys' codes ``[B, H, Hq/H · L, keys.dim]`` float32, where kernels do not
        know how to bring them there.
    mask : to be added to the scores ``[B, Hq, L, S]`` float32, or None.
    logits : what each head's softmax has beside the tokens' scores, without a value ``[Hq]`` float32, or None.
    """

    q: mx.array
    scale: float
    coded: mx.array | None = None
    mask: mx.array | None = None
    logits: mx.array | None = None


def can_attend(tokens: Tokens, backend: GpuBackend) -> bool:
    """Whether the dimensions suit the matrix unit and the readers' layouts."""
    dims = (tokens.key_dim, tokens.value_dim, tokens.keys.dim, tokens.values.dim)
    key_shares, value_shares = _SHARES[backend]
    return (
        all(dim % _STEP == 0 for dim in dims)
        and max(dims) <= 512
        and tokens.keys.shares(key_shares)
        and tokens.values.shares(value_shares)
    )


def attend(queries: Queries, tokens: Tokens, shape: Shape, backend: GpuBackend) -> tuple[mx.array, mx.array | None]:
    """Softmax attention over sinks, packed and recent tokens, in that order; ``shape`` is `Shape.of` both.

    Returns
    -------
    ``[B, Hq, L, Dv]`` in the dtype of the queries, and, where ``values.space`` is None, the packed tokens' part of it
    in the space of their codes ``[B, H, Hq/H · L, values.dim]`` float32, still to be brought out and added.
    """
    q = queries.q
    batch, query_heads, length, _ = q.shape
    keys, values = tokens.keys, tokens.values
    built = _build(shape, queries, tokens, backend)
    work = built.work
    sizes, splits = _sizes(tokens.exact_counts, keys.tokens, batch * work.kv_heads * work.row_tiles)
    padded_rows = batch * work.kv_heads * work.row_tiles * work.rows
    mixed, sums = launch(
        built.attend,
        _inputs(queries, tokens, sizes),
        backend=backend,
        groups=(splits, work.kv_heads * work.row_tiles, batch),
        threads=SIMDGROUPS * SIMD,
        shapes=[(padded_rows, splits, work.largest_value), (padded_rows, splits, 2)],
        dtypes=[mx.float32, mx.float32],
    )
    out_shape = (batch, query_heads, length, tokens.value_dim)
    coded_shape = (batch, work.kv_heads, query_heads // work.kv_heads * length, values.dim)
    inputs = {"mixed": mixed, "sums": sums, "sizes": sizes}
    if values.space is not None:
        inputs["v_signs"] = values.space.signs
    if queries.logits is not None:
        inputs["logits"] = queries.logits
    out, *coded = launch(
        built.combine,
        inputs,
        backend=backend,
        groups=(batch * query_heads * length, 1, 1),
        threads=_COMBINE_THREADS,
        shapes=[out_shape, coded_shape] if values.space is None else [out_shape],
        dtypes=[q.dtype, mx.float32] if values.space is None else [q.dtype],
    )
    return out, coded[0] if coded else None


def attend_twin(queries: Queries, tokens: Tokens) -> tuple[mx.array, mx.array]:
    """The exact and the coded part of what `attend` is to give, by MLX ops on everything expanded, in float32.

    ``queries.coded`` is to be given. The parts are ``[B, H, Hq/H · L, ·]``.
    """
    q, coded_queries = queries.q, queries.coded
    assert coded_queries is not None
    grouped = q.astype(mx.float32).reshape(*coded_queries.shape[:3], -1)
    runs = [run for run in (tokens.sinks, tokens.recent) if run is not None]
    scores = [grouped @ run.keys.astype(mx.float32).swapaxes(-1, -2) for run in runs]
    scores.insert(int(tokens.sinks is not None), coded_queries @ tokens.keys.expand().swapaxes(-1, -2))
    joined = mx.concatenate(scores, axis=-1) * queries.scale
    if queries.mask is not None:
        full = mx.broadcast_to(queries.mask, (*q.shape[:3], joined.shape[-1]))
        joined = joined + full.reshape(joined.shape)
    if queries.logits is not None:  # behind the tokens, so that their places stay
        beside = mx.broadcast_to(queries.logits[None, :, None, None], (*q.shape[:3], 1))
        joined = mx.concatenate([joined, beside.reshape(*joined.shape[:-1], 1)], axis=-1)
    weights = mx.softmax(joined, axis=-1)
    sinks, _ = tokens.exact_counts
    packed_end = sinks + tokens.keys.tokens
    coded = weights[..., sinks:packed_end] @ tokens.values.expand()
    plain = mx.zeros((*grouped.shape[:-1], tokens.value_dim))
    end = packed_end + tokens.exact_counts[1]
    for run, part in ((tokens.sinks, weights[..., :sinks]), (tokens.recent, weights[..., packed_end:end])):
        if run is not None:
            plain = plain + part @ run.values.astype(mx.float32)
    return plain, coded


@lru_cache(maxsize=1024)  # sequences of a batch, whose lengths differ: every layer asks for those of all
def _sizes(exact: tuple[int, int], packed: int, blocks: int) -> tuple[mx.array, int]:
    """What the kernels have to know of the splits, and how many there are."""
    exact_per_split = max(_EXACT_SPLIT, _whole_turns(-(-max(exact) // _MOST_EXACT_SPLITS)))
    sink_splits, recent_splits = (-(-count // exact_per_split) for count in exact)
    per_split = max(_LEAST_SPLIT, -(-packed * blocks // _GROUPS))
    per_split = _whole_turns(per_split)
    exact_splits = sink_splits + recent_splits
    splits = exact_splits + -(-packed // per_split)
    sizes = mx.array([*exact, packed, sink_splits, exact_splits, splits, per_split, exact_per_split], mx.uint32)
    mx.eval(sizes)
    return sizes, splits


def most_splits() -> int:
    """More than any history has, however long: those of packed tokens fill the GPU, those of exact ones are few."""
    return _GROUPS + 1 + 2 * _MOST_EXACT_SPLITS


def _whole_turns(tokens: int) -> int:
    """``tokens``, or a few more, of which all simdgroups of a threadgroup have the same number of tiles."""
    turn = _TILE * SIMDGROUPS
    return -(-tokens // turn) * turn


class Shape(NamedTuple):
    """All that tells the kernels of one call of `attend` from those of another."""

    query_heads: int
    kv_heads: int
    length: int
    query_type: mx.Dtype
    exact_type: mx.Dtype
    key_dim: int
    value_dim: int
    coded_key: int
    coded_value: int
    readers: tuple[tuple[int | str, ...], tuple[int | str, ...]]
    same_table: bool
    spread: tuple[bool, bool]
    masked: bool
    with_logits: bool
    scale: float
    has_scales: tuple[bool, bool]

    @classmethod
    def of(cls, queries: Queries, tokens: Tokens) -> Shape:
        """That of a call with these."""
        q, keys, values = queries.q, tokens.keys, tokens.values
        some = tokens.sinks or tokens.recent
        return cls(
            query_heads=q.shape[1],
            kv_heads=keys.kv_heads,
            length=q.shape[2],
            query_type=q.dtype,
            exact_type=mx.float32 if some is None else some.keys.dtype,
            key_dim=tokens.key_dim,
            value_dim=tokens.value_dim,
            coded_key=keys.dim,
            coded_value=values.dim,
            readers=(keys.key, values.key),
            same_table=keys.table_identity is not None and keys.table_identity is values.table_identity,
            spread=(keys.space is not None, values.space is not None),
            masked=queries.mask is not None,
            with_logits=queries.logits is not None,
            scale=queries.scale,
            has_scales=(keys.root_scale is not None, values.root_scale is not None),
        )


class _Work(NamedTuple):
    """How the query rows of a KV head are shared out: ``rows`` of ``all_rows`` in each of ``row_tiles``."""

    kv_heads: int
    rows: int
    row_tiles: int
    all_rows: int
    largest_value: int


class _Built(NamedTuple):
    """Two kernels, and how they share the work."""

    attend: Source
    combine: Source
    work: _Work


_BUILT: dict[tuple[Shape, GpuBackend], _Built] = {}


def _build(shape: Shape, queries: Queries, tokens: Tokens, backend: GpuBackend) -> _Built:
    """The kernels for ``shape``; their text is long, so it is made once."""
    known = _BUILT.get((shape, backend))
    if known is not None:
        return known
    all_rows = shape.query_heads // shape.kv_heads * shape.length
    rows = min(all_rows, MOST_ROWS)
    work = _Work(shape.kv_heads, rows, -(-all_rows // rows), all_rows, max(shape.value_dim, shape.coded_value))
    built = _Built(_attend_source(shape, work, queries, tokens, backend), _combine_source(shape, work, backend), work)
    return _BUILT.setdefault((shape, backend), built)


def _attend_source(shape: Shape, work: _Work, queries: Queries, tokens: Tokens, backend: GpuBackend) -> Source:
    largest_key = max(shape.key_dim, shape.coded_key)
    free = _MEMORY[backend] // 4 - _words(work.rows, largest_key, work.largest_value)
    words = min(free, _TABLE_WORDS[backend]) // (1 if shape.same_table else 2)
    room = Room(words, _PAIR_WORDS[backend])
    key = tokens.keys.fragment("k", "k", room)
    value = tokens.values.fragment("v", "k" if shape.same_table else "v", room)
    readers = dict.fromkeys((*tokens.keys.headers, *tokens.values.headers))
    at_once = GROUPS_PER_PROCESSOR if max(largest_key, work.largest_value) <= _SMALL else GROUPS_PER_PROCESSOR // 2
    told_apart = *shape.readers[0], *shape.readers[1], int(shape.same_table), *map(int, shape.has_scales)
    return Source(
        name="_".join(["attend", *map(str, told_apart)]),
        inputs=tuple(_inputs(queries, tokens, None)),
        outputs=("mixed", "sums"),
        defines=(
            *_common_defines(shape, work),
            ("ROWS", work.rows),
            ("ROW_TILES", f"{work.row_tiles}u"),
            ("SHARED", f"{shape.query_heads // shape.kv_heads}u"),
            ("KV_HEADS", f"{shape.kv_heads}u"),
            ("SCALE", f"{shape.scale!r}f"),
            ("HAS_MASK", int(shape.masked)),
            ("KEY_SPREAD", int(shape.spread[0])),
            ("EXACT_KEY", shape.key_dim),
            ("CODED_KEY", shape.coded_key),
            ("LARGEST_KEY", largest_key),
            ("EXACT_TYPE", type_name(shape.exact_type, backend)),
            ("QUERY_TYPE", type_name(shape.query_type, backend)),
            ("SIMDGROUPS", SIMDGROUPS),
            ("THREADS", SIMDGROUPS * SIMD),
            ("GROUPS_PER_PROCESSOR", at_once),
        ),
        headers=("simd.h", "readers.h", *readers, "lanes.h", "attend.h"),
        body=Template(source_file("attend.metal")).substitute(
            declarations="\n".join(part.declarations for part in (key, value)),
            key_setup=key.setup.replace("\n", "\n  "),
            value_setup=value.setup.replace("\n", "\n  "),
            key_hartley=hartley_row(shape.coded_key) if shape.spread[0] else "",
        ),
    )


def _combine_source(shape: Shape, work: _Work, backend: GpuBackend) -> Source:
    return Source(
        name="combine",
        inputs=(
            *("mixed", "sums", "sizes"),
            *(("v_signs",) if shape.spread[1] else ()),
            *(("logits",) if shape.with_logits else ()),
        ),
        outputs=("out", *(() if shape.spread[1] else ("out_coded",))),
        defines=(
            *_common_defines(shape, work),
            ("ALL_PADDED", f"{work.row_tiles * work.rows}u"),
            ("OUT_TYPE", type_name(shape.query_type, backend)),
            ("THREADS", _COMBINE_THREADS),
            ("MOST_SPLITS", most_splits()),
            ("HAS_LOGITS", int(shape.with_logits)),
            ("QUERY_HEADS", f"{shape.query_heads}u"),
        ),
        headers=("simd.h", "lanes.h"),
        body=Template(source_file("combine.metal")).substitute(
            value_hartley=hartley_row(shape.coded_value) if shape.spread[1] else ""
        ),
    )


def _common_defines(shape: Shape, work: _Work) -> tuple[tuple[str, int | str], ...]:
    return (
        ("ALL_ROWS", f"{work.all_rows}u"),
        ("QUERIES", f"{shape.length}u"),
        ("LOG2_E", "1.4426950408889634f"),
        ("EXACT_VALUE", shape.value_dim),
        ("CODED_VALUE", shape.coded_value),
        ("LARGEST_VALUE", work.largest_value),
        ("VALUE_SPREAD", int(shape.spread[1])),
    )


def _words(rows: int, largest_key: int, largest_value: int) -> int:
    """Words of threadgroup memory beside the tables; see ``attend.metal``."""
    return PADDED_ROWS * (largest_key + 16) + rows * (largest_value + 8) + SIMDGROUPS * 2 * rows + 64


def _inputs(queries: Queries, tokens: Tokens, sizes: mx.array | None) -> dict[str, Any]:
    """What `attend` is launched with, by name; for the names alone, without ``sizes``."""
    keys = tokens.keys
    some = tokens.sinks or tokens.recent
    nothing = _nothing(mx.float32 if some is None else some.keys.dtype)
    sinks, recent = tokens.sinks or nothing, tokens.recent or nothing
    arrays = {
        "q": queries.q,
        "q_coded": queries.q if queries.coded is None else queries.coded,
        "k_signs": _no_signs() if keys.space is None else keys.space.signs,
        **keys.arrays("k"),
        **tokens.values.arrays("v"),
        "sink_keys": sinks.keys,
        "sink_values": sinks.values,
        "recent_keys": recent.keys,
        "recent_values": recent.values,
        "sizes": sizes,
    }
    return arrays if queries.mask is None else arrays | {"mask": queries.mask}


@lru_cache
def _nothing(dtype: mx.Dtype) -> Exact:
    empty = mx.zeros((1, 1, 1, _STEP), dtype)
    mx.eval(empty)
    return Exact(empty, empty)


@lru_cache
def _no_signs() -> mx.array:
    signs = mx.zeros((_STEP,))
    mx.eval(signs)
    return signs
