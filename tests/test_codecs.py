"""The matrix of tests for every algorithm."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import veloxlab as vl
from veloxlab.cache.coming import LARGEST
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs import METHODS, Method, find_method
from veloxlab.codecs.base import TILE, Codec, Sample, empty_code, token_bytes
from veloxlab.codecs.fisherquant import FisherQuant
from veloxlab.codecs.parts.rope import Rope
from veloxlab.codecs.qjl import QJL
from veloxlab.codecs.rabitq import CentredRaBitQ
from veloxlab.errors import InputError

DIMS = [64, 80, 96, 112, 128, 192, 256]
FULL = [64, 80]  # every variant is tested here: a Hadamard transform alone, and one with a Hartley part
FLOAT32 = 2.0**-23
NEXT_TO_NOTHING = 2e-3  # share of the energy at 8 bits: RaBitQ with one scale for all vectors loses half of it


@dataclass(frozen=True, eq=False)
class Variant:
    """A method with some of its options; ``learns`` if they turn a codec without a fit into one that is fitted."""

    method: Method
    options: dict = field(default_factory=dict)
    learns: bool = False

    @property
    def fitted(self) -> bool:
        return self.method.calibrated or self.learns

    @property
    def has_widths(self) -> bool:
        """Whether ``bits`` sets its widths, and not an option."""
        return not {"head_bits", "levels", "point", "stages"} & self.options.keys()

    def __repr__(self) -> str:
        return f"{self.method.id} {self.options}"


def variant(name: str, *, learns: bool = False, **options: object) -> Variant:
    return Variant(find_method(name), options, learns)


PLAIN = {method.id: Variant(method) for method in METHODS.values()}
VARIANTS = [
    *PLAIN.values(),
    variant("turboquant", variant="prod"),
    variant("turboquant", variant="prod", sketch="orthogonal"),
    variant("turboquant", rotation="haar", codebook="gaussian", scale="norm"),
    variant("turboquant", outliers=8, learns=True),
    variant("rvq", variant="refined"),
    variant("rvq", residual="laplacian", codebook="gaussian"),
    variant("vecinfer", point={"keys": "d8b10", "values": "d4b8"}),
    variant("vecinfer", smooth=False, hadamard=False),
    variant("ratequant", head_bits=(2, 5)),
    variant("ratequant", head_bits={"keys": [4, 3]}, variant="prod"),
    variant("spectralquant", basis="query", scale="unbiased"),
    variant("spectralquant", basis="hadamard", centred=False),
    variant("rabitq", bounds=True, encoder="exact"),
    variant("rabitq", encoder="fast", rotation="haar"),
    variant("rabitq", centroid=True, learns=True),
    variant("qjl", sketch="gaussian", levels="ends"),
    variant("qjl", outliers=4, group=24, learns=True),
    variant("polarquant", recursion="full"),
    variant("polarquant", levels=(5, 3), scale="norm", rotation="haar"),
    variant("polarquant", codebook="fitted", learns=True),
    variant("polarquant", codebook="online", learns=True),
    variant("polarquant", codebook="online"),
    variant("commvq", stages=3, scale="unbiased"),
    variant("fisherquant", code="scalar"),
    variant("fisherquant", entries=1024),
    variant("fisherquant", basis="before_rope"),
]


of_each_method = pytest.mark.parametrize("name", METHODS)
at_each_dim = pytest.mark.parametrize("dim", DIMS)


def variants(name: str, dim: int = 64) -> list[Variant]:
    """Return the variants of a method to test at this head dimension."""
    return [each for each in VARIANTS if each.method.id == name and (dim in FULL or not each.options)]


CALIBRATED = [method for method in METHODS.values() if method.calibrated]
KV_HEADS = 2  # of every array that the matrix encodes: a fitted codec can hold one entry per KV head
SAMPLE = 256  # tokens that codecs are fitted to: what SpectralQuant needs at D = 256; enough to work with, too few to
#               be good


def codecs(name: str, dim: int, size: float = 3.0) -> Iterator[Codec]:
    """Yield a method's variants, at few widths, for keys and values; they are fitted to vectors of that ``size``."""
    return (ready(*each, size) for each in settings_of(name, dim, size))


