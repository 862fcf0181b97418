"""Keys or values of a layer, decoded by one launch into the array for fused attention, together with exact tokens.

Four threads share a vector: they read its codes as attention does, and rotate it back in registers. This is for codes
of 2^k Hadamard-rotated coordinates. Strings of a trellis become levels by one launch, and their codec then applies a
matrix product. Other codes are decoded by their codecs.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Template

import mlx.core as mx

from veloxlab.kernels.backend import Backend, few_numbers, launch, suited
from veloxlab.kernels.call import nothing_of
from veloxlab.kernels.readers import Reader, Room
from veloxlab.kernels.text import Source, source_file

THREADS = 128
PER_GROUP = 512  # tokens of a threadgroup, which fills the reader's table
SHARES = 4  # threads of a vector
LEAST_DIM, LARGEST_DIM = 32, 256  # a thread has at most 64 of its numbers in registers
MOST_AFTER = 2  # runs of exact tokens behind the packed ones
LARGEST_HALF = 65504.0  # of float16

_SOURCES: dict[tuple[object, ...], Source] = {}


def can_expand(reader: Reader, exact: Sequence[mx.array], dtype: mx.Dtype, backend: Backend) -> bool:
    """Whether a kernel decodes the codes of ``reader`` together with runs of ``exact`` tokens, all in ``dtype``."""
    power = LEAST_DIM <= reader.dim <= LARGEST_DIM and reader.dim & (reader.dim - 1) == 0
    same = dtype in backend.types and all(x.dtype == dtype for x in exact)
    return reader.signs is not None and power and reader.shares(SHARES) and same


def expand(
    reader: Reader,
    before: mx.array | None,
    behind: Sequence[mx.array],
    dtype: mx.Dtype,
    heads: range,
    after: mx.array | None,
    backend: Backend,
) -> mx.array:
    """Exact tokens ``before`` ``[B, H, S, D]``, packed ones, and exact ones ``behind``: ``[B, len(heads), S, D]``.

    It runs after ``after`` is computed. Decoded tokens are finite in float16 too.
    """
    assert reader.signs is not None
    nothing = nothing_of(dtype).keys
    runs = [nothing if before is None else before, *behind, *[nothing] * (MOST_AFTER - len(behind))]
    counts = [0 if run is nothing else run.shape[2] for run in runs]
    arrays = {
        "signs": reader.signs,
        **reader.arrays("c"),
        **dict(zip(("before", "after", "newest"), runs, strict=True)),
    }
    sizes = few_numbers([counts[0], reader.tokens, *counts[1:], heads.start, len(heads)])
    arrays["sizes"] = sizes if after is None else mx.depends(sizes, after)
    batch, total = reader.rows.shape[0], sum(counts) + reader.tokens
    groups = -(-reader.tokens // PER_GROUP) + -(-sum(counts) // PER_GROUP)
    (out,) = launch(
        _source("expand", reader, dtype, tuple(arrays), backend),
        suited([*arrays.values()], backend),
        backend=backend,
        groups=(groups, len(heads), batch),
        threads=THREADS,
        shapes=[(batch, len(heads), total, reader.dim)],
        types=[dtype],
    )
    return out


def levels_in_codes(reader: Reader, dtype: mx.Dtype, backend: Backend) -> mx.array:
    """Scaled vectors in the space of the codes ``[B, H, S, dim]``, for a reader with `levels_alone`."""
    arrays = reader.arrays("c")
    (out,) = launch(
        _source("levels", reader, dtype, tuple(arrays), backend),
        suited([*arrays.values()], backend),
        backend=backend,
        groups=(-(-reader.tokens // PER_GROUP), reader.kv_heads, reader.rows.shape[0]),
        threads=THREADS,
        shapes=[(reader.rows.shape[0], reader.kv_heads, reader.tokens, reader.dim)],
        types=[dtype],
    )
    return out


def _source(kind: str, reader: Reader, dtype: mx.Dtype, inputs: tuple[str, ...], backend: Backend) -> Source:
    """The source with the body ``expand.metal`` or ``levels.metal``."""
    which = kind, backend, reader.key, dtype
    if which not in _SOURCES:
        text = reader.fragment("c", "c", Room(backend.table_words, backend.pair_words))
        largest = f"{LARGEST_HALF if dtype == mx.float16 else 3e38!r}f"
        own: dict[str, dict[str, int | str]] = {
            "expand": {"HEAD_DIM": reader.dim, "LARGEST": largest},
            "levels": {
                "CODED": reader.coordinates,
                "ROW_LENGTH": reader.dim,
                "HEADS": f"{reader.kv_heads}u",
                "NUMBER(i, x)": text.number,
            },
        }
        shared: dict[str, int | str] = {
            "OUT_TYPE": backend.types[dtype],
            "PER_GROUP": f"{PER_GROUP}u",
            "THREADS": THREADS,
        }
        headers = "simd.h", "readers.h", *dict.fromkeys(reader.headers), *(["expand.h"] if kind == "expand" else [])
        _SOURCES[which] = Source(
            name=f"{kind}_{reader.name}",
            inputs=inputs,
            outputs=("out",),
            defines=(*own[kind].items(), *shared.items()),
            headers=headers,
            body=Template(source_file(f"{kind}.metal")).substitute(
                declarations=text.declarations,
                setup=text.setup.replace("\n", "\n  "),
                rest=text.rest.replace("\n", "\n  "),
            ),
        )
    return _SOURCES[which]
