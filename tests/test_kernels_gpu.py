"""Kernels against their reference implementations on a real GPU: ``pytest -m gpu``."""

import math
import secrets
from dataclasses import replace

import mlx.core as mx
import pytest

from tests.test_attention_kernels import both, history, normal, relative
from veloxlab.cache.attention import History
from veloxlab.cache.expand import expanded
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs import METHODS, TENSORS
from veloxlab.codecs.base import Code, Sample
from veloxlab.codecs.commvq import CommVQ
from veloxlab.codecs.parts.rope import Rope
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.kernels import checked, compiled
from veloxlab.kernels.backend import run_vectors
from veloxlab.kernels.devices import CPU, current_backend
from veloxlab.kernels.slide import by_operations, slid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (b := current_backend()) or b is CPU, reason="MLX computes on a CPU here, and kernels run on GPUs only"
    ),
]

# levels, queries and weights are in half precision in the matrix unit; references multiply in TF32 on NVIDIA: 11 bits
TOLERANCE = 3e-3
# a coordinate at a boundary, within the rounding of both transforms, may have either code: a step off, in few of them
CODED_APART = 1e-2


@pytest.fixture(autouse=True)
def _kernels_are_tried_and_agree(monkeypatch):
    """Check that each kernel ran and agreed; otherwise the reference would be compared with itself."""
    monkeypatch.setattr(checked, "_states", {})
    yield
    assert set(checked.states()) == {"agrees"}


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits):
    h = history(*[TurboQuant(128, bits, "mse")] * 2, packed=5000, heads=8)
    assert relative(*both(h, normal(1, 32, 1, 128))) < TOLERANCE


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 192, 256])
def test_every_head_dimension(dim):
    h = history(*[TurboQuant(dim, 4, "mse")] * 2, packed=777)
    assert relative(*both(h, normal(1, 14, 1, dim))) < TOLERANCE


def test_masks_several_queries_and_half_precision():
    h = history(TurboQuant(128, 3), TurboQuant(128, 2, "mse"), packed=1001, dtype=mx.float16)
    assert relative(*both(h, normal(1, 6, 5, 128, dtype=mx.float16), "causal")) < TOLERANCE