def settings_of(name: str, dim: int, size: float = 3.0) -> Iterator[tuple[Variant, int, int, str]]:
    for each in variants(name, dim):
        bits = each.method.bits
        if each.method.calibrated:  # a fit takes time: two widths, and one for tests with many dimensions
            widths = {bits[0], bits[-1]} if (dim, size) == (64, 3.0) and not each.options else {bits[0]}
        else:
            widths = {bits[len(bits) // 2]} if each.options else {bits[0], bits[len(bits) // 2], bits[-1]}
        yield from ((each, dim, width, role) for width in sorted(widths) for role in ("keys", "values"))


@cache
def ready(each: Variant, dim: int, bits: int, role: str, size: float = 3.0) -> Codec:
    """Return a codec that can encode: fitted once for all tests, if necessary."""
    codec = each.method.codec(dim, bits, role, **each.options)
    return codec.fit(sample(dim, size)) if each.fitted else codec


def sample(dim: int, size: float = 3.0, tokens: int = SAMPLE) -> Sample:
    x, queries = (vectors(1, heads, tokens, dim, seed=7 + heads) for heads in (KV_HEADS, 3 * KV_HEADS))
    return Sample(x / 3 * size, queries, Rope(dim))


def vectors(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(seed)) * 3).astype(dtype)


@of_each_method
@at_each_dim
def test_a_code_has_the_arrays_of_the_layout(dim, name):
    for codec in codecs(name, dim):
        dtype = mx.float16 if codec.bits_per_value == 16 else mx.float32
        code = codec.encode(vectors(2, KV_HEADS, 10, dim, dtype=dtype))
        empty = empty_code(codec, 2, KV_HEADS, dtype)
        assert {name: (a.shape[:2], a.shape[3:], a.dtype) for name, a in code.arrays.items()} == {
            name: (a.shape[:2], a.shape[3:], a.dtype) for name, a in empty.arrays.items()
        }
        assert empty.tokens == 0
        assert sum(token_bytes(codec, KV_HEADS, dtype.size)) * 2 * 10 == code.nbytes
        assert code.nbytes * 8 == pytest.approx(codec.bits_per_value * 2 * KV_HEADS * 10 * dim, rel=1e-12)
        assert code.tokens == 10


@of_each_method
@at_each_dim
def test_more_bits_lose_less_and_eight_lose_next_to_nothing(dim, name):
    x = vectors(1, KV_HEADS, 64, dim)
    for each in variants(name, dim):
        method = each.method
        if not each.has_widths or (method.calibrated and (dim != 64 or each.options)):
            continue  # a fit for each width
        errors = []
        for bits in (method.bits[0], method.bits[-1]) if method.calibrated else method.bits:
            codec = ready(each, dim, bits, "values")
            errors.append(mx.square(codec.decode(codec.encode(x)) - x).mean().item())
        assert errors == sorted(errors, reverse=True)
        if not method.calibrated and method.bits[-1] >= 8:
            assert errors[-1] < NEXT_TO_NOTHING * mx.square(x).mean().item()


TOKENS = [0, 1, 33, TILE, TILE + 5]


@of_each_method
@pytest.mark.parametrize(
    ("dim", "tokens"), [(64, n) for n in TOKENS] + [(80, n) for n in (0, 1, 40)] + [(d, 40) for d in DIMS[2:]]
)
def test_scores_and_mix_are_decode_then_matmul(dim, tokens, name):
    batch, kv_heads, group, queries = (2 if tokens < TILE else 1), KV_HEADS, 3, 2
    for codec in codecs(name, dim):
        code = codec.encode(vectors(batch, kv_heads, tokens, dim))
        exact = codec.decode(code)
        q = vectors(batch, kv_heads * group, queries, dim, seed=1)
        grouped = q.reshape(batch, kv_heads, group * queries, dim)
        expected = (grouped @ exact.swapaxes(-1, -2)).reshape(batch, kv_heads * group, queries, tokens)
        scores = codec.scores(q, code)
        assert scores.shape == expected.shape
        assert scores.dtype == mx.float32
        p = mx.softmax(vectors(batch, kv_heads * group, queries, tokens, seed=2), axis=-1) if tokens else scores
        mixed, expected_mix = codec.mix(p, code), (p.reshape(batch, kv_heads, group * queries, tokens) @ exact)
        assert mixed.shape == q.shape
        if not tokens:
            assert not mixed.any()
            continue
        # the same float32 sums in another order, of rotated or original numbers: 2.2 and 1.8 steps measured
        step = 8 * FLOAT32 * mx.linalg.norm(exact, axis=-1).max().item()
        assert np.allclose(scores, expected, rtol=0, atol=step * mx.linalg.norm(q, axis=-1).max().item()), codec
        assert np.allclose(mixed, expected_mix.reshape(q.shape), rtol=0, atol=step), codec


DTYPES = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}  # half a step of each, relative


