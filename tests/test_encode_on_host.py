"""The Metal text of kernels that encode and rotate, run on the CPU by ``tests/metal_on_host``, against codecs."""

import dataclasses
import shutil

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_on_host import check, run
from tests.metal_on_host.launch import HOST
from veloxlab.codecs.parts.packing import pack, unpack
from veloxlab.codecs.parts.scales import scale_factor
from veloxlab.codecs.parts.transforms import SignedHadamard
from veloxlab.codecs.rabitq import RaBitQ
from veloxlab.codecs.rvq import Rvq
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.kernels.backend import run_vectors
from veloxlab.kernels.rotated import decode_kernel, rotate_kernel
from veloxlab.kernels.vectors import fits_lanes

MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to read and run Metal on the CPU")

# Both sum D terms in float32 in another order: a coordinate of size 1 has an error of a few roundings of partial sums.
ROUNDING = 16 * 2.0**-23


@dataclasses.dataclass(frozen=True)
class Case:
    """A codec, and the dtype of its input."""

    codec: TurboQuant | Rvq | RaBitQ
    dtype: mx.Dtype

    def __str__(self):
        codec, dtype = self.codec, str(self.dtype).split(".")[-1]
        kind = getattr(codec, "encoder", getattr(codec, "variant", "mse"))
        return f"{type(codec).__name__}-{kind}-d{codec.head_dim}-{codec.bits}bit-{codec.scale}-{dtype}"


CASES = [
    Case(TurboQuant(16, 3, "norm", seed=7), mx.float32),
    Case(TurboQuant(64, 1, "mse", seed=7), mx.float32),
    Case(TurboQuant(80, 3, "mse", seed=7), mx.bfloat16),
    Case(TurboQuant(96, 5, seed=7), mx.float16),
    Case(TurboQuant(112, 6, "mse", seed=7), mx.bfloat16),
    Case(TurboQuant(128, 4, seed=7), mx.float16),
    Case(TurboQuant(192, 7, "norm", seed=7), mx.float16),
    Case(TurboQuant(256, 8, "mse", seed=7), mx.float16),
    Case(TurboQuant(512, 2, seed=7), mx.float32),
]
STAGES = [
    Case(Rvq(64, 2, scale="mse", seed=7), mx.float32),
    Case(Rvq(80, 4, "refined", seed=7), mx.float16),
    Case(Rvq(96, 6, scale="norm", seed=7), mx.bfloat16),  # codes of 3 bits, some of no width
    Case(Rvq(128, 8, residual="laplacian", seed=7), mx.float16),
    Case(Rvq(256, 8, "refined", scale="mse", seed=7), mx.bfloat16),
]
GRIDS = [
    Case(RaBitQ(64, 1, "mse", seed=7), mx.float32),
    Case(RaBitQ(80, 2, seed=7), mx.bfloat16),
    Case(RaBitQ(128, 3, "mse", seed=7), mx.float16),
    Case(RaBitQ(128, 4, seed=7), mx.float16),
    Case(RaBitQ(112, 5, "mse", seed=7), mx.bfloat16),
    Case(RaBitQ(16, 6, seed=7), mx.float32),
    Case(RaBitQ(96, 7, seed=7), mx.float16),
    Case(RaBitQ(256, 8, "mse", seed=7), mx.float32),
    Case(RaBitQ(128, 4, encoder="fast", seed=7), mx.float16),
    Case(RaBitQ(80, 3, bounds=True, seed=7), mx.bfloat16),
    Case(RaBitQ(128, 8, bounds=True, seed=7), mx.float32),
    Case(RaBitQ(192, 8, "mse", encoder="fast", seed=7), mx.bfloat16),
]


def vectors(rng, dim, dtype, tokens):
    """Return ``[2, 3, tokens, dim]`` of many sizes, one of them zero if there are several, as a strided view."""
    x = rng.standard_normal((2, tokens + 3, 5, dim)) * 10.0 ** rng.uniform(-3, 3, (2, tokens + 3, 5, 1))
    if tokens > 1:
        x[1, 4, 2] = 0
    return mx.array(x.astype(np.float32)).astype(dtype)[:, 2:-1, 1:-1].swapaxes(1, 2)


def signs_of(rotation):
    return mx.sign(rotation.forward(mx.eye(rotation.signs.size))[:, 0])


