"""Attention over a history through GPU kernels, run on the CPU, against the result of MLX operations."""

import itertools
import math
import shutil
from dataclasses import replace
from functools import cache

import mlx.core as mx
import pytest
from mlx_lm.models.base import create_causal_mask

from tests.metal_on_host.launch import HOST, built
from veloxlab.cache import attention
from veloxlab.cache.attention import History
from veloxlab.cache.counts import BLOCK
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.past import Segment
from veloxlab.codecs import METHODS, TENSORS, ratequant
from veloxlab.codecs.base import Code, Sample
from veloxlab.codecs.none import Exact
from veloxlab.codecs.parts import transforms
from veloxlab.codecs.parts.rope import Rope
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.kernels import attend, backend, checked, devices

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("clang-16")), reason="kernels run here through g++ and clang-16"
)

# The harness multiplies in float32 but keeps weights in half precision, as the kernel does: an error of 2⁻¹¹ each,
# which is less on average over hundreds of tokens
TOLERANCE = 5e-4
DIM = 64


@pytest.fixture(autouse=True)
def kernels_on_the_host(monkeypatch):
    monkeypatch.setattr(attention, "current_backend", lambda: HOST)
    monkeypatch.setattr(checked, "current_backend", lambda: None)  # so that no other kernel is counted
    monkeypatch.setattr(checked, "has_loops", lambda: False)
    monkeypatch.setattr(checked, "_states", {})
    monkeypatch.setattr(attend, "_KERNELS", {})


def normal(*shape, seed=0, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def history(key_codec, value_codec, *, packed=150, sinks=4, recent=20, heads=2, dtype=mx.float32) -> History:
    def segment(codecs, tokens, seed):
        keys = normal(1, heads, tokens, codecs[0].head_dim, seed=seed, dtype=dtype)
        values = normal(1, heads, tokens, codecs[1].head_dim, seed=seed + 1, dtype=dtype)
        return Segment(codecs[0], codecs[0].encode(keys), codecs[1], codecs[1].encode(values))

    exact = Exact(key_codec.head_dim), Exact(value_codec.head_dim)
    segments = [segment((key_codec, value_codec), packed, 20)]
    if sinks:
        segments.insert(0, segment(exact, sinks, 10))
    if recent:
        segments.append(segment(exact, recent, 30))
    return History(tuple(segments))


def relative(x, wanted):
    return float((mx.linalg.norm(x.astype(mx.float32) - wanted) / mx.linalg.norm(wanted)).item())


def both(h: History, q, mask=None, sinks=None, cap=None):
    """Return the results of the kernel and of graph operations."""
    scale = 1 / math.sqrt(q.shape[-1])
    in_graph = h._attend_codes(q.astype(mx.float32), scale, mask, sinks, cap)
    return h._attend_in_kernel(q, scale, mask, sinks, cap), in_graph


@pytest.mark.parametrize("cap", [0.5, 50.0])
def test_a_kernel_caps_logits(cap):
    """The first call, which prepares, and the next; a later call without a cap is not prepared."""
    h = history(METHODS["turboquant"].codec(DIM, 4, "keys"), METHODS["turboquant"].codec(DIM, 4, "values"))
    q = normal(1, 4, 1, DIM) * 5
    free = both(h, q)[1]
    for _ in range(2):
        in_kernel, in_graph = both(h, q, cap=cap)
        assert relative(in_kernel, in_graph) < TOLERANCE
    assert cap > 10 or relative(in_graph, free) > 0.1
    assert relative(both(h, q)[0], free) < TOLERANCE


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        *(("turboquant", 2), ("turboquant", 3), ("turboquant", 6), ("ratequant", 4), ("rabitq", 1), ("rabitq", 4)),
        *(("polarquant", 2), ("polarquant", 4), ("polarquant", 8)),
        *(("qjl", 1), ("qjl", 3), ("rvq", 2), ("rvq", 4), ("rvq", 8)),
    ],
)
def test_a_kernel_reads_what_a_codec_wrote(method, bits):
    h = history(METHODS[method].codec(DIM, bits, "keys"), METHODS[method].codec(DIM, bits, "values"))
    in_kernel, in_graph = both(h, normal(1, 4, 1, DIM))
    assert relative(in_kernel, in_graph) < TOLERANCE


