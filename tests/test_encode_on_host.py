"""The encoding and spreading kernels' Metal text, run on the CPU by ``tests/metal_on_host``, against their twins."""

import dataclasses
import shutil

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_on_host import check, launch, run
from veloxlab.codecs.packing import pack, unpack
from veloxlab.codecs.quantizers import ScaleName, scale_factor
from veloxlab.codecs.transforms import SignedHadamard
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.errors import InputError
from veloxlab.kernels.encode import can_spread, decode, encode, spread

MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to read and run Metal on the CPU")

# Both sum D terms in float32, in another order: a coordinate of size 1 is off by a few roundings of its partial sums.
ROUNDING = 16 * 2.0**-23


@pytest.fixture(autouse=True)
def _on_host(monkeypatch):
    monkeypatch.setattr("veloxlab.kernels.launch._built", launch.built)


@dataclasses.dataclass(frozen=True)
class Case:
    """A codec, and the dtype of what it encodes."""

    dim: int
    bits: int
    scale: ScaleName
    dtype: mx.Dtype

    def __str__(self):
        return f"d{self.dim}-{self.bits}bit-{self.scale}-{str(self.dtype).split('.')[-1]}"


CASES = [
    Case(16, 3, "norm", mx.float32),
    Case(64, 1, "mse", mx.float32),
    Case(80, 3, "mse", mx.bfloat16),
    Case(96, 5, "unbiased", mx.float16),
    Case(112, 6, "mse", mx.bfloat16),
    Case(128, 4, "unbiased", mx.float16),
    Case(192, 7, "norm", mx.float16),
    Case(256, 8, "mse", mx.float16),
    Case(512, 2, "unbiased", mx.float32),
]


def vectors(rng, dim, dtype, tokens):
    """``[2, 3, tokens, dim]`` of many sizes, one of them zero if there are several: a view with strides of its own."""
    x = rng.standard_normal((2, tokens + 3, 5, dim)) * 10.0 ** rng.uniform(-3, 3, (2, tokens + 3, 5, 1))
    if tokens > 1:
        x[1, 4, 2] = 0
    return mx.array(x.astype(np.float32)).astype(dtype)[:, 2:-1, 1:-1].swapaxes(1, 2)


def signs_of(rotation):
    return mx.sign(rotation.forward(mx.eye(rotation.dim))[:, 0])


def tables(codec):
    table = codec._quantizer.table
    return mx.array(table.boundaries.astype(np.float32)), mx.array(table.levels.astype(np.float32))


def encoded(codec, x):
    signs = signs_of(SignedHadamard(codec.head_dim, codec.seed))
    return encode(x, signs, *tables(codec), codec.bits, codec.scale, "metal")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_and_scales_are_the_twins(case):
    rng = np.random.default_rng(case.dim)
    codec = TurboQuant(case.dim, case.bits, case.scale, seed=7)
    boundaries, levels = tables(codec)
    for tokens in (1, 43):
        x = vectors(rng, case.dim, case.dtype, tokens)
        words, root = encoded(codec, x)
        twin = codec.encode(x).arrays
        assert words.dtype == mx.uint32
        assert root.dtype == mx.float16
        assert words.shape == twin["codes"].shape
        assert root.shape == twin["root_scale"].shape
        codes = unpack(words, case.bits, case.dim)
        assert mx.array_equal(pack(codes, case.bits), words), "the end of a row is padded with zeros"

        # codes: one apart where a coordinate is at the boundary between two cells but for rounding, else the same
        exact = x.astype(mx.float32)
        rms = mx.linalg.norm(exact, axis=-1, keepdims=True) / case.dim**0.5
        y = SignedHadamard(case.dim, 7).forward(exact / mx.where(rms == 0, 1.0, rms))
        expected = unpack(twin["codes"], case.bits, case.dim)
        apart = np.array(codes, np.int64) - np.array(expected, np.int64)
        differ = apart != 0
        assert np.all(np.abs(apart) <= 1)
        boundary = np.array(mx.take(boundaries, mx.minimum(mx.minimum(codes, expected), 2**case.bits - 2)))
        assert np.all(np.abs(np.array(y) - boundary)[differ] <= ROUNDING)
        assert differ.sum() <= differ.size * 2e-4 + 1, f"{differ.sum()} of {differ.size} codes differ"

        # scales: those that go with the codes, rounded to one of two neighbours in float16
        scale = rms * scale_factor(case.scale, y, mx.take(levels, codes))
        steps = np.array(root.view(mx.int16)) - np.array(mx.sqrt(scale).astype(mx.float16).view(mx.int16))
        assert np.all(np.abs(steps) <= 1)
        assert np.count_nonzero(steps) <= 0.01 * steps.size, f"{np.count_nonzero(steps)} of {steps.size} scales differ"
        if tokens > 1:
            assert root[1, 1, 2].item() == 0, "a zero vector has a scale of 0"
            assert np.array_equal(np.array(words[1, 1, 2]), np.array(twin["codes"][1, 1, 2]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_is_its_twin(case):
    """Of codes and scales in views of growing buffers, in every dtype."""
    rng = np.random.default_rng(case.dim)
    codec = TurboQuant(case.dim, case.bits, case.scale, seed=7)
    signs = signs_of(SignedHadamard(case.dim, 7))
    for tokens in (1, 43):
        held = codec.encode(vectors(rng, case.dim, mx.float32, tokens + 5))[2 : tokens + 2]
        words, root = held.arrays["codes"], held.arrays["root_scale"]
        found = decode(words, root, signs, tables(codec)[1], case.bits, case.dtype, "metal")
        expected = codec.decode(held)
        assert found.dtype == case.dtype
        assert found.shape == expected.shape
        size = mx.linalg.norm(expected, axis=-1, keepdims=True) / case.dim**0.5
        half_a_step = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[case.dtype]
        least = 2.0**-25  # half of float16's smallest number
        allowed = ROUNDING * size + half_a_step * mx.abs(expected) + least
        assert mx.all(mx.abs(found.astype(mx.float32) - expected) <= allowed)
    assert decode(words[:, :, :0], root[:, :, :0], signs, tables(codec)[1], case.bits, case.dtype, "metal").size == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"codes": mx.zeros((1, 1, 2, 5), mx.uint32)}, r"give \[batch, heads, tokens, 6\] words of uint32"),
        ({"codes": mx.zeros((1, 1, 2, 6))}, "of mlx.core.float32: give"),
        ({"levels": mx.zeros((4,))}, "give 8 numbers"),
        ({"bits": 0}, "bits=0"),
        ({"dtype": mx.int32}, "no vectors of 64 numbers of mlx.core.int32"),
    ],
)
def test_what_is_not_decoded_is_refused(change, sentence):
    given = {
        "codes": mx.zeros((1, 1, 2, 6), mx.uint32),
        "root_scale": mx.zeros((1, 1, 2, 1), mx.float16),
        "signs": mx.ones((64,)),
        "levels": mx.zeros((8,)),
        "bits": 3,
        "dtype": mx.float16,
        "backend": "metal",
    }
    with pytest.raises(InputError, match=sentence):
        decode(**(given | change))


