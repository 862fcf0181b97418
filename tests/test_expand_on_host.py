"""The kernel that decodes for attention of many queries: its Metal text run on the CPU, against codecs."""

import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_on_host import check, run
from tests.metal_on_host.launch import HOST
from tests.test_attention_kernels import normal
from tests.test_cuda_text import compiled, kernel_text
from veloxlab.cache import expand as expanding
from veloxlab.cache.expand import expanded, take_turn
from veloxlab.codecs import METHODS, Code
from veloxlab.codecs.base import Sample
from veloxlab.codecs.none import Exact
from veloxlab.codecs.parts.rope import Rope
from veloxlab.kernels import checked
from veloxlab.kernels.devices import CUDA

MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to check and run Metal text")

TOLERANCE = 1e-3  # levels and results are in half precision, with an error of 2⁻¹¹ each at most


@pytest.fixture
def on_host(monkeypatch):
    """Run kernels on the host; yield the number of launches of each."""
    launched = []

    def built(source):
        launched.append(source.name)
        return HOST.build(source)

    backend = replace(HOST, build=built, lazy=True)
    monkeypatch.setattr(expanding, "current_backend", lambda: backend)
    monkeypatch.setattr(expanding, "device_backend", lambda: backend)
    monkeypatch.setattr(checked, "_states", {})
    return launched


def runs_of(dim, dtype, counts, heads=2):
    """Return runs of exact tokens from the middle of longer buffers."""
    made = [normal(2, heads, count + 5, dim, seed=i, dtype=dtype)[:, :, 2:-3] for i, count in enumerate(counts)]
    return [(Exact(dim), Code({"values": run})) for run in made]


def assert_same(found, parts, dtype, heads, monkeypatch, tolerance=TOLERANCE):
    monkeypatch.setattr(expanding, "current_backend", lambda: None)
    wanted = np.array(expanded(parts, dtype, heads, None).astype(mx.float32))
    found = np.array(found.astype(mx.float32))
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("method", "options", "bits", "dim", "dtype"),
    [
        ("turboquant", {}, 4, 128, mx.float16),
        ("turboquant", {}, 3, 64, mx.float32),
        ("turboquant", {}, 8, 256, mx.bfloat16),
        ("rvq", {}, 4, 64, mx.float16),
        ("rabitq", {"centroid": False}, 2, 128, mx.float16),
        ("ratequant", {"head_bits": (2, 5)}, 3, 128, mx.float16),
        ("polarquant", {}, 3, 128, mx.float16),
    ],
)
def test_one_launch_equals_the_codecs_decoding(method, options, bits, dim, dtype, on_host, monkeypatch):
    codec = METHODS[method].codec(dim, bits, "keys", **options)
    code = codec.encode(normal(2, 2, 601, dim, seed=9), 3)
    (sinks, recent, newest) = runs_of(dim, dtype, (3, 40, 77))
    parts = [sinks, (codec, code), recent, newest]
    heads = slice(None) if not codec.heads_alike else slice(1, 2)
    found = expanded(parts, dtype, heads, mx.array(0.0))
    assert {name.partition("_")[0] for name in on_host} == {"expand"}
    assert_same(found, parts, dtype, heads, monkeypatch)


@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (0, 9)])
def test_runs_of_exact_tokens_can_be_missing(counts, on_host, monkeypatch):
    codec = METHODS["turboquant"].codec(64, 4, "values")
    before, behind = (runs_of(64, mx.float16, (count,)) if count else [] for count in counts)
    parts = [*before, (codec, codec.encode(normal(1, 2, 33, 64, seed=9) * (1 + 9e4 * (counts[0] > 0)))), *behind]
    parts = [(each, Code({n: a[:1] for n, a in code.arrays.items()})) for each, code in parts]
    found = expanded(parts, mx.float16, slice(None), None)
    assert mx.isfinite(found).all()
    assert_same(found, parts, mx.float16, slice(None), monkeypatch)


