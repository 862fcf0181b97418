"""Tokens of a layer, expanded directly into the buffer for fused attention.

They are rotated back and rounded to its type. A piece of work is a tile of the tokens of one KV head. Threads share the
pieces.
"""

from __future__ import annotations

from typing import Final

import mlx.core as mx
import numpy as np

from veloxlab.kernels.cpu import readers
from veloxlab.kernels.cpu.attend import TILE
from veloxlab.kernels.cpu.describe import KINDS, address_of, described, described_array, numpy_of
from veloxlab.kernels.cpu.machine import call_expander, compiled, f32_at, i64_at, part, u16_at
from veloxlab.kernels.cpu.readers import FUNCTION, load_scales
from veloxlab.kernels.cpu.rows import FLOAT16, FLOAT32, bits_of_float, to_half, transform
from veloxlab.kernels.cpu.run import share
from veloxlab.kernels.readers import Reader

_NANOSECONDS: Final = 1  # for a number
_LARGEST_HALF: Final = np.float32(65504)
_INFINITE: Final = np.uint32(0x7F800000)

# indices of a call's numbers
(TOKENS, COUNT, HEADS, FIRST_HEAD, DIM, PACKED, SIGNS, HARTLEY, OUT, OUT_TOKENS, KIND, FINITE) = range(12)


@part
def to_bfloat(number):
    """The bits of the nearest bfloat16 of a float32, ties to even."""
    bits = bits_of_float(number)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    is_nan = bits & np.uint32(0x7FFFFFFF) > _INFINITE
    return np.uint16(bits >> np.uint32(16) | np.uint32(0x40) if is_nan else rounded)


@part
def round_to(y, count, kind, finite, out):
    """Write numbers in 16 bits; with ``finite`` they are clipped to the finite range."""
    if kind != FLOAT16:
        for i in range(count):
            out[i] = to_bfloat(y[i])
        return
    if finite:
        for i in range(count):
            x = _LARGEST_HALF if y[i] > _LARGEST_HALF else y[i]
            y[i] = -_LARGEST_HALF if x < -_LARGEST_HALF else x
    for i in range(count):
        out[i] = to_half(y[i])


@compiled
def expand(job, first, last):
    """Do pieces ``first`` to ``last``."""
    job = i64_at(job)
    description, count, dim, packed, kind = i64_at(job[TOKENS]), job[COUNT], job[DIM], job[PACKED] == 1, job[KIND]
    tiles, signs, rotated = (count + TILE - 1) // TILE, f32_at(job[SIGNS]), job[SIGNS] != 0
    tile = np.empty(TILE * (dim + 1) + dim, np.float32)
    own = np.int64(tile.ctypes.data)
    scales, spare = own + 4 * TILE * dim, own + 4 * TILE * (dim + 1)
    for piece in range(first, last):
        b, h, token = piece // (tiles * job[HEADS]), piece // tiles % job[HEADS], piece % tiles * TILE
        together, row = min(TILE, count - token), ((b * job[HEADS] + h) * job[OUT_TOKENS] + token) * dim
        wide = job[OUT] + 4 * row if kind == FLOAT32 else own
        call_expander(description[FUNCTION], job[TOKENS], b, job[FIRST_HEAD] + h, token, together, wide)
        load_scales(job[TOKENS], b, job[FIRST_HEAD] + h, token, together, scales)
        for t in range(together if packed else 0):
            y, scale = f32_at(wide + 4 * t * dim), f32_at(scales)[t]
            if rotated:
                transform(wide + 4 * t * dim, dim, job[HARTLEY], spare)
                for i in range(dim):
                    y[i] *= signs[i] * scale
            elif scale != 1:
                for i in range(dim):
                    y[i] *= scale
        if kind != FLOAT32:
            round_to(f32_at(wide), together * dim, kind, job[FINITE] == 1, u16_at(job[OUT] + 2 * row))
    return tile.size  # Numba frees an array after its last use, and an address is none


def write(tokens: Reader | mx.array, out: mx.array, place: int, first_head: int, finite: bool) -> None:
    """Write packed or exact tokens ``[B, H, n, D]`` to ``out`` ``[B, h, S, D]``, evaluated, from token ``place`` on.

    The heads of ``out`` are those from ``first_head`` on. Packed tokens are scaled, and rotated back if their reader
    has ``signs``, else in the space of their codes. With ``finite`` they are clipped to float16's range.
    """
    own = described(tokens) if isinstance(tokens, Reader) else described_array(tokens)
    to, (batch, heads, room, dim) = numpy_of(out), out.shape
    count, packed = (tokens.tokens, 1) if isinstance(tokens, Reader) else (tokens.shape[2], 0)
    assert own.numbers[readers.DIM] == dim
    assert place + count <= room
    begin = address_of(to) + place * to.strides[2]
    places = begin, room, KINDS[out.dtype], int(finite)
    job = np.array([own.address, count, heads, first_head, dim, packed, *own.rotation, *places], np.int64)
    address, pieces = address_of(job), batch * heads * -(-count // TILE)
    share(lambda first, last: expand(address, first, last), pieces, TILE * dim * _NANOSECONDS)
