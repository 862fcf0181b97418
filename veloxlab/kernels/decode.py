"""Decoding of vectors that were spread and quantized by a scalar table, and the signed Hadamard transform alone.

A vector lies in the registers of a simdgroup's lanes (``source/lanes.h``): one launch each. The twins are
``RotatedCodec.decode`` with a table of levels, and `SignedHadamard`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from string import Template

import mlx.core as mx

from veloxlab.errors import InputError
from veloxlab.kernels.backend import GpuBackend, Source, launch, source_file, type_name
from veloxlab.kernels.lanes import (
    DTYPES,
    THREADS,
    can_spread,
    check_bits,
    check_fits,
    check_table,
    groups_for,
    hartley_row,
    layout,
    vectors_at_once,
    words,
)


def decode(
    codes: mx.array,
    root_scale: mx.array,
    signs: mx.array,
    levels: mx.array,
    bits: int,
    dtype: mx.Dtype,
    backend: GpuBackend,
) -> mx.array:
    """Vectors that `veloxlab.kernels.encode.encode` packed: levels of their codes, spread back, times their scale.

    Parameters
    ----------
    codes, root_scale : ``[B, H, S, ⌈D·bits / 32⌉]`` uint32 and ``[B, H, S, 1]`` float16, views with any strides.
    signs : ±1 of each coordinate ``[D]``, float32.
    levels : what each code stands for ``[2**bits]``, float32.
    bits : of a code, 1 to 8.
    dtype : of the result: float32, float16 or bfloat16.
    backend : the GPU.

    Returns
    -------
    ``[B, H, S, D]``.

    Raises
    ------
    InputError : a shape, dtype or width that the kernel does not take.
    """
    dim = signs.shape[0]
    check_bits(bits)
    if codes.ndim != 4 or codes.dtype != mx.uint32 or codes.shape[-1] != words(dim, bits):
        raise InputError(
            f"codes have shape {list(codes.shape)} of {codes.dtype}: give [batch, heads, tokens, {words(dim, bits)}] "
            f"words of uint32, for {dim} numbers of {bits} bits."
        )
    if not can_spread(dim) or dtype not in DTYPES:
        raise InputError(f"The kernel gives no vectors of {dim} numbers of {dtype}: use the MLX-graph twin.")
    check_table("levels", levels, 2**bits)
    shape = (*codes.shape[:-1], dim)
    if codes.size == 0:
        return mx.zeros(shape, dtype)
    (out,) = launch(
        _decode_source(dim, dtype, bits, backend),
        {"codes": codes, "root_scale": root_scale, "signs": signs, "levels": levels},
        backend=backend,
        groups=groups_for(math.prod(codes.shape[:-1]), vectors_at_once(dim)),
        threads=THREADS,
        shapes=[shape],
        dtypes=[dtype],
    )
    return out


def spread(x: mx.array, signs: mx.array, backend: GpuBackend, *, inverse: bool = False) -> mx.array:
    """Signs, then an orthonormal Hadamard transform of any `can_spread` dimension; ``inverse`` undoes it.

    Parameters
    ----------
    x : vectors ``[B, H, S, D]``, float32, float16 or bfloat16, a view with any strides.
    signs : ±1 of each coordinate ``[D]``, float32.
    backend : the GPU.
    inverse : transform, then signs.

    Returns
    -------
    ``[B, H, S, D]`` float32: what `veloxlab.codecs.parts.transforms.SignedHadamard` gives.

    Raises
    ------
    InputError : a shape or dtype that the kernel does not take.
    """
    check_fits(x)
    check_table("signs", signs, x.shape[-1])
    if x.size == 0:
        return x.astype(mx.float32)
    (out,) = launch(
        _spread_source(x.shape[-1], x.dtype, inverse, backend),
        {"x": x, "signs": signs},
        backend=backend,
        groups=groups_for(math.prod(x.shape[:-1]), vectors_at_once(x.shape[-1])),
        threads=THREADS,
        shapes=[x.shape],
        dtypes=[mx.float32],
    )
    return out


@lru_cache
def _decode_source(dim: int, dtype: mx.Dtype, bits: int, backend: GpuBackend) -> Source:
    return Source(
        name="decode",
        inputs=("codes", "root_scale", "signs", "levels"),
        outputs=("out",),
        defines=(
            ("HEAD_DIM", dim),
            ("OUT_TYPE", type_name(dtype, backend)),
            ("THREADS", THREADS),
            ("VECTORS", vectors_at_once(dim)),
            ("BITS", bits),
        ),
        headers=("simd.h", "lanes.h"),
        body=Template(source_file("decode.metal")).substitute(hartley=hartley_row(dim)),
    )


@lru_cache
def _spread_source(dim: int, dtype: mx.Dtype, inverse: bool, backend: GpuBackend) -> Source:
    return Source(
        name="spread",
        inputs=("x", "signs"),
        outputs=("out",),
        defines=(*layout(dim, dtype, backend), ("INVERSE", int(inverse))),
        headers=("simd.h", "lanes.h"),
        body=Template(source_file("spread.metal")).substitute(hartley=hartley_row(dim)),
    )