def fields(codec):
    """Return name and bits of the parts of a code, from its high bits down."""
    return {"coarse": codec.bits // 2, "fine": codec.bits // 2} if isinstance(codec, Rvq) else {"codes": codec.bits}


def codes_of(codec, arrays):
    """Return codes ``[B, H, S, D]`` from the words of their fields, whose rows must end in zeros."""
    codes = mx.array(0, mx.uint32)
    for name, width in fields(codec).items():
        field = unpack(arrays[name], width, codec.head_dim)
        assert mx.array_equal(pack(field, width), arrays[name]), "the end of a row is padded with zeros"
        codes = codes << width | field
    return codes


def on_the_host(case, tokens):
    """Return kernel's and reference's codes of vectors, and the vectors rotated to an RMS of 1, with their own RMS."""
    codec, dim = case.codec, case.codec.head_dim
    x = vectors(np.random.default_rng(dim + tokens), dim, case.dtype, tokens)
    found, reference = run_vectors(codec._encoder, HOST, x), codec.encode(x).arrays
    assert {name: (a.shape, a.dtype) for name, a in found.items()} == {
        n: (a.shape, a.dtype) for n, a in reference.items()
    }
    exact = x.astype(mx.float32)
    rms = mx.linalg.norm(exact, axis=-1, keepdims=True) / dim**0.5
    return found, reference, SignedHadamard(dim, 7).forward(exact / mx.where(rms == 0, 1.0, rms)), rms


def check_scales(root, scale):
    """Check that scales belong to the codes, rounded to one of two neighbours in float16."""
    steps = np.array(root.view(mx.int16)) - np.array(mx.sqrt(scale).astype(mx.float16).view(mx.int16))
    assert np.all(np.abs(steps) <= 1)
    assert np.count_nonzero(steps) <= 0.01 * steps.size, f"{np.count_nonzero(steps)} of {steps.size} scales differ"


def check_a_zero_vector(codec, found, reference):
    assert found["root_scale"][1, 1, 2].item() == 0, "a zero vector has a scale of 0"
    for name in fields(codec):
        assert mx.array_equal(found[name][1, 1, 2], reference[name][1, 1, 2])


@pytest.mark.parametrize("case", CASES + STAGES, ids=str)
def test_codes_and_scales_are_the_references(case):
    codec, nearest = case.codec, case.codec._encoder.tables
    for tokens in (1, 43):
        found, reference, y, rms = on_the_host(case, tokens)
        codes, expected = codes_of(codec, found), codes_of(codec, reference)

        # codes may differ if a coordinate is at the boundary between two cells within rounding; else they are equal
        differ = np.array(codes != expected)
        lower, upper = mx.minimum(codes, expected), mx.maximum(codes, expected)
        last = 2**codec.bits - 2
        for boundary in (mx.minimum(lower, last), mx.clip(upper, 1, None) - 1):  # all cells between have no width
            off = mx.abs(y - mx.take(nearest["boundaries"], boundary))
            assert np.all(np.array(off)[differ] <= ROUNDING)
        assert differ.sum() <= differ.size * 2e-4 + 1, f"{differ.sum()} of {differ.size} codes differ"

        check_scales(found["root_scale"], rms * scale_factor(codec.scale, y, mx.take(nearest["levels"], codes)))
        if tokens > 1:
            check_a_zero_vector(codec, found, reference)


@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_grid_points_have_a_scale_as_good_as_the_references(case):
    codec = case.codec
    tried = codec.encoder == "grid" and codec.bits > 1
    half_count = 2 ** (codec.bits - 1)
    for tokens in (1, 43):
        found, reference, y, rms = on_the_host(case, tokens)
        codes = codes_of(codec, found)
        u = codes - float(2**codec.bits - 1) / 2

        # each vector's codes belong to one of the scales, except if a coordinate is at a step within rounding …
        size, steps = np.abs(np.array(y, np.float64))[..., None], np.abs(np.array(u, np.float64))[..., None] - 0.5
        stretches = np.array(codec._encoder.tables["stretches"], np.float64)
        if tried:
            stretches = half_count / np.maximum(size.max(axis=-2, keepdims=True), 1e-30) * stretches
        reach = stretches * size
        wanted = np.minimum(np.floor(reach), half_count - 1)
        at_a_step = np.abs(reach - np.maximum(wanted, steps)) <= ROUNDING * stretches
        fits = ((wanted == steps) | (at_a_step & (np.abs(wanted - steps) == 1))).all(axis=-2)
        assert fits.any(axis=-1).all()
        assert mx.all(((u >= 0) == (y >= 0)) | (mx.abs(y) <= ROUNDING))

        # … and none of them has a smaller angle, except for such rounding of all coordinates in e = u − t·y
        points = wanted + 0.5
        error = np.linalg.norm(points - reach, axis=-2, keepdims=True)
        sine = np.square(error) - np.square(((points - reach) * size).sum(axis=-2, keepdims=True)) / codec.head_dim
        sine = sine / np.square(points).sum(axis=-2, keepdims=True)
        rounding = 2 * ROUNDING * stretches * codec.head_dim**0.5 / error
        if tried:
            assert np.any(
                fits[..., None, :] & (sine * (1 - rounding) <= sine.min(axis=-1, keepdims=True)), axis=-1
            ).all()
        differ = np.array((codes != codes_of(codec, reference)).any(axis=-1))
        assert differ.sum() <= 0.01 * differ.size + 1, f"{differ.sum()} of {differ.size} vectors have other codes"

        check_scales(found["root_scale"], rms * scale_factor(codec.scale, y, u))
        if codec.bounds:
            rest = mx.linalg.norm(y - scale_factor("mse", y, u) * u, axis=-1, keepdims=True) / codec.head_dim**0.5
            half_a_step = 2.0**-11 * rest  # and coordinates of y have their rounding error
            assert mx.all(mx.abs(found["sine"].astype(mx.float32) - rest) <= half_a_step + ROUNDING)
        if tokens > 1:
            check_a_zero_vector(codec, found, reference)


DECODED = CASES + [case for case in GRIDS if case.codec.encoder == "grid"]


@pytest.mark.parametrize("case", DECODED, ids=str)
def test_decoding_is_the_reference(case):
    """For codes and scales in views of growing buffers, in every dtype."""
    codec, dim = case.codec, case.codec.head_dim
    rng = np.random.default_rng(dim)
    signs = signs_of(SignedHadamard(dim, 7))
    for tokens in (1, 43):
        held = codec.encode(vectors(rng, dim, mx.float32, tokens + 5))[2 : tokens + 2]
        words, root = held.arrays["codes"], held.arrays["root_scale"]
        found = run_vectors(decode_kernel(signs, codec._table, case.dtype), HOST, words, root)["out"]
        expected = codec.decode(held)
        assert found.dtype == case.dtype
        assert found.shape == expected.shape
        size = mx.linalg.norm(expected, axis=-1, keepdims=True) / dim**0.5
        half_a_step = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[case.dtype]
        least = 2.0**-25  # half of float16's smallest number
        allowed = ROUNDING * size + half_a_step * mx.abs(expected) + least
        assert mx.all(mx.abs(found.astype(mx.float32) - expected) <= allowed)


def test_coordinates_can_be_strided():
    codec = TurboQuant(64, 1)
    x = mx.array(np.random.default_rng(0).standard_normal((1, 1, 3, 128)).astype(np.float32))[..., ::2]
    found, reference = run_vectors(codec._encoder, HOST, x), codec.encode(x).arrays
    assert all(mx.array_equal(found[name], array) for name, array in reference.items())


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
def test_rotating_any_block_size_is_the_reference(dim, dtype, inverse):
    rotation = SignedHadamard(dim, 3)
    x = vectors(np.random.default_rng(dim), dim, dtype, 5)
    found = run_vectors(rotate_kernel(signs_of(rotation), inverse=inverse), HOST, x)["out"]
    exact = x.astype(mx.float32)
    expected = rotation.inverse(exact) if inverse else rotation.forward(exact)
    assert found.dtype == mx.float32
    size = mx.linalg.norm(exact, axis=-1, keepdims=True) / dim**0.5
    assert mx.all(mx.abs(found - expected) <= ROUNDING * size)


def test_the_largest_block_that_fits_the_registers():
    assert all(fits_lanes(dim) for dim in range(16, 513, 16))
    assert fits_lanes(1024)
    assert not fits_lanes(1040)  # 65 blocks of 16
    assert not fits_lanes(63)
    assert not fits_lanes(0)
