"""Parts of loops over vectors: read a vector, rotate it, pack its codes, round to 16 bits.

A loop gets arrays ``[B, H, S, n]`` of any strides as eight numbers each: the address, a stride in bytes for each axis,
the type of the numbers, H and S. Vectors are counted in the order of batch, heads and tokens.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from veloxlab.kernels.cpu.machine import f32_at, float_of_bits, half, part, u16_at, u32_at

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2  # types of numbers
NORM, MSE, UNBIASED = 0, 1, 2  # scales
_F32_BYTES, _U16_BYTES = 4, 2
_INFINITE_HALF, _NAN_HALF = np.uint32(0x7C00), np.uint32(0x7E00)
_WORD_BITS = 32


@intrinsic
def bits_of_float(typingctx, number):
    """The bits of a float32, as uint32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@part
def row_at(x, vector):
    """Address of the first number of a vector."""
    heads, tokens = x[6], x[7]
    return x[0] + vector // (heads * tokens) * x[1] + vector // tokens % heads * x[2] + vector % tokens * x[3]


@part
def head_of(x, vector):
    """KV head of a vector."""
    return vector // x[7] % x[6]


@part
def to_half(number):
    """The bits of the nearest float16 of a float32, ties to even."""
    bits = bits_of_float(number)
    sign, size = (bits >> np.uint32(16)) & np.uint32(0x8000), bits & np.uint32(0x7FFFFFFF)
    # subnormal numbers are rounded by the addition of ½, whose last bit is their step
    small = bits_of_float(float_of_bits(size) + np.float32(0.5)) - np.uint32(0x3F000000)
    usual = (size + np.uint32(0xC8000FFF) + (size >> np.uint32(13) & np.uint32(1))) >> np.uint32(13)
    rounded = small if size < np.uint32(0x38800000) else usual & np.uint32(0x7FFF)
    rounded = _INFINITE_HALF if size >= np.uint32(0x477FF000) else rounded
    rounded = _NAN_HALF if size > np.uint32(0x7F800000) else rounded
    return np.uint16(rounded | sign)


@part
def load(x, vector, count, out):
    """Load the numbers of a vector as float32."""
    at, step, kind = row_at(x, vector), x[4], x[5]
    if kind == FLOAT32:
        if step == _F32_BYTES:
            numbers = f32_at(at)
            for i in range(count):
                out[i] = numbers[i]
        else:
            for i in range(count):
                out[i] = f32_at(at + i * step)[0]
    elif kind == FLOAT16:
        if step == _U16_BYTES:
            halves = u16_at(at)
            for i in range(count):
                out[i] = half(halves[i])
        else:
            for i in range(count):
                out[i] = half(u16_at(at + i * step)[0])
    else:
        for i in range(count):
            out[i] = float_of_bits(np.uint32(u16_at(at + i * step)[0]) << np.uint32(16))


@part
def root_mean_square(y, count):
    """The root-mean-square of the first ``count`` numbers of a vector."""
    total = np.float32(0)
    for i in range(count):
        total += y[i] * y[i]
    return np.sqrt(total) / np.sqrt(np.float32(count))


@part
def signed_square(root):
    """The square, with the sign of the root."""
    return root * abs(root)


@part
def scale_factor(scale, inner, squares, dim):
    """The factor of levels, from their product with the vector, their squares, and the vector's length √dim."""
    inner = np.float32(dim) if inner == 0 else inner  # a zero vector has scale 0 if the factor is finite
    if scale == MSE:
        return inner / squares
    return np.float32(dim) / inner if scale == UNBIASED else np.float32(1)


@part
def transform(y, dim, hartley, spare):
    """Hadamard transforms of the m blocks of a vector, ``dim`` = m·2^k and m odd, mixed by ``hartley`` ``[m, m]``.

    All are addresses but ``dim``; ``spare`` is room for a vector, and ``hartley`` includes all scaling. A step writes
    sums and differences of the halves of a block next to each other: after k steps the order is the original one.
    """
    block = dim & -dim
    odd, half_block = dim // block, block >> 1
    for begin in range(0, 4 * dim, 4 * block):
        source, target, step = y + begin, spare + begin, 1
        while step < block:
            x, z = f32_at(source), f32_at(target)
            for i in range(half_block):
                a, b = x[i], x[half_block + i]
                z[2 * i], z[2 * i + 1] = a + b, a - b
            source, target, step = target, source, 2 * step
        if source == y + begin:
            x, z = f32_at(source), f32_at(target)
            for i in range(block):
                z[i] = x[i]
    factors = f32_at(hartley)
    for k in range(odd):
        x, z = f32_at(spare), f32_at(y + 4 * k * block)
        for i in range(block):
            z[i] = factors[k * odd] * x[i]
        for m in range(1, odd):
            x = f32_at(spare + 4 * m * block)
            for i in range(block):
                z[i] += factors[k * odd + m] * x[i]


@part
def push(row, code, bits, held, have, word):
    """Append a code; the state is the bits that wait for a whole word, their number, and the next word."""
    held |= np.uint64(code) << np.uint64(have)
    have += bits
    if have >= _WORD_BITS:
        row[word] = np.uint32(held)
        return held >> np.uint64(_WORD_BITS), have - _WORD_BITS, word + 1
    return held, have, word


@part
def pack(codes, count, below, bits, address, words):
    """Write ``bits`` of each code, from bit ``below`` on, as one string of bits."""
    row = carray(u32_at(address), words)
    mask = np.uint64((1 << bits) - 1)
    held, have, word = np.uint64(0), 0, 0
    for i in range(count):
        held, have, word = push(row, np.uint64(codes[i]) >> np.uint64(below) & mask, bits, held, have, word)
    if have > 0:
        row[word] = np.uint32(held)


@part
def pack_bytes(codes, bits, row):
    """As `pack`, in whole bytes, all bits of each code."""
    held, have, at = np.uint64(0), 0, 0
    for i in range(len(codes)):
        held |= np.uint64(codes[i]) << np.uint64(have)
        have += bits
        while have >= 8:
            row[at] = np.uint8(held & np.uint64(255))
            held >>= np.uint64(8)
            have -= 8
            at += 1
    if have > 0:
        row[at] = np.uint8(held & np.uint64(255))