def test_coordinates_may_be_apart():
    codec = TurboQuant(64, 1)
    x = mx.array(np.random.default_rng(0).standard_normal((1, 1, 3, 128)).astype(np.float32))[..., ::2]
    words, root = encoded(codec, x)
    twin = codec.encode(x).arrays
    assert mx.array_equal(words, twin["codes"])
    assert mx.array_equal(root, twin["root_scale"])


def test_no_vectors_have_no_codes():
    words, root = encoded(TurboQuant(64, 3), mx.zeros((1, 2, 0, 64)))
    assert words.shape == (1, 2, 0, 6)
    assert root.shape == (1, 2, 0, 1)


@pytest.mark.parametrize(
    ("dim", "dtype", "inverse"),
    [
        (20, mx.float32, True),
        (64, mx.float16, False),
        (80, mx.bfloat16, True),
        (112, mx.float32, False),
        (1024, mx.float32, False),
    ],
)
def test_spreading_of_any_block_size_is_its_twin(dim, dtype, inverse):
    rotation = SignedHadamard(dim, 3)
    x = vectors(np.random.default_rng(dim), dim, dtype, 5)
    found = spread(x, signs_of(rotation), "metal", inverse=inverse)
    exact = x.astype(mx.float32)
    expected = rotation.inverse(exact) if inverse else rotation.forward(exact)
    assert found.dtype == mx.float32
    size = mx.linalg.norm(exact, axis=-1, keepdims=True) / dim**0.5
    assert mx.all(mx.abs(found - expected) <= ROUNDING * size)


def test_spreading_nothing_gives_nothing():
    assert spread(mx.zeros((1, 2, 0, 80), mx.float16), mx.ones((80,)), "metal").shape == (1, 2, 0, 80)


def test_what_fits_the_registers():
    assert all(can_spread(dim) for dim in range(16, 513, 16))
    assert can_spread(1024)
    assert not can_spread(1040)  # 65 blocks of 16
    assert not can_spread(63)
    assert not can_spread(0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": mx.zeros((2, 64))}, r"was given \[2, 64\]"),
        ({"x": mx.zeros((1, 1, 2, 64), mx.int32)}, "int32"),
        ({"x": mx.zeros((1, 1, 2, 63)), "signs": mx.ones((63,))}, "63 numbers"),
        ({"signs": mx.ones((32,))}, "give 64 numbers"),
        ({"boundaries": mx.zeros((8,))}, "give 7 numbers"),
        ({"levels": mx.zeros((8,), mx.float16)}, "float16"),
        ({"bits": 9}, "bits=9"),
        ({"scale_name": "least"}, "'least'"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(change, sentence):
    given = {
        "x": mx.zeros((1, 1, 2, 64)),
        "signs": mx.ones((64,)),
        "boundaries": mx.zeros((7,)),
        "levels": mx.zeros((8,)),
        "bits": 3,
        "scale_name": "mse",
        "backend": "metal",
    }
    with pytest.raises(InputError, match=sentence):
        encode(**(given | change))
