"""The Metal kernel that finds and packs nearest centroids, run on the CPU, against its reference implementation."""

import math
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_on_host import check, run
from tests.metal_on_host.launch import HOST
from veloxlab.codecs.parts.vector import nearest, pack_indices, unpack_indices
from veloxlab.kernels.backend import run_vectors
from veloxlab.kernels.devices import CUDA
from veloxlab.kernels.encode import search_kernel

MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
needs_compilers = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {' and '.join(MISSING)} to read and run Metal on the CPU"
)


AS_ON_NVIDIA = replace(HOST, points_each=CUDA.points_each)  # the kernel's tile of points on that device


def found_by_kernel(points, centroids, bits, backend=HOST):
    """Return packed indices of ``points`` ``[..., J·d]``."""
    dim, length = centroids.shape[1], points.shape[-1]
    shape = (1, 1, 1, *points.shape)
    kernel = search_kernel(dim, length // dim, bits, backend)
    packed = run_vectors(kernel, backend, points.reshape(math.prod(shape[:-3]), *shape[-3:]), centroids)["packed"]
    return packed.reshape(*points.shape[:-1], packed.shape[-1])


def whole_numbers(rng, shape, dtype=mx.float32):
    """Return small whole numbers, so that distances are exact in any order of summation, and often equal."""
    return mx.array(rng.integers(-3, 4, shape).astype(np.float32)).astype(dtype)


def reference(points, centroids, bits):
    """Return the definition: packed indices of the nearest centroids."""
    centroids = centroids.astype(mx.float32)
    points = points.astype(mx.float32).reshape(*points.shape[:-1], -1, centroids.shape[1])
    return pack_indices(nearest(points, centroids), bits)


# bits, coordinates, sub-vectors of a row, lead dimensions
CASES = [
    (1, 1, 67, (3,)),
    (2, 2, 64, (2, 3, 5)),  # rows that fill a threadgroup's points, or exceed them
    (3, 3, 32, (33,)),
    (4, 8, 16, (1, 2, 5)),
    (5, 16, 1, (65,)),  # one point more than full threadgroups
    (6, 80, 2, (2, 17)),
    (7, 4, 40, (3, 2, 1, 2)),
    (8, 256, 1, (2, 1, 35)),
    (8, 4, 32, (2, 2, 7)),
    (10, 5, 7, (11,)),  # words with parts of four indices
    (12, 8, 16, (3,)),
]


@needs_compilers
@pytest.mark.parametrize(("bits", "dim", "parts", "lead"), CASES)
def test_packed_indices_are_the_references(bits, dim, parts, lead):
    assert_indices_are_the_references(bits, dim, parts, lead)


def assert_indices_are_the_references(bits, dim, parts, lead, backend=HOST):
    rng = np.random.default_rng(bits)
    points, centroids = whole_numbers(rng, (*lead, parts * dim)), whole_numbers(rng, (2**bits, dim))
    found, expected = found_by_kernel(points, centroids, bits, backend), reference(points, centroids, bits)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert mx.array_equal(found, expected)


@needs_compilers
@pytest.mark.parametrize(("bits", "dim", "parts", "lead"), [CASES[1], CASES[4], CASES[7], CASES[9]])
def test_the_larger_tile_of_points_gives_the_same_indices(bits, dim, parts, lead):
    assert_indices_are_the_references(bits, dim, parts, lead, AS_ON_NVIDIA)


@needs_compilers
def test_strided_views_are_read_without_a_copy():
    rng = np.random.default_rng(0)
    buffer, book = whole_numbers(rng, (2, 9, 4, 70)), whole_numbers(rng, (16, 7))
    views = [
        (buffer.swapaxes(1, 2)[:, 1:-1, 2:8, 3:-3], book.T[1:5, :].T),
        (buffer[..., ::2][..., :32], mx.broadcast_to(book[:, :1], (16, 4))),
        (mx.broadcast_to(buffer[:, :1, :, :8], (2, 5, 4, 8)), book[:, 2:6]),
    ]
    for points, centroids in views:
        assert mx.array_equal(found_by_kernel(points, centroids, 4), reference(points, centroids, 4))


@needs_compilers
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_is_read_without_conversion(dtype):
    rng = np.random.default_rng(1)
    points, centroids = whole_numbers(rng, (5, 24), dtype), whole_numbers(rng, (64, 8), dtype)
    assert mx.array_equal(found_by_kernel(points, centroids, 6), reference(points, centroids, 6))


@needs_compilers
def test_no_centroid_is_nearer_except_for_rounding():
    rng = np.random.default_rng(2)
    dim, bits, count = 128, 8, 50
    points, centroids = (rng.standard_normal(shape, np.float32) for shape in ((count, dim), (2**bits, dim)))
    words = found_by_kernel(mx.array(points), mx.array(centroids), bits)
    chosen = np.array(unpack_indices(words, bits, 1))[:, 0]
    distances = np.square(points[:, None].astype(np.float64) - centroids).sum(axis=-1)
    # each of the 128 products and sums has an error of at most 2⁻²⁴ of the sum so far, which stays below |x|·|c|
    bound = 4 * dim * 2.0**-24 * np.linalg.norm(points, axis=1) * np.linalg.norm(centroids, axis=1).max()
    assert np.all(distances[np.arange(count), chosen] - distances.min(axis=1) <= bound)