@pytest.mark.parametrize(("method", "dim"), [("turboquant", 80), ("qjl", 64)])
def test_other_codes_are_decoded_by_their_codecs(method, dim, on_host):
    codec = METHODS[method].codec(dim, 3, "keys")
    code = codec.encode(normal(1, 2, 33, dim, seed=9))
    assert expanded([(codec, code)], mx.float16, slice(None), None).shape == (1, 2, 33, dim)
    assert not [name for name in on_host if name.startswith("expand_")]


def strings(dim, bits, tensor, rope=True, **options):
    """Return a codec of FisherQuant for two heads, about a mean."""
    sample = Sample(
        3 + normal(1, 2, 2 * dim, dim, seed=7) * mx.exp(normal(2, 1, dim, seed=8)),
        rope=Rope(dim) if rope else None,
        gradients=normal(1, 2, 2 * dim, dim, seed=6),
    )
    return METHODS["fisherquant"].codec(dim, bits, tensor, **options).fit(sample)


@pytest.mark.parametrize(
    ("dim", "bits", "tensor", "rope", "options", "dtype"),
    [
        (64, 2.25, "keys", True, {}, mx.float16),
        (64, 2.25, "keys", False, {}, mx.float32),
        (80, 1.25, "keys", True, {"entries": 1024}, mx.bfloat16),
        (128, 4.25, "values", True, {}, mx.float16),
        (96, 7, "values", True, {"code": "scalar"}, mx.float32),
        (256, 3.25, "keys", True, {}, mx.float16),
    ],
)
def test_trellis_strings_become_levels_by_one_launch(dim, bits, tensor, rope, options, dtype, on_host, monkeypatch):
    codec = strings(dim, bits, tensor, rope, **options)
    code = codec.encode(normal(2, 2, 601, dim, seed=9), 3)
    sinks, newest = runs_of(dim, dtype, (3, 77))
    parts = [sinks, (codec, Code(code.arrays, 700)), newest]
    found = expanded(parts, dtype, slice(None), mx.array(0.0))
    assert on_host == ["levels_trellis"]
    assert set(checked.states()) == {"agrees"}
    # in bfloat16 each number of a result has an error of 2⁻⁹ at most
    assert_same(found, parts, dtype, slice(None), monkeypatch, 2 * TOLERANCE if dtype == mx.bfloat16 else TOLERANCE)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile CUDA text")
def test_the_cuda_text_compiles(monkeypatch):
    texts = []

    def built(source):
        def kernel(*, inputs, output_shapes, output_dtypes, **_):
            texts.append(kernel_text(source, inputs, output_dtypes))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return kernel

    monkeypatch.setattr(expanding, "current_backend", lambda: replace(CUDA, build=built, tried=False))
    for method, dim in (("turboquant", 128), ("rvq", 256), ("ratequant", 64), ("polarquant", 32)):
        options = {"head_bits": (2, 5)} if method == "ratequant" else {}
        codec = METHODS[method].codec(dim, 4, "keys", **options)
        expanded([(codec, codec.encode(normal(1, 2, 33, dim, seed=9)))], mx.bfloat16, slice(None), None)
    for tensor, entries in (("keys", 256), ("values", 1024)):
        codec = strings(80, 2.25, tensor, entries=entries)
        expanded([(codec, codec.encode(normal(1, 2, 33, 80, seed=9)))], mx.bfloat16, slice(None), None)
    assert [compiled(text) for text in texts] == [""] * 6


@pytest.mark.parametrize("size", [1, 1 << 30])
def test_at_most_two_layers_hold_expanded_tokens(size, on_host, monkeypatch):
    """With many tokens to expand, a layer begins once the query of the layer before is computed."""
    known = []
    monkeypatch.setattr(mx, "eval", lambda *arrays: known.append(arrays))
    queries = [normal(1, 2, 40, 64, seed=seed) for seed in range(3)]
    for q in queries:
        take_turn(q, size)
    firsts = [float(np.array(q)[0, 0, 0, 0]) for q in queries]
    assert [float(np.array(x)) for (x,) in known[-2:]] == (firsts[:2] if size > 1 else [])
