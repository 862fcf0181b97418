"""Vectors in the registers of a simdgroup's lanes, the layout of ``source/lanes.h``: what fits, how it is launched."""

from __future__ import annotations

import math

import mlx.core as mx

from veloxlab.errors import InputError
from veloxlab.kernels.backend import SIMD, GpuBackend, type_name

THREADS = 128  # of a threadgroup
DTYPES = (mx.float32, mx.float16, mx.bfloat16)  # that kernels read and write vectors in
WIDEST = 8  # bits of a code
_MOST_EACH = 32  # numbers of a vector that a lane keeps in registers
_WORD_BITS = 32


def can_spread(dim: int) -> bool:
    """Whether vectors of ``dim`` = m·2^k numbers, m odd, fit the registers of their lanes: 2^k of them, 32 at most."""
    return 0 < dim <= _MOST_EACH * _lanes(dim)


def layout(dim: int, dtype: mx.Dtype, backend: GpuBackend) -> tuple[tuple[str, int | str], ...]:
    """What a body that reads such vectors ``x`` is told when it is built."""
    return (
        ("HEAD_DIM", dim),
        ("IN_TYPE", type_name(dtype, backend)),
        ("THREADS", THREADS),
        ("VECTORS", vectors_at_once(dim)),
    )


def hartley_row(dim: int) -> str:
    """Row 1 of the m-point Hartley matrix by 1/√dim, for dim = m·2^k with m odd; Metal's own cosine is a coarse one."""
    odd = dim // (dim & -dim)
    angles = [2 * math.pi * i / odd for i in range(odd)]
    return ", ".join(f"{(math.cos(angle) + math.sin(angle)) / math.sqrt(dim)!r}f" for angle in angles)


def vectors_at_once(dim: int) -> int:
    """Vectors of a threadgroup."""
    return THREADS // _lanes(dim)


def groups_for(vectors: int, at_once: int) -> tuple[int, int, int]:
    """Threadgroups for all ``vectors``, of which one takes ``at_once``."""
    return -(-vectors // at_once), 1, 1


def words(count: int, bits: int) -> int:
    """Words of ``count`` packed codes."""
    return -(-count * bits // _WORD_BITS)


def check_bits(bits: int) -> None:
    """Raise `InputError` unless codes may have so many ``bits``."""
    if not 1 <= bits <= WIDEST:
        raise InputError(f"bits={bits!r} is out of range: choose a whole number of bits from 1 to {WIDEST}.")


def check_vectors(x: mx.array) -> None:
    """Raise `InputError` unless ``x`` is ``[B, H, S, D]`` of a type that kernels read."""
    if x.ndim != 4 or x.dtype not in DTYPES:
        raise InputError(
            f"The kernel takes [batch, heads, tokens, dimension] of float32, float16 or bfloat16, and was given "
            f"{list(x.shape)} of {x.dtype}: reshape it, or convert it to float32."
        )


def check_fits(x: mx.array) -> None:
    """Raise `InputError` unless ``x`` is as `check_vectors` says, and its vectors fit their lanes."""
    check_vectors(x)
    if not can_spread(x.shape[-1]):
        raise InputError(
            f"A vector of {x.shape[-1]} numbers does not fit the registers of its lanes: "
            f"take m·2^k with m odd, at most {_MOST_EACH} times the smaller of 2^k and {SIMD}, or the MLX-graph twin."
        )


def check_table(name: str, table: mx.array, count: int) -> None:
    """Raise `InputError` unless ``table`` is ``[count]``, float32."""
    if table.shape != (count,) or table.dtype != mx.float32:
        raise InputError(
            f"{name} has shape {list(table.shape)} of {table.dtype}: give {count} numbers of float32, one axis."
        )


def _lanes(dim: int) -> int:
    """Lanes that share a vector; as in ``lanes.h``."""
    return min(dim & -dim, SIMD)
