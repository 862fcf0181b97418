"""Encoding and decoding of vectors with a scalar table, in one launch each, and the signed Hadamard transform alone.

A vector lies in the registers of a simdgroup's lanes (``source/lanes.h``): it is read once, and only its codes and its
scale are written. The twins are ``RotatedCodec.encode`` and ``decode`` with a `ScalarQuantizer`, and `SignedHadamard`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from string import Template
from typing import Final

import mlx.core as mx

from veloxlab.errors import InputError
from veloxlab.kernels.launch import SIMD, GpuBackend, Source, launch, source_file, type_name

_THREADS = 128
_MOST_EACH = 32  # numbers of a vector that a lane keeps in registers
_WORD_BITS = 32
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# what a vector's root-mean-square is to be multiplied with, from the sums that ``encode.metal`` makes
_FACTORS: Final = {"norm": "1.0f", "mse": "inner / squares", "unbiased": "HEAD_DIM / inner"}


def can_spread(dim: int) -> bool:
    """Whether vectors of ``dim`` = m·2^k numbers, m odd, fit the registers of their lanes: 2^k of them, 32 at most."""
    return 0 < dim <= _MOST_EACH * _lanes(dim)


def encode(
    x: mx.array,
    signs: mx.array,
    boundaries: mx.array,
    levels: mx.array,
    bits: int,
    scale_name: str,
    backend: GpuBackend,
) -> tuple[mx.array, mx.array]:
    """Spread vectors, take the nearest level of each coordinate, and pack.

    Parameters
    ----------
    x : vectors ``[B, H, S, D]``, float32, float16 or bfloat16, a view with any strides.
    signs : ±1 of each coordinate ``[D]``, float32; see `veloxlab.codecs.transforms.SignedHadamard`.
    boundaries, levels : ascending ``[2**bits - 1]`` and ``[2**bits]``, float32, for coordinates of variance 1.
    bits : of a code, 1 to 8.
    scale_name : ``"norm"``, ``"mse"`` or ``"unbiased"``; see `veloxlab.codecs.quantizers.scale_factor`.
    backend : the GPU.

    Returns
    -------
    Codes ``[B, H, S, ⌈D·bits / 32⌉]`` uint32, LSB first without gaps, and the square root of each vector's scale
    ``[B, H, S, 1]`` float16.

    Raises
    ------
    InputError : a shape, dtype, width or scale that the kernel does not take.
    """
    _check(x, signs)
    if scale_name not in _FACTORS:
        raise InputError(f"Unknown scale {scale_name!r}: choose 'unbiased', 'mse' or 'norm'.")
    if not 1 <= bits <= 8:
        raise InputError(f"bits={bits!r} is out of range: choose a whole number of bits from 1 to 8.")
    for name, table, count in (("boundaries", boundaries, 2**bits - 1), ("levels", levels, 2**bits)):
        _check_table(name, table, count)
    *lead, dim = x.shape
    shapes, dtypes = [(*lead, _words(dim, bits)), (*lead, 1)], [mx.uint32, mx.float16]
    if x.size == 0:
        return mx.zeros(shapes[0], dtypes[0]), mx.zeros(shapes[1], dtypes[1])
    codes, root_scale = launch(
        _encode_source(dim, x.dtype, bits, scale_name, backend),
        {"x": x, "signs": signs, "boundaries": boundaries, "levels": levels},
        backend=backend,
        groups=(_groups(x), 1, 1),
        threads=_THREADS,
        shapes=shapes,
        dtypes=dtypes,
    )
    return codes, root_scale


def decode(
    codes: mx.array,
    root_scale: mx.array,
    signs: mx.array,
    levels: mx.array,
    bits: int,
    dtype: mx.Dtype,
    backend: GpuBackend,
) -> mx.array:
    """Vectors that `encode` packed: levels of their codes, spread back, times their scale.

    Parameters
    ----------
    codes, root_scale : ``[B, H, S, ⌈D·bits / 32⌉]`` uint32 and ``[B, H, S, 1]`` float16, views with any strides.
    signs, levels, bits : as for `encode`.
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
    if not 1 <= bits <= 8:
        raise InputError(f"bits={bits!r} is out of range: choose a whole number of bits from 1 to 8.")
    if codes.ndim != 4 or codes.dtype != mx.uint32 or codes.shape[-1] != _words(dim, bits):
        raise InputError(
            f"codes have shape {list(codes.shape)} of {codes.dtype}: give [batch, heads, tokens, {_words(dim, bits)}] "
            f"words of uint32, for {dim} numbers of {bits} bits."
        )
    if not can_spread(dim) or dtype not in _DTYPES:
        raise InputError(f"The kernel gives no vectors of {dim} numbers of {dtype}: use the MLX-graph twin.")
    _check_table("levels", levels, 2**bits)
    shape = (*codes.shape[:-1], dim)
    if codes.size == 0:
        return mx.zeros(shape, dtype)
    (out,) = launch(
        _decode_source(dim, dtype, bits, backend),
        {"codes": codes, "root_scale": root_scale, "signs": signs, "levels": levels},
        backend=backend,
        groups=(-(-math.prod(codes.shape[:-1]) // _vectors(dim)), 1, 1),
        threads=_THREADS,
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
    ``[B, H, S, D]`` float32: what `veloxlab.codecs.transforms.SignedHadamard` gives.

    Raises
    ------
    InputError : a shape or dtype that the kernel does not take.
    """
    _check(x, signs)
    if x.size == 0:
        return x.astype(mx.float32)
    (out,) = launch(
        _spread_source(x.shape[-1], x.dtype, inverse, backend),
        {"x": x, "signs": signs},
        backend=backend,
        groups=(_groups(x), 1, 1),
        threads=_THREADS,
        shapes=[x.shape],
        dtypes=[mx.float32],
    )
    return out


@lru_cache
def _encode_source(dim: int, dtype: mx.Dtype, bits: int, scale_name: str, backend: GpuBackend) -> Source:
    return Source(
        name="encode",
        inputs=("x", "signs", "boundaries", "levels"),
        outputs=("codes", "root_scale"),
        defines=(
            *_layout(dim, dtype, backend),
            ("BITS", bits),
            ("WORDS", _words(dim, bits)),
            ("FACTOR", _FACTORS[scale_name]),
        ),
        headers=("simd.h", "spread.h", "lanes.h"),
        body=Template(source_file("encode.metal")).substitute(hartley=hartley_row(dim)),
    )


@lru_cache
def _decode_source(dim: int, dtype: mx.Dtype, bits: int, backend: GpuBackend) -> Source:
    return Source(
        name="decode",
        inputs=("codes", "root_scale", "signs", "levels"),
        outputs=("out",),
        defines=(
            ("HEAD_DIM", dim),
            ("OUT_TYPE", type_name(dtype, backend)),
            ("THREADS", _THREADS),
            ("VECTORS", _vectors(dim)),
            ("BITS", bits),
        ),
        headers=("spread.h", "lanes.h"),
        body=Template(source_file("decode.metal")).substitute(hartley=hartley_row(dim)),
    )


@lru_cache
def _spread_source(dim: int, dtype: mx.Dtype, inverse: bool, backend: GpuBackend) -> Source:
    return Source(
        name="spread",
        inputs=("x", "signs"),
        outputs=("out",),
        defines=(*_layout(dim, dtype, backend), ("INVERSE", int(inverse))),
        headers=("spread.h", "lanes.h"),
        body=Template(source_file("spread.metal")).substitute(hartley=hartley_row(dim)),
    )


def _layout(dim: int, dtype: mx.Dtype, backend: GpuBackend) -> tuple[tuple[str, int | str], ...]:
    return (
        ("HEAD_DIM", dim),
        ("IN_TYPE", type_name(dtype, backend)),
        ("THREADS", _THREADS),
        ("VECTORS", _vectors(dim)),
    )


def hartley_row(dim: int) -> str:
    """Row 1 of the m-point Hartley matrix by 1/√dim, for dim = m·2^k with m odd; Metal's own cosine is a coarse one."""
    odd = dim // (dim & -dim)
    angles = [2 * math.pi * i / odd for i in range(odd)]
    return ", ".join(f"{(math.cos(angle) + math.sin(angle)) / math.sqrt(dim)!r}f" for angle in angles)


def _lanes(dim: int) -> int:
    """Lanes that share a vector; as in ``lanes.h``."""
    return min(dim & -dim, SIMD)


def _vectors(dim: int) -> int:
    """Vectors of a threadgroup."""
    return _THREADS // _lanes(dim)


def _groups(x: mx.array) -> int:
    """Threadgroups for all vectors of ``x``."""
    dim = x.shape[-1]
    return -(-x.size // (dim * _vectors(dim)))


def _words(dim: int, bits: int) -> int:
    """Words of a packed vector."""
    return -(-dim * bits // _WORD_BITS)


def _check(x: mx.array, signs: mx.array) -> None:
    if x.ndim != 4 or x.dtype not in _DTYPES:
        raise InputError(
            f"The kernel takes [batch, heads, tokens, dimension] of float32, float16 or bfloat16, and was given "
            f"{list(x.shape)} of {x.dtype}: reshape it, or convert it to float32."
        )
    if not can_spread(x.shape[-1]):
        raise InputError(
            f"A vector of {x.shape[-1]} numbers does not fit the registers of its lanes: "
            f"take m·2^k with m odd, at most {_MOST_EACH} times the smaller of 2^k and {SIMD}, or the MLX-graph twin."
        )
    _check_table("signs", signs, x.shape[-1])


def _check_table(name: str, table: mx.array, count: int) -> None:
    if table.shape != (count,) or table.dtype != mx.float32:
        raise InputError(
            f"{name} has shape {list(table.shape)} of {table.dtype}: give {count} numbers of float32, one axis."
        )
