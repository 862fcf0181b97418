"""Readers, which codecs give to kernels, expand to the codec's vectors, for every algorithm with a reader."""

import mlx.core as mx
import pytest

from tests.reading import expand
from veloxlab.codecs import METHODS
from veloxlab.codecs.base import Code, Sample
from veloxlab.codecs.parts.rope import Rope
from veloxlab.kernels.readers import Reader

DIM, HEADS = 64, 3
ROPE = Rope(DIM)

# options of every algorithm that change the stored arrays; a missing algorithm fails below
OPTIONS = {
    "turboquant": [{}, {"rotation": "haar"}],
    "rvq": [{}, {"variant": "refined"}, {"rotation": "haar"}],
    "vecinfer": [{}, {"point": "d8b12"}],
    "ratequant": [{}, {"head_bits": (3, 2, 4)}, {"head_bits": (8, 1, 5)}, {"head_bits": (3, 3, 3), "rotation": "haar"}],
    "spectralquant": [{}, {"basis": "query"}, {"basis": "hadamard", "centred": False}],
    "rabitq": [{}, {"bounds": True, "scale": "unbiased"}, {"centroid": True}, {"centroid": True, "rotation": "haar"}],
    "qjl": [{}, {"levels": "ends", "group": 24}],
    "polarquant": [
        *({}, {"recursion": "full"}, {"rotation": "haar"}, {"codebook": "fitted"}, {"levels": (2, 2)}),
        {"recursion": "full", "codebook": "online"},
        {"levels": (8, 3, 8)},
    ],
    "commvq": [{}],
    "fisherquant": [{}, {"code": "scalar"}, {"entries": 1024}],
    "none": [],
}
# codes without a kernel: MLX operations read them
WITHOUT = {
    "turboquant": [{"variant": "prod"}, {"outliers": 8}],
    "rvq": [],
    "vecinfer": [{"point": "d1b4"}],
    "ratequant": [{"head_bits": (3, 2, 4), "variant": "prod"}],
    "spectralquant": [],
    "rabitq": [],
    "qjl": [{"outliers": 4}],
    "polarquant": [{"levels": (4, 3, 2, 1)}],
    "commvq": [],
    "fisherquant": [],
    "none": [{}],
}


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def fitted(method, options, tensor, bits):
    codec = METHODS[method].build(DIM, bits, tensor, **options)
    uneven = mx.exp(normal(HEADS, 1, DIM, seed=8))  # channels differ, as in models
    x = normal(1, HEADS, 1024, DIM, seed=7) * uneven + normal(1, HEADS, 1, DIM, seed=6)
    return codec.fit(Sample(x, queries=normal(1, 2 * HEADS, 1024, DIM, seed=9), rope=ROPE))


def cases(table):
    return [
        pytest.param(method, given, tensor, id=f"{method}-{tensor}-{given}")
        for method, options in table.items()
        for given in options
        for tensor in ("keys", "values")
        if not (method == "qjl" and tensor == "values" and "outliers" in given)  # an option of keys only
    ]


def in_a_buffer(code):
    """Return the code as a cache holds it: views of larger buffers."""
    padded = {n: mx.pad(a, [(0, 0), (0, 0), (3, 5), (0, 0)])[:, :, 3:-5] for n, a in code.arrays.items()}
    return Code(padded, code.start)


@pytest.mark.parametrize(("method", "options", "tensor"), cases(OPTIONS))
def test_a_reader_expands_to_its_codec_s_vectors(method, options, tensor):
    widths = METHODS[method].bits
    for bits in sorted({widths[0], widths[len(widths) // 2], widths[-1]}) if "head_bits" not in options else [4]:
        codec = fitted(method, options, tensor, bits)
        code = in_a_buffer(codec.encode(normal(2, HEADS, 21, DIM), start=13))
        reader = codec.reader(code)
        assert isinstance(reader, Reader)
        assert (reader.tokens, reader.kv_heads) == (21, HEADS)
        scales = codec.scales(code)
        wanted = codec.expand(code) if scales is None else codec.expand(code) * scales
        assert expand(reader).shape == wanted.shape == (2, HEADS, 21, codec.code_dim)
        assert mx.allclose(expand(reader), wanted, rtol=1e-5, atol=1e-5 * float(mx.abs(wanted).max().item()))


@pytest.mark.parametrize(("method", "options", "tensor"), cases(WITHOUT))
def test_codes_without_a_kernel_are_listed(method, options, tensor):
    codec = fitted(method, options, tensor, METHODS[method].bits[1])
    code = codec.encode(normal(1, HEADS, 21, DIM))
    assert codec.reader(code) is None


def test_every_algorithm_is_listed():
    assert list(OPTIONS) == list(WITHOUT) == list(METHODS)