@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
def test_a_kernel_reads_heads_of_several_widths(rotation):
    keys = ratequant.build(DIM, 3, "keys", head_bits=(4, 2, 3, 2), rotation=rotation)
    values = ratequant.build(DIM, 3, "values", head_bits=(2, 3, 3, 6), rotation=rotation)
    in_kernel, in_graph = both(history(keys, values, heads=4), normal(1, 8, 1, DIM))
    assert relative(in_kernel, in_graph) < TOLERANCE
    assert checked.states() == {"agrees": 1}


def test_layers_with_other_widths_take_the_same_kernel():
    for widths in ((4, 2), (1, 3), (2, 2)):
        codecs = (ratequant.build(DIM, 3, tensor, head_bits=widths) for tensor in ("keys", "values"))
        in_kernel, in_graph = both(history(*codecs), normal(1, 4, 1, DIM))
        assert relative(in_kernel, in_graph) < TOLERANCE
    assert checked.states() == {"agrees": 1}


def test_layers_with_other_plans_take_the_same_kernel():
    for seed in (1, 2):
        uneven = mx.exp(normal(2, 1, DIM, seed=seed))
        sample = Sample(normal(1, 2, 1024, DIM, seed=7) * uneven + 1)
        codecs = [METHODS["spectralquant"].codec(DIM, 3, tensor).fit(sample) for tensor in ("keys", "values")]
        in_kernel, in_graph = both(history(*codecs), normal(1, 4, 1, DIM))
        assert relative(in_kernel, in_graph) < TOLERANCE
    assert checked.states() == {"agrees": 1}


def test_keys_and_values_can_differ_in_codec_and_dimension():
    keys, values = METHODS["qjl"].codec(DIM, 2, "keys"), TurboQuant(128, 4, "mse")
    in_kernel, in_graph = both(history(keys, values), normal(1, 4, 1, DIM))
    assert relative(in_kernel, in_graph) < TOLERANCE


@cache
def fitted(method):
    """Return codecs of keys and values at 2 bits."""
    sample = Sample(normal(1, 2, 2048, DIM, seed=7))
    return [METHODS[method].codec(DIM, 2, tensor).fit(sample) for tensor in ("keys", "values")]


def test_a_kernel_reads_codebooks_of_vectors():
    keys, values = fitted("vecinfer")
    in_kernel, in_graph = both(history(keys, values), normal(1, 4, 1, DIM))
    assert relative(in_kernel, in_graph) < TOLERANCE


def test_a_kernel_reads_codes_of_differences_from_a_mean():
    sample = Sample(normal(1, 2, 256, DIM, seed=7) + 2)
    keys, values = (METHODS["rabitq"].codec(DIM, 4, tensor, centroid=True).fit(sample) for tensor in ("keys", "values"))
    in_kernel, in_graph = both(history(keys, values), normal(1, 4, 1, DIM))
    assert relative(in_kernel, in_graph) < TOLERANCE
    assert checked.states() == {"agrees": 1}


