"""Packing is tight and lossless, for any width, count and grouping."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veloxlab.codecs.parts.packing import pack, unpack
from veloxlab.kernels.vectors import words_per_row


def bits_of(row: np.ndarray, bits: int) -> str:
    """Return the bit string that packing must make: code after code, low bits first."""
    return "".join(f"{code:0{bits}b}"[::-1] for code in row)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(1, 200), rows=st.integers(0, 3), seed=st.integers(0, 2**16))
def test_unpack_undoes_pack(bits, count, rows, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    words = pack(mx.array(codes), bits)
    assert words.dtype == mx.uint32
    assert words.shape == (rows, words_per_row(count, bits))
    assert np.array_equal(np.array(unpack(words, bits, count)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_layout_is_least_significant_bit_first_and_straddles_words(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 67)
    words = np.array(pack(mx.array(codes), bits))
    stored = "".join(f"{word:032b}"[::-1] for word in words)
    assert stored.startswith(bits_of(codes, bits))
    assert set(stored[67 * bits :]) <= {"0"}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256])
def test_a_width_costs_its_bits_and_less_than_a_word_of_padding(bits, dim):
    assert 0 <= 32 * words_per_row(dim, bits) - bits * dim < 32


@pytest.mark.parametrize(("bits", "together"), [(1, 8), (2, 8), (3, 4), (4, 4), (5, 2), (8, 2)])
def test_codes_read_together_hold_the_same_codes(bits, together):
    codes = np.random.default_rng(1).integers(0, 1 << bits, (3, 64))
    joined = np.array(unpack(pack(mx.array(codes), bits), bits, 64, together))
    apart = (joined[..., None] >> (bits * np.arange(together))) & ((1 << bits) - 1)
    assert np.array_equal(apart.reshape(3, 64), codes)