def test_attention_sinks():
    h = history(TurboQuant(64, 4), TurboQuant(64, 4, "mse"), packed=500)
    with_sinks = both(h, normal(1, 8, 1, 64), sinks=mx.array([-2.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert relative(*with_sinks) < TOLERANCE


@pytest.mark.parametrize("cap", [2.0, 50.0])
def test_caps_of_logits(cap):
    h = history(TurboQuant(256, 4), TurboQuant(256, 4, "mse"), packed=700)
    assert relative(*both(h, 5 * normal(1, 8, 1, 256), cap=cap)) < TOLERANCE


def test_grids_signs_and_codebooks():
    sample = Sample(normal(1, 2, 2048, 128, seed=7))
    vecinfer = [METHODS["vecinfer"].codec(128, 2, tensor).fit(sample) for tensor in ("keys", "values")]
    rabitq = [METHODS["rabitq"].codec(128, bits, tensor) for bits, tensor in ((1, "keys"), (4, "values"))]
    signs = METHODS["qjl"].codec(128, 2, "keys")
    for keys, values in (vecinfer, rabitq, (signs, rabitq[1])):
        assert relative(*both(history(keys, values, packed=900), normal(1, 8, 1, 128))) < TOLERANCE


@pytest.mark.parametrize("widths", [(3, 2, 4, 1), (2, 3, 8, 5)])
@pytest.mark.parametrize("dim", [80, 128])
def test_heads_of_several_widths(dim, widths):
    keys, values = (METHODS["ratequant"].codec(dim, 3, tensor, head_bits=widths) for tensor in ("keys", "values"))
    assert relative(*both(history(keys, values, packed=3001, heads=4), normal(1, 16, 1, dim))) < TOLERANCE


@pytest.mark.parametrize(("dim", "bits"), [(80, 1), (128, 3), (256, 8)])
def test_plans_of_widths(dim, bits):
    sample = Sample(normal(1, 2, 2048, dim, seed=7) * mx.exp(normal(2, 1, dim, seed=8)) + 1)
    keys, values = (METHODS["spectralquant"].codec(dim, bits, tensor).fit(sample) for tensor in ("keys", "values"))
    assert relative(*both(history(keys, values, packed=3001), normal(1, 8, 1, dim))) < TOLERANCE


@pytest.mark.parametrize("variant", ["plain", "refined"])
@pytest.mark.parametrize(("dim", "bits"), [(64, 2), (128, 4), (80, 6), (128, 8)])
def test_two_stages(dim, bits, variant):
    keys, values = (METHODS["rvq"].codec(dim, bits, tensor, variant=variant) for tensor in ("keys", "values"))
    assert relative(*both(history(keys, values, packed=3001), normal(1, 8, 1, dim))) < TOLERANCE


@pytest.mark.parametrize(
    ("dim", "bits", "options"),
    [(64, 1, {}), (128, 4, {}), (80, 3, {"group": 24, "levels": "ends"}), (128, 8, {"group": 24, "levels": "ends"})],
)
def test_groups_of_steps(dim, bits, options):
    keys, values = METHODS["qjl"].codec(dim, 1, "keys"), METHODS["qjl"].codec(dim, bits, "values", **options)
    assert relative(*both(history(keys, values, packed=3001), normal(1, 8, 1, dim))) < TOLERANCE


@pytest.mark.parametrize(
    ("dim", "bits", "recursion"),
    [(64, 2, "block"), (128, 4, "block"), (128, 4, "full"), (80, 3, "full"), (256, 8, "full")],
)
def test_angles(dim, bits, recursion):
    keys, values = (
        METHODS["polarquant"].codec(dim, bits, tensor, recursion=recursion) for tensor in ("keys", "values")
    )
    assert relative(*both(history(keys, values, packed=3001), normal(1, 8, 1, dim))) < TOLERANCE


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("rope", [Rope(128), Rope(64, traditional=True)], ids=["halves", "neighbours"])
def test_sums_of_entries_that_rope_rotates(rope, bits):
    sample = Sample(normal(1, 2, 512, 128, seed=7), rope=rope)
    keys, values = (METHODS["commvq"].codec(128, bits, tensor).fit(sample) for tensor in ("keys", "values"))
    h = history(keys, values, packed=3001)
    moved = History(tuple(replace(s, keys=replace(s.keys, start=s.keys.start + 20_000)) for s in h.segments))
    assert relative(*both(moved, normal(1, 8, 1, 128))) < TOLERANCE


def test_codes_of_differences_from_a_mean():
    sample = Sample(normal(1, 2, 256, 128, seed=7) + 2)
    keys, values = (METHODS["rabitq"].codec(128, 4, tensor, centroid=True).fit(sample) for tensor in ("keys", "values"))
    assert relative(*both(history(keys, values, packed=3001), normal(1, 8, 1, 128))) < TOLERANCE


STRINGS = [
    (64, 2.25, {}),
    (80, 1.25, {"entries": 1024}),
    (96, 7, {}),
    (128, 2.25, {}),
    (128, 3.25, {"entries": 1024}),
    (128, 2.25, {"code": "scalar"}),
    (256, 4.25, {}),
]


def fisher(dim, bits, tensor, options, rope=True):
    sample = Sample(
        normal(1, 2, 4 * dim, dim, seed=7) * mx.exp(normal(2, 1, dim, seed=8)) + 1,
        rope=Rope(dim) if rope else None,
        gradients=normal(1, 2, 4 * dim, dim, seed=9),
    )
    return METHODS["fisherquant"].codec(dim, bits, tensor, **options).fit(sample)


@pytest.mark.parametrize(("dim", "bits", "options"), STRINGS)
def test_trellis_codes_about_means_before_rope(dim, bits, options):
    h = history(*(fisher(dim, bits, tensor, options) for tensor in TENSORS), packed=3001)
    moved = History(tuple(replace(s, keys=replace(s.keys, start=s.keys.start + 5000)) for s in h.segments))
    assert relative(*both(moved, normal(1, 8, 1, dim))) < TOLERANCE


def test_trellis_codes_of_keys_without_rope():
    h = history(*(fisher(128, 2.25, tensor, {}, rope=False) for tensor in TENSORS), packed=3001)
    assert relative(*both(h, normal(1, 8, 5, 128), "causal")) < TOLERANCE


def test_a_long_context_in_many_splits():
    h = history(TurboQuant(128, 4), TurboQuant(128, 4, "mse"), packed=65_000, heads=8)
    in_kernel, in_graph = both(h, normal(1, 32, 1, 128) * math.sqrt(20))
    assert relative(in_kernel, in_graph) < TOLERANCE


@pytest.mark.parametrize("method", ["turboquant", "qjl"])  # the other codec transforms queries and outputs itself
def test_sequences_of_a_batch_in_one_launch(method):
    codecs = [METHODS[method].codec(128, 4, tensor) for tensor in ("keys", "values")]
    rows = [CompressedKVCache(*codecs, layer=3) for _ in range(4)]
    for i, (row, count) in enumerate(zip(rows, (20, 5000, 300, 4), strict=True)):
        row.update_and_fetch(*[normal(1, 8, count, 128, seed=i + seed, dtype=mx.float16) for seed in (1, 9)])
    batch = CompressedKVCache.merge(rows)
    for step in range(60):  # three rows pack a block, one of them its first
        new = [normal(4, 8, 1, 128, seed=step + seed, dtype=mx.float16) for seed in (50, 99)]
        together, _ = batch.update_and_fetch(*new)
        alone = [row.update_and_fetch(*[x[i : i + 1] for x in new])[0] for i, row in enumerate(rows)]
        if step % 13 == 0:
            q, sinks = normal(4, 32, 1, 128, seed=step, dtype=mx.float16), mx.linspace(-2, 2, 32)
            in_graph = [h._attend_codes(q[i : i + 1].astype(mx.float32), 0.1, None, sinks) for i, h in enumerate(alone)]
            assert relative(together.attend(q, 0.1, None, sinks), mx.concatenate(in_graph)) < TOLERANCE
    assert batch._stack is not None
    assert [run.tokens for row in batch.rows for run in row.runs] == [run.tokens for row in rows for run in row.runs]
    for row, own in zip(batch.rows, rows, strict=True):  # blocks of several rows are encoded by one product
        assert all(relative(x, y) < CODED_APART for x, y in zip(row.decoded(), own.decoded(), strict=True))


@pytest.mark.parametrize("count", [1, 32])
def test_sequences_at_different_positions_are_encoded_together(count):
    codec, starts, x = fisher(128, 3, "keys", {}), (5, 700, 40_000), normal(3, 2, count, 128)
    together = codec.encode(x, mx.array(starts)).arrays
    for i, start in enumerate(starts):
        own = Code({name: array[i : i + 1] for name, array in together.items()}, start)
        assert relative(codec.decode(own), codec.decode(codec.encode(x[i : i + 1], start))) < CODED_APART


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("dim", "bits"), [(64, 4), (80, 3), (128, 1), (128, 8), (256, 5)])
def test_decoding(dim, bits, dtype):
    codec = TurboQuant(dim, bits)
    code = codec.encode(normal(2, 3, 333, dim))
    wanted = codec._decode_by_graph(code.arrays["codes"], code.arrays["root_scale"], mx.float32)["out"]
    assert relative(codec.decode(code, dtype), wanted) < TOLERANCE


def check_encoding(codec, dtype, monkeypatch, heads=3):
    x = normal(2, 333, heads + 2, codec.head_dim, dtype=dtype)
    x = x[:, :, 1:-1].swapaxes(1, 2)  # a strided view
    in_kernel = codec.encode(x)
    mx.eval(in_kernel.arrays)
    monkeypatch.setattr(checked, "current_backend", lambda: None)  # decoding has its own tests
    assert relative(codec.decode(in_kernel), codec.decode(codec.encode(x))) < CODED_APART


# A kernel takes seconds to compile: every width, dimension and type, not every combination; the combinations run on
# the host, in other tests.
FORMS = [
    (1, 64, mx.float32),
    (2, 80, mx.bfloat16),
    (3, 96, mx.float16),
    (4, 128, mx.float16),
    (5, 112, mx.float32),
    (6, 128, mx.bfloat16),
    (7, 256, mx.float16),
    (8, 128, mx.float32),
]


@pytest.mark.parametrize(
    ("method", "tensor", "options", "form"),
    [
        *(("turboquant", "keys", {}, form) for form in FORMS),
        *(("rabitq", "keys", {}, form) for form in FORMS[::2]),
        *(("rabitq", "values", {"encoder": "fast"}, form) for form in FORMS[1::2]),
        *(("rabitq", "keys", {"bounds": True}, form) for form in FORMS[::2]),
        *(("qjl", "keys", {}, form) for form in FORMS[:5]),
        *(("qjl", "values", {}, form) for form in FORMS[1::2]),
    ],
)
def test_encoding_in_one_launch(method, tensor, options, form, monkeypatch):
    bits, dim, dtype = form
    check_encoding(METHODS[method].codec(dim, bits, tensor, **options), dtype, monkeypatch)


@pytest.mark.parametrize(("bits", "dim"), [(2, 64), (4, 80), (6, 128), (8, 256)])
@pytest.mark.parametrize("options", [{}, {"variant": "refined", "scale": "norm"}])
def test_encoding_in_two_stages(options, bits, dim, monkeypatch):
    check_encoding(METHODS["rvq"].codec(dim, bits, "keys", **options), mx.float16, monkeypatch)


@pytest.mark.parametrize("options", [{}, {"basis": "query"}, {"basis": "hadamard", "scale": "unbiased"}])
@pytest.mark.parametrize(("dim", "bits"), [(64, 1), (80, 3), (128, 4), (256, 8)])
def test_encoding_by_a_plan(dim, bits, options, monkeypatch):
    sample = Sample(normal(1, 3, 4 * dim, dim, seed=7), normal(1, 6, 4 * dim, dim, seed=8))
    check_encoding(METHODS["spectralquant"].codec(dim, bits, "keys", **options).fit(sample), mx.float16, monkeypatch)


@pytest.mark.parametrize(
    ("tensor", "dim", "bits", "options"),
    [*(("keys", *form) for form in STRINGS), *(("values", *form) for form in STRINGS[::3])],
)
def test_encoding_trellis_codes(dim, bits, options, tensor, monkeypatch):
    check_encoding(fisher(dim, bits, tensor, options), mx.float16, monkeypatch, heads=2)


@pytest.mark.parametrize(("dim", "bits", "stages"), [(64, 4, 0), (80, 2, 0), (128, 1, 0), (256, 1, 3), (576, 1, 2)])
def test_encoding_by_sums_loses_no_more_than_the_reference(dim, bits, stages):
    sample = Sample(normal(1, 2, 512, dim, seed=7), rope=Rope(dim))
    codec = CommVQ(dim, bits, "keys", stages).fit(sample)
    x = normal(2, 2, 333, dim)
    assert codec.encode(x).tokens == 333
    lost, least = (
        codec._lost(made, x).sum().item() for made in (run_vectors(codec._encoder, b, x), codec._encode_by_graph(x))
    )
    assert lost <= 1.003 * least


@pytest.mark.parametrize(
    ("tensor", "dim", "bits", "options"),
    [*(("keys", *form) for form in STRINGS[::2]), *(("values", *form) for form in STRINGS[1::3])],
)
def test_trellis_codes_that_a_prompt_reads(dim, bits, options, tensor):
    codec = fisher(dim, bits, tensor, options)
    code = codec.encode(normal(2, 2, 1333, dim, dtype=mx.float16), 7)
    found = expanded([(codec, code)], mx.float16, slice(None), None)
    assert relative(found, codec.decode(code)) < TOLERANCE


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_a_window_that_a_block_leaves(dtype):
    windows = normal(2, 3, 26, 64, dtype=dtype)[:, :, 2:-4], normal(2, 3, 20, 128, seed=1, dtype=dtype)
    found, wanted = slid(windows, 8, 19, 30, current_backend()), by_operations(windows, 8, 19, 30)
    for one, other in zip([*found.windows, *found.largest], [*wanted.windows, *wanted.largest], strict=True):
        assert mx.array_equal(one, other)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("method", ["turboquant", "qjl"])  # the other codec transforms queries and outputs itself
def test_the_newest_token_joins_the_window_by_attention(method, dtype):
    caches = [
        CompressedKVCache(*(METHODS[method].codec(128, 4, tensor) for tensor in TENSORS), sinks=4, window=40)
        for _ in range(2)
    ]
    for i, count in enumerate([500, *[1] * 70]):
        new = [normal(1, 2, count, 128, seed=i, dtype=dtype) for _ in TENSORS]
        found, other = (cache.update_and_fetch(*new)[0] for cache in caches)
        if count > 1:
            continue
        other.newest.complete()
        answer = found.attend(normal(1, 8, 1, 128, seed=i, dtype=dtype), 0.1, None)
        assert found.newest.coming is None
        if i % 10 == 1:
            wanted = other._attend_codes(normal(1, 8, 1, 128, seed=i, dtype=dtype), 0.1, None)
            assert relative(answer, wanted) < max(TOLERANCE, 2 * mx.finfo(dtype).eps)
            for one, reference in zip(
                caches[0].recent.buffers.values(), caches[1].recent.buffers.values(), strict=True
            ):
                assert mx.array_equal(one, reference)


@pytest.mark.skipif(mx.metal.is_available(), reason="such kernels are of CUDA")
def test_mlx_runs_the_machine_code_that_is_kept(monkeypatch):
    """The kept code adds 2 where the text says 1."""
    made = compiled.compiled
    monkeypatch.setattr(compiled, "compiled", lambda text, *more: made(text.replace("1.0f", "2.0f"), *more))
    kernel = compiled.Kernel(f"kept_{secrets.token_hex(8)}", ("x",), ("out",), "", "out[0] = x[x_strides[0]] + 1.0f;")
    x = mx.array([0.0, 5.0, 0.0])
    compiled.keep(kernel, [x], [mx.float32])
    run = mx.fast.cuda_kernel(
        name=kernel.name, input_names=["x"], output_names=["out"], source=kernel.body, ensure_row_contiguous=False
    )
    one = (1, 1, 1)
    (found,) = run(inputs=[x], grid=one, threadgroup=one, output_shapes=[(1,)], output_dtypes=[mx.float32])
    assert found.item() == 7.0
    assert relative(*both(history(*[TurboQuant(128, 4, "mse")] * 2, packed=500), normal(1, 8, 1, 128))) < TOLERANCE
