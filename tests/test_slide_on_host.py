"""The kernel that moves a window on when a block leaves it: its Metal text run on the CPU, against MLX operations."""

import math
import shutil
from dataclasses import replace
from itertools import chain

import mlx.core as mx
import pytest

from tests.metal_on_host import check, run
from tests.metal_on_host.launch import HOST
from tests.test_attention_kernels import normal
from tests.test_cuda_text import compiled, kernel_text
from veloxlab.cache import coming, counts, layer, past
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.errors import InputError
from veloxlab.kernels import checked
from veloxlab.kernels.devices import CUDA
from veloxlab.kernels.slide import _source, by_operations, slid

MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to check and run Metal text")

GPU = replace(HOST, lazy=True)
DIM = 32


@pytest.fixture(autouse=True)
def _no_states(monkeypatch):
    monkeypatch.setattr(checked, "_states", {})


def window(dim, dtype, seed=0):
    """A window of 20 tokens in the middle of a longer buffer."""
    return normal(2, 3, 26, dim, seed=seed, dtype=dtype)[:, :, 2:-4]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize(("oldest", "tokens", "room"), [(8, 20, 20), (1, 18, 30), (20, 20, 4)])
def test_the_next_window_and_magnitudes_are_those_of_operations(dtype, oldest, tokens, room):
    windows = window(64, dtype), window(DIM, dtype, seed=3)
    found, wanted = slid(windows, oldest, tokens, room, GPU), by_operations(windows, oldest, tokens, room)
    for one, other in zip([*found.windows, *found.largest], [*wanted.windows, *wanted.largest], strict=True):
        assert one.dtype == other.dtype
        assert mx.array_equal(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_number_is_seen_only_in_its_sequence_and_tensor(bad):
    keys, values = window(DIM, mx.float16), window(DIM, mx.float16, seed=3)
    values[1, 2, 7, 5] = bad
    of_keys, of_values = slid((keys, values), 8, 20, 20, GPU).largest
    assert mx.isfinite(of_keys).all()
    assert mx.isfinite(of_values).tolist() == [True, False]
    assert mx.isfinite(mx.stack(slid((keys, values), 7, 20, 20, GPU).largest)).all()  # it stays


def decoded(monkeypatch, backend, tokens=150):
    """Yield a cache after each token; one call of a prompt comes first. ``backend`` None is a GPU without kernels."""
    monkeypatch.setattr(layer, "current_backend", lambda: backend)
    for module in (coming, counts, past, checked):
        monkeypatch.setattr(module, "device_backend", lambda: GPU)
    cache = CompressedKVCache(TurboQuant(DIM, 4), TurboQuant(DIM, 3, "mse"), layer=2)
    cache.update_and_fetch(*[normal(1, 2, 100, DIM, seed=i) for i in range(2)])
    for i in range(tokens):
        cache.update_and_fetch(*[normal(1, 2, 1, DIM, seed=10 + 2 * i + j) for j in range(2)])
        yield cache


def content(cache):
    """Tokens, room and used parts of buffers, of each run."""
    arrays = ([mx.array(x[:, :, : part.tokens]) for x in part.buffers.values()] for part in cache.runs)
    return [(part.tokens, part.room, own) for part, own in zip(cache.runs, arrays, strict=True)]


def test_a_cache_holds_the_same_with_the_kernel_and_without(monkeypatch):
    with monkeypatch.context() as first:
        with_kernel = [content(cache) for cache in decoded(first, GPU)]
    assert any(key[0] == "slide" for key in checked._states if isinstance(key, tuple))
    without = (content(cache) for cache in decoded(monkeypatch, None))
    for own, other in zip(chain(*with_kernel), chain(*without), strict=True):
        assert own[:2] == other[:2]
        for one, reference in zip(own[2], other[2], strict=True):
            assert mx.array_equal(one, reference)


def test_a_bad_token_is_told_when_its_block_leaves(monkeypatch):
    caches = decoded(monkeypatch, GPU, tokens=10**6)
    for _ in range(3):
        cache = next(caches)
    cache.recent.buffers["values/values"][0, 0, 5, 0] = math.nan
    with pytest.raises(InputError, match="Layer 2: the values of a token are NaN"):
        for _ in zip(range(2 * 32), caches, strict=False):
            pass


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile CUDA text")
def test_its_text_is_cuda():
    made = _source(mx.float16, mx.bfloat16, 64, 128, 95, CUDA)
    given = [mx.zeros((1, 1, 1, 16), dtype) for dtype in (mx.float16, mx.bfloat16, mx.uint32)]
    assert not compiled(kernel_text(made, given, [mx.float16, mx.bfloat16, mx.float32, mx.float32]))