@pytest.mark.parametrize(
    "rope",
    [Rope(DIM), Rope(DIM // 2, traditional=True), Rope(40, base=None, freqs=mx.arange(1, 21) * 3.0, scale=0.5)],
    ids=["halves", "neighbours", "some"],
)
def test_a_kernel_reads_sums_of_entries_that_rope_rotates(rope):
    sample = Sample(normal(1, 2, 256, DIM, seed=7), rope=rope)
    keys, values = (METHODS["commvq"].codec(DIM, 1, tensor).fit(sample) for tensor in ("keys", "values"))
    h = history(keys, values)
    moved = tuple(replace(s, keys=replace(s.keys, start=1000 + 4 * i)) for i, s in enumerate(h.segments))
    in_kernel, in_graph = both(History(moved), normal(1, 4, 1, DIM))
    assert relative(in_kernel, in_graph) < TOLERANCE
    assert checked.states() == {"agrees": 1}


ROPES = {
    "halves": Rope(DIM),
    "neighbours": Rope(DIM // 2, traditional=True),
    "some": Rope(40, base=None, freqs=mx.arange(1, 21) * 3.0, scale=0.5),
    "none": None,
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("options", [{}, {"entries": 1024}, {"code": "scalar"}], ids=str)
def test_a_kernel_reads_trellis_codes_about_means_before_rope(rope, options):
    x = 3 + normal(1, 2, 256, DIM, seed=7) * mx.exp(normal(2, 1, DIM, seed=8))
    sample = Sample(x, rope=rope, gradients=normal(1, 2, 256, DIM, seed=9))
    keys, values = (METHODS["fisherquant"].codec(DIM, 2.25, tensor, **options).fit(sample) for tensor in TENSORS)
    h = history(keys, values)
    moved = tuple(replace(s, keys=replace(s.keys, start=1000 + 4 * i)) for i, s in enumerate(h.segments))
    in_kernel, in_graph = both(History(moved), normal(1, 4, 1, DIM))
    assert relative(in_kernel, in_graph) < TOLERANCE
    in_kernel, in_graph = both(
        History(moved), normal(1, 6, 3, DIM), create_causal_mask(3, h.tokens - 3, window_size=40)
    )
    assert relative(in_kernel, in_graph) < TOLERANCE
    assert checked.states() == {"agrees": 2}


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_a_kernel_reads_for_several_queries_with_a_mask(mask):
    h = history(TurboQuant(DIM, 4), TurboQuant(DIM, 4, "mse"))
    q = normal(1, 6, 3, DIM)
    of_window = create_causal_mask(3, h.tokens - 3, window_size=40)
    in_kernel, in_graph = both(h, q, mask if mask == "causal" else of_window)
    assert relative(in_kernel, in_graph) < TOLERANCE


@pytest.mark.parametrize("method", ["turboquant", "vecinfer"])  # values in the kernel's space, and outside of it
def test_attention_sinks_take_their_share(method):
    h = history(*fitted(method))
    q, logits = normal(1, 4, 1, DIM), mx.array([-1.0, 2.0, 4.0, 6.0])
    in_kernel, in_graph = both(h, q, sinks=logits)
    assert relative(in_kernel, in_graph) < TOLERANCE
    assert relative(in_kernel, both(h, q)[1]) > 0.1


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (4, 0), (0, 20)])
def test_exact_tokens_can_be_missing(sinks, recent):
    h = history(TurboQuant(DIM, 4), TurboQuant(DIM, 4, "mse"), sinks=sinks, recent=recent)
    in_kernel, in_graph = both(h, normal(1, 2, 1, DIM))
    assert relative(in_kernel, in_graph) < TOLERANCE


@pytest.mark.parametrize("method", ["turboquant", "qjl", "polarquant"])  # with scales, steps and radii of each token
def test_a_kernel_reads_even_a_few_packed_tokens(method):
    codecs = [METHODS[method].codec(DIM, 4, tensor) for tensor in ("keys", "values")]
    for packed in (1, 7):
        in_kernel, in_graph = both(history(*codecs, packed=packed, heads=1), normal(1, 2, 1, DIM))
        assert relative(in_kernel, in_graph) < TOLERANCE


def test_half_precision_is_kept():
    h = history(TurboQuant(DIM, 4), TurboQuant(DIM, 4, "mse"), dtype=mx.float16)
    in_kernel, in_graph = both(h, normal(1, 4, 1, DIM, dtype=mx.float16))
    assert in_kernel.dtype == mx.float16
    assert relative(in_kernel, in_graph) < 2e-3  # the result is rounded to half precision, 2⁻¹¹ of each number


def test_a_codec_without_a_kernel_uses_graph_ops():
    h = history(*(METHODS["turboquant"].codec(DIM, 4, tensor, variant="prod") for tensor in ("keys", "values")))
    assert h._attend_in_kernel(normal(1, 4, 1, DIM), 1.0, None) is None


def test_a_kernel_that_disagrees_with_its_reference_is_switched_off_with_one_warning(monkeypatch):
    h = history(TurboQuant(DIM, 4), TurboQuant(DIM, 4, "mse"))
    right, wrong_by = backend.built, 1.01
    monkeypatch.setattr(
        attend,
        "built",
        lambda source, backend: lambda **given: [x * wrong_by for x in right(source, backend)(**given)],
    )
    q = normal(1, 4, 1, DIM)
    with pytest.warns(UserWarning, match="is switched off on this metal device: it differs from its reference by 0.01"):
        wrong = h.attend(q, 0.125, None)
    assert mx.array_equal(wrong, h.attend(q, 0.125, None))  # a second warning would be an error
    assert mx.array_equal(wrong, h._attend_codes(q, 0.125, None))
    assert checked.states() == {"it differs from its reference by 0.01": 1}


def test_a_kernel_that_does_not_compile_is_switched_off_with_one_warning(monkeypatch):
    def refuse(_):
        raise RuntimeError("program_source:12:3: error: use of undeclared identifier")

    monkeypatch.setattr(attention, "current_backend", lambda: replace(HOST, build=refuse))
    h = history(TurboQuant(DIM, 4), TurboQuant(DIM, 4, "mse"))
    with pytest.warns(UserWarning, match="it does not run .program_source:12:3: error: use of undeclared identifier"):
        h.attend(normal(1, 4, 1, DIM), 0.125, None)


def test_the_switch_forbids_kernels(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(devices.runtime, "backend", lambda: "cuda")  # type: ignore[attr-defined]
    assert devices.current_backend() is devices.CUDA
    monkeypatch.setenv("VELOXLAB_KERNELS", "0")
    assert devices.current_backend() is None


def test_the_kernel_of_codebook_search_agrees_with_its_reference(monkeypatch):
    codec, _ = fitted("vecinfer")
    x = normal(1, 2, 33, DIM, seed=8)
    assert on_the_host(monkeypatch) == []
    in_kernel = codec.encode(x).arrays["indices"]
    on_a_cpu(monkeypatch)
    assert mx.array_equal(in_kernel, codec.encode(x).arrays["indices"])
    assert checked.states() == {"agrees": 1}


def test_a_codebook_search_that_errs_is_switched_off(monkeypatch):
    codec, _ = fitted("vecinfer")
    on_the_host(monkeypatch)
    wrong_by(monkeypatch, lambda name, array: mx.zeros_like(array))
    with pytest.warns(UserWarning, match="The kernel assign is switched off .* other packed than its reference"):
        codec.encode(normal(1, 2, 33, DIM, seed=8))


def on_the_host(monkeypatch):
    """Let codecs encode and decode by kernels; yield the names of launched kernels."""
    names = []

    def counted(source):
        kernel = built(source)
        return lambda **given: names.append(source.name) or kernel(**given)

    backend = replace(HOST, build=counted)
    monkeypatch.setattr(checked, "current_backend", lambda: backend)
    return names


def on_a_cpu(monkeypatch):
    monkeypatch.setattr(checked, "current_backend", lambda: None)


def wrong_by(monkeypatch, change):
    """Let ``change`` alter all outputs of kernels of vectors, each a named array."""
    right = backend.run_vectors

    def wrong(*given):
        return {name: change(name, array).astype(array.dtype) for name, array in right(*given).items()}

    monkeypatch.setattr(checked, "run_vectors", wrong)


ONE_LAUNCH = [
    *(TurboQuant(80, 3, scale) for scale in ("unbiased", "mse", "norm")),
    *(METHODS["rabitq"].codec(80, bits, tensor) for bits, tensor in ((1, "keys"), (4, "values"), (8, "keys"))),
    METHODS["rabitq"].codec(80, 5, "keys", encoder="fast"),
    METHODS["rabitq"].codec(80, 2, "keys", bounds=True),
    METHODS["rabitq"].codec(80, 3, "keys", centroid=True).fit(Sample(normal(1, 2, 40, 80))),
    *(METHODS["rvq"].codec(80, bits, "keys") for bits in (2, 8)),
    METHODS["rvq"].codec(80, 4, "values", variant="refined"),
]


@pytest.mark.parametrize("codec", ONE_LAUNCH, ids=lambda c: f"{type(c).__name__}-{c.bits}bit-{c.scale}")
def test_vectors_are_encoded_by_one_launch_as_by_the_reference(monkeypatch, codec):
    names = on_the_host(monkeypatch)
    x = normal(1, 2, 33, 80, seed=8, dtype=mx.float16)
    codec.encode(x)  # checks the kernel
    names.clear()
    in_kernel = codec.encode(x)
    assert len(names) == 1
    decoded = codec.decode(in_kernel)
    assert set(checked.states()) == {"agrees"}
    on_a_cpu(monkeypatch)
    # a coordinate at a boundary, within float rounding, may have either code
    assert relative(decoded, codec.decode(codec.encode(x))) < 1e-2


def test_heads_of_each_width_are_encoded_by_one_launch(monkeypatch):
    names = on_the_host(monkeypatch)
    codec = METHODS["ratequant"].codec(DIM, 3, "keys", head_bits=(2, 5, 2, 3, 2, 5))
    x = normal(2, 6, 9, DIM, seed=8, dtype=mx.float16)
    codec.encode(x)  # checks the kernels
    names.clear()
    found = codec.encode(x).arrays
    assert names == ["encode"] * 3
    on_a_cpu(monkeypatch)
    assert set(checked.states()) == {"agrees"}
    for name, array in codec.encode(x).arrays.items():
        assert found[name].shape == array.shape
        assert mx.mean(found[name] == array).item() > 0.99  # boundaries, within float rounding


@pytest.mark.parametrize("basis", ["pca", "query"])
def test_a_calibrated_basis_is_a_product_and_one_launch(monkeypatch, basis):
    names = on_the_host(monkeypatch)
    sample = Sample(normal(1, 2, 400, DIM), normal(1, 4, 400, DIM, seed=1))
    codec = METHODS["spectralquant"].codec(DIM, 3, "keys", basis=basis).fit(sample)
    x = normal(2, 2, 9, DIM, seed=8, dtype=mx.float16)
    codec.encode(x)  # checks the kernel
    names.clear()
    in_kernel = codec.encode(x)
    assert names == ["encode_by_plan"]
    assert checked.states() == {"agrees": 1}
    on_a_cpu(monkeypatch)
    assert relative(codec.decode(in_kernel), codec.decode(codec.encode(x))) < 1e-2  # as above


@pytest.mark.parametrize(
    ("tensor", "options", "kernels"),
    [
        ("keys", {}, ["encode_signs"]),
        ("keys", {"outliers": 3}, ["encode_signs"] * 2),
        ("values", {}, ["encode_groups"]),
        ("values", {"levels": "ends", "group": 20}, ["encode_groups"]),
    ],
)
def test_signs_and_groups_are_one_launch_each(monkeypatch, tensor, options, kernels):
    names = on_the_host(monkeypatch)
    codec = METHODS["qjl"].codec(DIM, 2, tensor, **options).fit(Sample(normal(1, 2, 100, DIM)))
    x = normal(2, 2, 9, DIM, seed=8, dtype=mx.float16)
    codec.encode(x)  # checks the kernels
    names.clear()
    in_kernel = codec.encode(x)
    assert names == kernels
    assert set(checked.states()) == {"agrees"}
    on_a_cpu(monkeypatch)
    assert relative(codec.decode(in_kernel), codec.decode(codec.encode(x))) < 1e-2  # as above


def test_a_decoder_that_errs_is_switched_off(monkeypatch):
    on_the_host(monkeypatch)
    wrong_by(monkeypatch, lambda name, array: 1.1 * array)
    codec, x = TurboQuant(DIM, 3), normal(1, 2, 33, DIM, seed=8)
    arrays = codec._encode_by_graph(x)
    with pytest.warns(UserWarning, match="The kernel decode is switched off .* differs from its reference by 0.1"):
        decoded = codec.decode(Code(arrays))
    assert mx.array_equal(decoded, codec._decode_by_graph(**arrays, dtype=mx.float32)["out"])


@pytest.mark.parametrize(
    ("name", "sentence"), [("codes", "it writes other codes than its reference"), ("root_scale", "it differs from its")]
)
def test_an_encoder_that_errs_is_switched_off(monkeypatch, name, sentence):
    on_the_host(monkeypatch)
    wrong_by(monkeypatch, lambda given, array: array * 1.01 + 1 if given == name else array)
    codec, x = TurboQuant(DIM, 3), normal(1, 2, 33, DIM, seed=8)
    with pytest.warns(UserWarning, match=f"The kernel encode is switched off .* {sentence}"):
        code = codec.encode(x)
    assert all(mx.array_equal(code.arrays[name], array) for name, array in codec._encode_by_graph(x).items())


def test_a_rotation_of_blocks_is_one_launch(monkeypatch):
    rotation, x = transforms.SignedHadamard(80, 3), normal(1, 2, 9, 80)
    in_graph = rotation.forward(x)
    launched = on_the_host(monkeypatch)
    assert relative(rotation.forward(x), in_graph) < 1e-6
    assert relative(rotation.inverse(in_graph), x) < 1e-6
    assert set(launched) == {"rotate"}
    launched.clear()
    transforms.SignedHadamard(64, 3).forward(normal(1, 2, 9, 64))  # MLX's own transform is used
    rotation.forward(normal(9, 80))  # no heads
    assert not launched


def test_a_rotation_that_errs_is_switched_off(monkeypatch):
    on_the_host(monkeypatch)
    wrong_by(monkeypatch, lambda name, array: 1.1 * array)
    rotation, x = transforms.SignedHadamard(80, 3), normal(1, 2, 9, 80)
    with pytest.warns(UserWarning, match="rotate is switched off on this metal device: it differs"):
        wrong = rotation.forward(x)
    on_a_cpu(monkeypatch)
    assert mx.array_equal(wrong, rotation.forward(x))


def test_a_prepared_call_is_used_until_a_buffer_of_codes_is_full(monkeypatch):
    gpu = replace(HOST, lazy=True)
    monkeypatch.setattr("veloxlab.cache.past.device_backend", lambda: gpu)
    monkeypatch.setattr(attention, "current_backend", lambda: gpu)
    cache = CompressedKVCache(TurboQuant(DIM, 4), TurboQuant(DIM, 3, "mse"), window=BLOCK)
    first = normal(1, 2, 3000, DIM)  # buffers of 3,000 tokens have room for more than a block
    cache.update_and_fetch(first, first)
    filled, calls = set(), []
    for i in range(2 * BLOCK + 1):
        new = normal(1, 2, 1, DIM, seed=50 + i)
        found, _ = cache.update_and_fetch(new, new)
        if found.past.filled not in filled:
            in_kernel, in_graph = both(found, normal(1, 4, 1, DIM, seed=i))
            assert relative(in_kernel, in_graph) < TOLERANCE
            assert found.tokens == cache.offset
            filled.add(found.past.filled)
            calls.append(found.past.calls)
    same = [mine is before for mine, before in itertools.pairwise(calls)]
    assert same == [False, True]  # no room for the first block


def test_the_next_token_calls_only_the_kernel(monkeypatch):
    gpu = replace(HOST, lazy=True)
    monkeypatch.setattr("veloxlab.cache.past.device_backend", lambda: gpu)
    monkeypatch.setattr(attention, "current_backend", lambda: gpu)
    cache = CompressedKVCache(TurboQuant(DIM, 4), TurboQuant(DIM, 3, "mse"))
    first = normal(1, 2, 300, DIM)
    cache.update_and_fetch(first, first)
    new, q = normal(1, 2, 1, DIM, seed=1), normal(1, 4, 1, DIM, seed=2)
    cache.update_and_fetch(new, new)[0].attend(q, 0.1, None)
    asked = []
    monkeypatch.setattr(attention, "current_backend", lambda: asked.append("backend") or gpu)
    found, _ = cache.update_and_fetch(new, new)
    assert relative(found.attend(q, 0.1, None), found._attend_codes(q, 0.1, None)) < TOLERANCE
    assert not asked
    for scale, mask, sinks in ((0.2, None, None), (0.1, mx.zeros((1, found.tokens)), None), (0.1, None, mx.zeros(4))):
        answers = found.attend(q, scale, mask, sinks), found._attend_codes(q, scale, mask, sinks)
        assert relative(*answers) < TOLERANCE
    assert len(asked) == 3


def test_a_cache_in_use_stops_using_kernels_with_the_next_block(monkeypatch):
    gpu, runs = replace(HOST, lazy=True), [True]
    monkeypatch.setattr("veloxlab.cache.past.device_backend", lambda: gpu)
    monkeypatch.setattr(attention, "current_backend", lambda: gpu if runs[0] else None)
    cache = CompressedKVCache(TurboQuant(DIM, 4), TurboQuant(DIM, 3, "mse"), window=BLOCK)
    first, q = normal(1, 2, 300, DIM), normal(1, 4, 1, DIM, seed=2)
    cache.update_and_fetch(first, first)
    seen = []
    for i in range(3 * BLOCK):
        new = normal(1, 2, 1, DIM, seed=50 + i)
        found, _ = cache.update_and_fetch(new, new)
        seen.append((found.past.filled, found._attend_in_kernel(q, 0.1, None) is not None))
        runs[0] = i < BLOCK + BLOCK // 2
    filled = [before for before, _ in seen]
    off = [answered for _, answered in seen].index(False)
    assert filled[off] != filled[off - 1]  # the first token after a new block
    assert not any(answered for _, answered in seen[off:])