@of_each_method
@pytest.mark.parametrize(
    ("dim", "dtype"), [(d, t) for d in FULL for t in DTYPES] + list(zip(DIMS[2:], cycle(DTYPES))), ids=str
)
def test_attention_over_any_head_dimension_and_dtype(dim, dtype, name):
    """Values of another dimension than keys: the result is softmax over the held tokens, in the input's dtype."""
    value_dim = DIMS[DIMS.index(dim) - 1]
    for each in variants(name, dim):
        codecs = (ready(each, d, each.method.bits[0], r) for d, r in ((dim, "keys"), (value_dim, "values")))
        for tokens in (0, 1, 40):
            cache = CompressedKVCache(*codecs, sinks=0, window=0, chunk="codes")
            x = (vectors(1, KV_HEADS, tokens, d, seed=d, dtype=dtype) for d in (dim, value_dim))
            history, _ = cache.update_and_fetch(*x)
            codecs = cache.key_codec, cache.value_codec  # type: ignore[assignment]
            assert cache.offset == tokens
            if not tokens:
                assert cache.nbytes == 0
                continue
            q = vectors(1, 3 * KV_HEADS, 1, dim, seed=1, dtype=dtype)
            answer = history.attend(q, dim**-0.5, None)
            assert answer.dtype == dtype
            keys, values = cache.decoded()
            assert (keys.shape[-1], values.shape[-1]) == (dim, value_dim)
            exact = mx.fast.scaled_dot_product_attention(q.astype(mx.float32), keys, values, scale=dim**-0.5, mask=None)
            # a score is accurate to 8 steps as above, so a weight to twice that, relative
            largest = (mx.linalg.norm(x, axis=-1).max().item() for x in (q.astype(mx.float32), keys))
            off = 16 * FLOAT32 * math.prod(largest) * dim**-0.5 + DTYPES[dtype]
            assert mx.allclose(answer.astype(mx.float32), exact, rtol=0, atol=off * mx.abs(values).max().item()), each


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    cut=st.integers(0, 40),
    seed=st.integers(0, 1000),
    each=st.sampled_from(VARIANTS),
    width=st.integers(0, 7),
)
def test_a_slice_of_a_code_is_the_code_of_the_slice(tokens, cut, seed, each, width):
    """Each vector is coded separately: so a cache can append, trim and tile."""
    bits = each.method.bits[:1] if each.method.calibrated else each.method.bits
    codec = ready(each, 64, bits[width % len(bits)], "keys")
    x = vectors(1, KV_HEADS, tokens, 64, seed=seed)
    whole, part = codec.encode(x)[cut:], codec.encode(x[:, :, cut:], cut)
    assert whole.arrays.keys() == part.arrays.keys()
    assert whole.start == part.start
    for array in whole.arrays:
        # bits may differ if a sum of the transform rounds differently for another number of rows
        same = np.array(whole.arrays[array]) == np.array(part.arrays[array])
        assert same.mean() > 0.99 if same.size else True


@of_each_method
def test_encoding_twice_gives_the_same_code(name):
    x = vectors(1, KV_HEADS, 50, 80)
    for codec in codecs(name, 80):
        first, second = codec.encode(x), codec.encode(x)
        assert all(mx.array_equal(first.arrays[n], second.arrays[n]) for n in first.arrays)


@of_each_method
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_any_float_dtype_is_accepted(dtype, name):
    x = vectors(1, KV_HEADS, 20, 64, dtype=dtype)
    for codec in codecs(name, 64):
        same = codec.decode(codec.encode(x)), codec.decode(codec.encode(x.astype(mx.float32)))
        assert mx.array_equal(*(decoded.astype(dtype) for decoded in same))
        # eight signs for each coordinate estimate inner products well, and restore the vector itself to 7 %
        if codec.bits_per_value > 8 and not isinstance(codec, QJL):
            error = codec.decode(codec.encode(x)).astype(mx.float32) - x.astype(mx.float32)
            assert mx.square(error).mean().item() < NEXT_TO_NOTHING * mx.square(x.astype(mx.float32)).mean().item()


