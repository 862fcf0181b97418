"""The kernel that searches trellises: its Metal text, run on the CPU by ``metal_on_host``, against its reference."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_on_host import check, run
from tests.metal_on_host.launch import HOST
from tests.test_cuda_text import compiled, kernel_text
from veloxlab.codecs.parts.trellis import TrellisRows, levels_of
from veloxlab.kernels.backend import run_vectors, vectors_source
from veloxlab.kernels.devices import CUDA

MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to read and run Metal on the CPU")

# form, entries, heads, coordinates, bits on average (or the same for all), whether a scale is stored
CASES = [
    ("trellis", 256, 3, 64, 2.25, True),
    ("trellis", 256, 1, 80, 1.25, True),
    ("trellis", 256, 9, 128, 4.25, True),
    ("trellis", 256, 2, 256, 0.2, True),
    ("trellis", 256, 2, 96, (1, 2, 3, 4, 5, 6, 7, 8), False),
    ("trellis", 1024, 3, 64, 2.25, True),
    ("trellis", 1024, 2, 128, (1, 2, 3, 4, 5, 6, 7, 8), True),
    ("scalar", 256, 3, 64, 3.25, True),
    ("scalar", 256, 2, 112, (0, 1, 2, 3, 4, 5, 6, 7, 8), True),
]


def rows_of(code, entries, heads, dim, bits, scaled, seed=0):
    """Return rows of heads with their own decreasing widths, and weights that decrease with them."""
    rng = np.random.default_rng(seed)
    own = np.resize(bits, (heads, dim)) if isinstance(bits, tuple) else np.minimum(8, rng.poisson(bits, (heads, dim)))
    widths = np.sort(own, axis=1)[:, ::-1]
    return TrellisRows(tuple(map(tuple, widths.tolist())), levels_of(code, entries), 4.0**widths, scaled)


@pytest.mark.parametrize(("code", "entries", "heads", "dim", "bits", "scaled"), CASES)
def test_trellis_strings_are_those_of_the_reference(code, entries, heads, dim, bits, scaled):
    rows = rows_of(code, entries, heads, dim, bits, scaled)
    rng = np.random.default_rng(1)
    loud = np.exp(rng.standard_normal((2, 1, 11, heads, 1)))  # outliers
    given = (loud * rng.standard_normal((2, 1, 11, heads, dim))).reshape(2, 1, 11, -1).astype(np.float32)
    given[1, 0, 3] = 0
    x = mx.array(np.concatenate([given, given], axis=-1))[:, :, 1:-1, : heads * dim]  # a strided view
    found, wanted = run_vectors(rows.encoder, HOST, x)["codes"], rows.encode(x)["codes"]
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert (rows.scales(wanted).max().item() > 2) == scaled
    # of two equally near strings either can be found: for a vector of zeros, and within float rounding for others
    of_heads = np.array(x).reshape(2, 9, heads, dim).swapaxes(1, 2)
    costs = [
        (rows.weights[:, None] * np.square(np.array(rows.expand(c)) - of_heads)).sum(axis=-1) for c in (found, wanted)
    ]
    assert np.allclose(*costs, rtol=1e-5)
    same = np.array((rows.expand(found) == rows.expand(wanted)).all(axis=-1))
    assert same[of_heads.any(axis=-1)].mean() > 0.98
    assert mx.array_equal(rows.scales(found), rows.scales(wanted))
    same_rows = np.array((found == wanted).all(axis=-1))  # and no bit is written after the last code
    assert same_rows[np.array(x).any(axis=-1)].mean() > 0.9


def test_all_layers_share_one_kernel():
    x = mx.random.normal((1, 1, 2, 128), key=mx.random.key(1))
    run_vectors(rows_of("trellis", 256, 2, 64, 2.25, True).encoder, HOST, x)
    built = run._compiled.cache_info().misses
    run_vectors(rows_of("trellis", 256, 2, 64, 4.25, True, seed=5).encoder, HOST, x)
    assert run._compiled.cache_info().misses == built


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile CUDA text")
@pytest.mark.parametrize(("code", "entries"), [("trellis", 256), ("trellis", 1024), ("scalar", 256)])
def test_the_cuda_text_compiles(code, entries):
    kernel, x = rows_of(code, entries, 8, 128, 2.25, True).encoder, mx.zeros((1, 1, 2, 1024))
    given = [x, *kernel.tables.values()]
    assert compiled(kernel_text(vectors_source(kernel, CUDA, x), given, [mx.uint32])) == ""
