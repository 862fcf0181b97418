"""The Metal text that encodes by sums of entries, run on the CPU by `tests.metal_on_host`, against CommVQ's search."""

import math
import shutil

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_on_host import check, run
from tests.metal_on_host.launch import HOST
from veloxlab.codecs.base import Sample
from veloxlab.codecs.commvq import CommVQ
from veloxlab.codecs.parts.rope import Rope
from veloxlab.kernels.backend import run_vectors, vectors_key

MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to read and run Metal on the CPU")

ROUNDING = 2.0**-11  # of the scale, which is stored in 16 bits


def fitted(dim, bits, tensor, rope, **options):
    rng = np.random.default_rng(dim + bits)
    sample = Sample(mx.array(rng.standard_normal((1, 2, 160, dim)).astype(np.float32)), rope=rope)
    return CommVQ(dim, bits, tensor, **options).fit(sample)


@pytest.mark.parametrize(
    ("dim", "bits", "tensor", "rope", "options"),
    [
        (64, 1, "keys", Rope(64), {}),
        (64, 2, "values", None, {"scale": "unbiased"}),
        (80, 1, "keys", Rope(32, traditional=True), {"scale": "norm"}),
        (128, 1, "values", None, {}),
        (256, 1, "keys", Rope(64), {"stages": 2}),  # the largest of eight vectors a threadgroup
        (576, 1, "values", None, {"stages": 1}),  # and of four
    ],
)
def test_codes_are_those_of_the_reference(dim, bits, tensor, rope, options):
    codec = fitted(dim, bits, tensor, rope, **options)
    x = np.random.default_rng(1).standard_normal((2, 9, 2, dim)) * 10.0 ** np.arange(-4, 5)[:, None, None]
    x[1, 3, 1] = 0
    given = mx.array(x.astype(np.float32)).swapaxes(1, 2)  # a strided view
    found, wanted = run_vectors(codec._encoder, HOST, given), codec._encode_by_graph(given)
    assert {name: (a.shape, a.dtype) for name, a in found.items()} == {n: (a.shape, a.dtype) for n, a in wanted.items()}
    same = (found["codes"] == wanted["codes"]).all(axis=-1)
    assert same.sum() >= same.size - 2  # two sums can be equally near within rounding; then later codes differ
    close = mx.abs(found["root_scale"] - wanted["root_scale"]) <= ROUNDING * wanted["root_scale"]
    assert mx.all(close.squeeze(-1) | ~same)
    assert found["root_scale"][1, 1, 3].item() == 0  # a zero vector
    lost, least = (np.nansum(np.array(codec._lost(arrays, given))) for arrays in (found, wanted))
    assert lost <= 1.001 * least


def test_vectors_that_are_not_finite_have_no_finite_scale_and_change_no_other():
    codec = fitted(64, 1, "values", None)
    x = mx.random.normal((1, 2, 5, 64), key=mx.random.key(3))
    wanted = run_vectors(codec._encoder, HOST, x)
    x[0, 1, 2, 7], x[0, 1, 3, 7] = math.nan, math.inf
    found = run_vectors(codec._encoder, HOST, x)
    scale, ours = found["root_scale"].squeeze(-1), mx.arange(10).reshape(1, 2, 5)
    broken = (ours == 7) | (ours == 8)
    assert mx.array_equal(mx.isfinite(scale), ~broken)
    for name, array in wanted.items():
        assert mx.all((found[name] == array).all(axis=-1) | broken)


def test_vectors_too_large_for_threadgroup_memory_have_no_kernel():
    codec = CommVQ(578, 1, "values", stages=1).blank(2)
    assert vectors_key(codec._encoder, HOST, mx.zeros((1, 2, 1, 578))) is None