@of_each_method
@pytest.mark.parametrize("size", [1e-8, 1e-3, 1e5, LARGEST])
def test_scales_neither_overflow_nor_vanish(size, name):
    """Vectors of any size have the loss of size 3: Gaussian ones, and some of the largest that a cache accepts."""
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (1, KV_HEADS, 8, 64))
    x = mx.concatenate([vectors(1, KV_HEADS, 8, 64) / 3, mx.array(signs.astype(np.float32))], axis=2)

    def lost(codec: Codec, size: float) -> float:
        return (mx.square(codec.decode(codec.encode(x * size)) / size - x).sum() / mx.square(x).sum()).item()

    # float16 rounds the root of a scale to 2^-12, and so the scale to 2^-11: 2e-7 of the energy, and up to twenty times
    # that if a group stores only its ends. Different rounding of a codebook's sample changes it by 3 %. At 1e-8 a step
    # of a 256th has a root of 6e-6, of which float16 holds only every hundredth: 8 bits lose up to 29 % more
    share, rounding = (0.3 if size == 1e-8 else 0.04), 5e-6
    for each in settings_of(name, 64, size):
        usual = lost(ready(*each), 3.0)
        assert lost(ready(*each, size), size) == pytest.approx(usual, rel=share, abs=rounding), each


@of_each_method
def test_a_zero_vector_decodes_to_zero(name):
    for codec in codecs(name, 64):
        if not isinstance(codec, CentredRaBitQ | FisherQuant):  # codes the difference from a mean
            assert not codec.decode(codec.encode(mx.zeros((1, KV_HEADS, 3, 64)))).any()


@of_each_method
def test_codecs_without_a_calibration_are_values(name):
    """Equal settings give equal codecs, copies cost nothing, and ``fit`` returns the codec itself."""
    for each in variants(name):
        if not each.fitted:
            first, second = (each.method.codec(64, each.method.bits[0], "keys", **each.options) for _ in range(2))
            assert first == second
            assert hash(first) == hash(second)
            assert copy.deepcopy(first) == first
            # except for one that a cache fits
            assert (first.fit(Sample(vectors(1, 1, 40, 64))) is first) != first.online


@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: method.id)
def test_a_calibrated_method_refuses_to_encode_unfitted_and_needs_a_varied_sample(method, role):
    codec = method.codec(64, method.bits[0], role)
    with pytest.raises(InputError, match="calibrate"):
        codec.encode(vectors(1, KV_HEADS, 4, 64))
    for tokens in (0, 1, 4):
        with pytest.raises(InputError, match="tokens"):
            codec.fit(sample(64, tokens=tokens))
    same = mx.broadcast_to(vectors(1, KV_HEADS, 1, 64), (1, KV_HEADS, SAMPLE, 64))
    same = same if role == "values" else mx.zeros_like(same)  # keys that are the same with and without RoPE
    with pytest.raises(InputError, match="tokens"):
        codec.fit(Sample(same, vectors(1, KV_HEADS, SAMPLE, 64), Rope(64)))


@of_each_method
def test_a_blank_codec_is_as_large_as_a_fitted_one(name):
    for each, dim, bits, role in settings_of(name, 64):
        blank = each.method.codec(dim, bits, role, **each.options).blank(KV_HEADS)
        assert blank.layout == ready(each, dim, bits, role).layout
        if name not in ("spectralquant", "polarquant"):  # their learned tables are larger than the default ones
            assert blank.shared_bytes == ready(each, dim, bits, role).shared_bytes, each


@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: method.id)
def test_fitting_twice_gives_the_same_codec(method, role):
    x = vectors(1, KV_HEADS, 50, 64)
    first = ready(PLAIN[method.id], 64, method.bits[0], role)
    second = method.codec(64, method.bits[0], role).fit(sample(64))
    codes = first.encode(x), second.encode(x)
    assert all(mx.array_equal(codes[0].arrays[n], codes[1].arrays[n]) for n in codes[0].arrays)


@of_each_method
def test_a_wrong_head_dimension_is_refused(name):
    for codec in codecs(name, 64):
        with pytest.raises(InputError, match=r"heads of dimension 64.*was given \[1, 2, 3, 80\]"):
            codec.encode(vectors(1, 2, 3, 80))


def test_unknown_methods_options_and_widths_are_named_with_the_known_ones():
    with pytest.raises(InputError, match=f"Unknown method 'turbo'. Known methods: {', '.join(METHODS)}"):
        find_method("turbo")
    with pytest.raises(InputError, match="TurboQuant has no option 'rotate'. Its options are: variant, scale"):
        find_method("turboquant").codec(64, 4, "keys", rotate="haar")
    for bits in (0, 9, 2.5, True):
        with pytest.raises(InputError, match=r"Keys at bits=.* from 1 to 8"):
            find_method("turboquant").codec(64, bits, "keys")


def test_methods_lists_the_registry():
    frame = vl.methods()
    assert frame["id"].to_list() == list(METHODS)
    assert frame.filter(id="turboquant").select("least_bits", "most_bits").row(0) == (1, 8)
