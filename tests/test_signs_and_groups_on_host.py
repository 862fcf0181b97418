"""The kernels of signs and grouped steps, whose Metal text ``tests/metal_on_host`` runs on the CPU, against codecs."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_on_host import check, run
from tests.metal_on_host.launch import HOST
from tests.test_encode_on_host import vectors
from veloxlab.codecs import qjl
from veloxlab.codecs.parts.packing import pack, unpack
from veloxlab.kernels.backend import run_vectors
from veloxlab.kernels.encode import group_kernel, sign_kernel

MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to read and run Metal on the CPU")


def shapes(arrays):
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def check_roots(found, wanted):
    """Check sums and roots that are rounded in another order: one of two neighbours in float16."""
    steps = np.array(found.view(mx.int16), np.int64) - np.array(wanted.view(mx.int16), np.int64)
    assert np.all(np.abs(steps) <= 1)
    assert np.count_nonzero(steps) <= 0.01 * steps.size, f"{np.count_nonzero(steps)} of {steps.size} roots differ"


@pytest.mark.parametrize(
    ("dim", "rows", "dtype"),
    [
        (128, 256, mx.float16),
        (80, 80, mx.bfloat16),
        (63, 189, mx.float32),
        (4, 124, mx.float32),
        (256, 2048, mx.float16),
    ],
)
def test_signs_are_the_references(dim, rows, dtype):
    rng = np.random.default_rng(rows)
    for tokens in (1, 43):
        x, y = vectors(rng, dim, dtype, tokens), vectors(rng, rows, mx.float32, tokens)  # views with gaps
        y = mx.where(mx.abs(y) < 0.05 * mx.abs(y).max(axis=-1, keepdims=True), mx.sign(y) * 0.0, y)  # 0 and -0
        found, reference = run_vectors(sign_kernel(dim, rows), HOST, x, y), qjl._signs_and_size(x, y)
        assert shapes(found) == shapes(reference)
        assert mx.array_equal(found["signs"], reference["signs"])
        check_roots(found["root_rms"], reference["root_rms"])


@pytest.mark.parametrize(
    ("dim", "bits", "group", "levels", "dtype"),
    [
        (128, 2, 32, "centres", mx.float16),
        (128, 4, 32, "ends", mx.float16),
        (80, 3, 32, "centres", mx.bfloat16),  # the last group is shorter
        (63, 1, 32, "centres", mx.float32),
        (64, 1, 7, "ends", mx.float16),
        (96, 8, 96, "centres", mx.float16),
        (112, 5, 1000, "ends", mx.bfloat16),  # one group, shorter than its limit
        (64, 7, 1, "centres", mx.float32),
        (256, 6, 48, "centres", mx.float32),
    ],
)
def test_grouped_steps_are_the_references(dim, bits, group, levels, dtype):
    codec = qjl.GroupedValues(dim, bits, levels, group)
    for tokens in (1, 43):
        x = vectors(np.random.default_rng(tokens), dim, dtype, tokens)
        found, reference = run_vectors(codec._encoder, HOST, x), codec._encode_by_graph(x)
        assert shapes(found) == shapes(reference)
        check_roots(found["least"], reference["least"])
        check_roots(found["half_step"], reference["half_step"])
        codes = unpack(found["codes"], bits, dim)
        assert mx.array_equal(pack(codes, bits), found["codes"]), "the end of a row is padded with zeros"

        # a code is the nearest level of the stored step and least number, within their rounding
        least, half = (qjl._signed_square(found[name])[..., None] for name in ("least", "half_step"))
        grouped, least, step = (  # type: ignore[assignment]
            np.array(a, np.float64) for a in (codec._grouped(x.astype(mx.float32)), least, 2 * half)
        )
        flat = step == 0
        at = (grouped - least) / np.where(flat, 1, step) - codec._shift
        rounding = 2.0**-23 * (np.abs(grouped) + np.abs(least)) / np.where(flat, 1, step)
        nearest = np.clip(at, 0, 2**bits - 1)
        coded = np.array(codec._grouped(codes.astype(mx.float32)), np.float64)
        assert np.all(np.abs(coded - nearest) <= 0.5 + rounding)
        same_steps = (found["least"] == reference["least"]) & (found["half_step"] == reference["half_step"])
        expected = codec._grouped(unpack(reference["codes"], bits, dim).astype(mx.float32))
        differ = np.array((mx.array(coded.astype(np.float32)) != expected) & same_steps[..., None])
        assert differ.sum() <= differ.size * 2e-4 + 1, f"{differ.sum()} of {differ.size} codes differ"


def test_vectors_that_do_not_fit_have_no_kernel():
    assert group_kernel(5000, 2, 32, 4, 0.5) is None
