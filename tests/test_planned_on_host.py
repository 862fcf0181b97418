"""The kernel that encodes by a bit plan, its Metal text run on the CPU by ``tests/metal_on_host``, against a codec."""

import dataclasses
import shutil

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_on_host import check, run
from tests.metal_on_host.launch import HOST
from tests.test_encode_on_host import ROUNDING, check_scales, vectors
from veloxlab.codecs import spectralquant
from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.scalar import PlannedQuantizer
from veloxlab.codecs.spectralquant import SpectralQuant
from veloxlab.kernels.backend import run_vectors

MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to read and run Metal on the CPU")


def fitted(dim, bits, plan=(), **options):
    """Return a codec of three KV heads, each with its own spectrum, and optionally another plan."""
    rng = np.random.default_rng(dim)
    mixing = rng.standard_normal((3, dim, dim)) * 0.9 ** np.arange(dim)
    x, q = (mx.array((rng.standard_normal((1, 3, 4 * dim, dim)) @ mixing + 0.3).astype(np.float32)) for _ in range(2))
    codec = SpectralQuant(dim, bits, **options).fit(Sample(x, q))
    return dataclasses.replace(codec, plan=plan) if plan else codec


# arguments of `fitted`, and a dtype
CASES = [
    ({"dim": 64, "bits": 1}, mx.float32),
    ({"dim": 80, "bits": 3, "scale": "unbiased"}, mx.bfloat16),
    ({"dim": 128, "bits": 4, "basis": "query"}, mx.float16),
    ({"dim": 128, "bits": 8, "basis": "hadamard", "scale": "norm"}, mx.float16),
    ({"dim": 256, "bits": 2, "centred": False, "scale": "unbiased"}, mx.float32),
    ({"dim": 96, "bits": 5, "plan": (3, 7, 0, 8, 6, 5, 8, 3) * 12}, mx.float16),
    # two words, and no bits after the middle of the second
    ({"dim": 20, "bits": 3, "plan": (8, 8, 8, 8, 7, 6, 5, 4, 3, 2, 1, *[0] * 9)}, mx.float16),
]


@pytest.mark.parametrize(("given", "dtype"), CASES)
def test_codes_and_scales_are_the_references(given, dtype):
    codec = fitted(**given)
    dim, tables = codec.head_dim, codec._encoder.tables
    quantizer = PlannedQuantizer(codec.plan)
    for tokens in (1, 43):
        x = vectors(np.random.default_rng(tokens), dim, dtype, tokens)
        y = x.astype(mx.float32) @ codec.forward
        found, reference = run_vectors(codec._encoder, HOST, x, y), codec._encode_by_graph(x, y)
        assert {n: (a.shape, a.dtype) for n, a in found.items()} == {
            n: (a.shape, a.dtype) for n, a in reference.items()
        }
        codes, expected = unpacked(codec.plan, found["codes"]), unpacked(codec.plan, reference["codes"])
        assert mx.array_equal(quantizer.pack(codes), found["codes"]), "the end of a row is padded with zeros"

        # codes: one apart if a coordinate is at the boundary between two cells within rounding; otherwise equal
        rms = mx.linalg.norm(x.astype(mx.float32), axis=-1, keepdims=True) / dim**0.5
        unit = y / mx.where(rms == 0, 1.0, rms)
        apart = np.abs(np.array(codes, np.int64) - np.array(expected, np.int64))
        differ = apart != 0
        first = mx.array([2**width - 1 for width in codec.plan], mx.uint32)
        last = mx.maximum(first, 1) - 1  # boundary of a width
        boundary = mx.take(tables["boundaries"], first + mx.minimum(mx.minimum(codes, expected), last))
        off = mx.abs((unit - codec.mean) / codec.deviation - boundary)
        assert np.all(apart <= 1)
        allowed = ROUNDING * (mx.abs(unit) + mx.abs(codec.mean)) / codec.deviation
        assert np.all(np.array(off <= allowed)[differ])
        assert differ.sum() <= differ.size * 2e-4 + 1, f"{differ.sum()} of {differ.size} codes differ"

        quantized = quantizer.levels_of(codes) * codec.deviation + codec.mean
        check_scales(found["root_scale"], rms * spectralquant._scale_factor(codec.scale, unit, quantized))
        if tokens > 1:
            assert found["root_scale"][1, 1, 2].item() == 0, "a zero vector has a scale of 0"
            assert mx.array_equal(found["codes"][1, 1, 2], reference["codes"][1, 1, 2])


def unpacked(plan, words):
    """Return codes ``[..., D]`` of a string of bits, LSB first."""
    bits = np.unpackbits(np.array(words).view(np.uint8), axis=-1, bitorder="little").astype(np.uint32)
    ends = np.cumsum(plan)
    parts = [bits[..., e - w : e] @ (1 << np.arange(w, dtype=np.uint32)) for w, e in zip(plan, ends, strict=True)]
    return mx.array(np.stack(parts, axis=-1).astype(np.uint32))


def test_all_layers_share_one_kernel():
    first, second = fitted(64, 3), fitted(64, 3, (8, 8, 8, 0, 0, 0, 0, 0) * 8)
    x = vectors(np.random.default_rng(0), 64, mx.float16, 2)
    run_vectors(first._encoder, HOST, x, x.astype(mx.float32))
    built = run._compiled.cache_info().misses
    run_vectors(second._encoder, HOST, x, x.astype(mx.float32))
    assert run._compiled.cache_info().misses == built
