"""Tokens that CPU loops write into one buffer equal those that MLX operations decode, for every layout and dtype."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import test_readers
from tests.test_attention import GROUP, HEADS, filled, normal
from tests.test_cpu_attention import ROUNDING
from tests.test_cpu_encode import DIMS, DTYPES, KINDS, READ, by_reference, codec, relative, view
from veloxlab.cache import expand
from veloxlab.cache.expand import expanded
from veloxlab.codecs import METHODS
from veloxlab.codecs.base import Code
from veloxlab.codecs.none import Exact
from veloxlab.kernels import checked, devices
from veloxlab.kernels.cpu import run
from veloxlab.kernels.devices import BACKENDS, CPU

pytestmark = pytest.mark.skipif(devices.current_backend() is not devices.CPU, reason="MLX computes on a GPU here")
ALL = slice(None)
DECODED = test_readers.cases(
    {name: test_readers.OPTIONS[name] for name in ("turboquant", "ratequant", "rabitq", "polarquant")}
)


@pytest.fixture(autouse=True)
def _loops_are_tried_and_agree(monkeypatch):
    monkeypatch.setattr(checked, "_states", {})
    yield
    assert set(checked.states()) <= {"agrees"}


def tolerance(dtype):
    """Tolerance for sums in another order; one of 64 numbers can round to the neighbour."""
    return ROUNDING if dtype == mx.float32 else mx.finfo(dtype).eps / 8


def assert_as_decoded(parts, dtype, heads=ALL):
    found = expanded(parts, dtype, heads, None)
    assert any(kind[0] == "expand" for kind in checked._states)
    wanted = by_reference(lambda: expanded(parts, dtype, heads, None))
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    assert relative(found.astype(mx.float32), wanted.astype(mx.float32)) < tolerance(dtype)


@pytest.mark.parametrize("kind", range(len(READ)), ids=lambda kind: "-".join(map(str, KINDS[kind][:3])))
@settings(max_examples=10, deadline=None)
@given(
    form=st.tuples(st.sampled_from(DIMS), *[st.sampled_from(DTYPES)] * 2, st.integers(0, 3)),
    counts=st.tuples(st.integers(0, 5), st.integers(1, 80), st.integers(0, 70)),
    batch=st.integers(1, 2),
    heads=st.sampled_from([ALL, slice(0, 1), slice(1, 2)]),
    threads=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_every_shape_is_as_decoded(kind, form, counts, batch, heads, threads, seed):
    dim, dtype, exact_dtype, way = form
    own, exact = codec(kind, dim), Exact(dim)
    sinks, packed, recent = (
        normal(batch, 2, n, dim, seed=seed + i).astype(exact_dtype)
        for i, n in enumerate((counts[0], counts[1] + 5, counts[2]))
    )
    code = own.encode(packed, 7)[3 : 3 + counts[1]]
    parts = [(exact, Code({"values": sinks})), (own, code), (exact, Code({"values": view(recent, way)}))]
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(run, "threads", lambda: threads)
        changed.setattr(run, "_LEAST_SHARE", 100)
        assert_as_decoded(parts, dtype, heads if own.heads_alike else ALL)


@pytest.mark.parametrize(("method", "options", "tensor"), DECODED)
def test_every_rotation_and_width_is_as_decoded(method, options, tensor):
    own = test_readers.fitted(method, options, tensor, 4)
    code = test_readers.in_a_buffer(own.encode(normal(2, test_readers.HEADS, 77, test_readers.DIM, seed=0), 13))
    assert_as_decoded([(own, code)], mx.float32)


def test_tiles_include_the_transform_of_their_codec(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cpu", replace(CPU, expanded_tokens=32))
    kind = next(i for i, known in enumerate(KINDS) if known[0] == "commvq")  # rotated by their positions
    assert_as_decoded([(codec(kind, 64), codec(kind, 64).encode(normal(1, 2, 77, 64, seed=0), 5))], mx.float32)


def test_numbers_beyond_float16_become_its_largest_and_exact_tokens_do_not_change():
    own, exact = METHODS["turboquant"].codec(64, 4, "keys"), mx.array(np.full((1, 2, 3, 64), np.inf, np.float32))
    exact[0, 0, 1, 2], exact[0, 1, 2, 3] = float("nan"), 1e9
    parts = [(own, own.encode(normal(1, 2, 9, 64, seed=0) * 5e4)), (Exact(64), Code({"values": exact}))]
    for dtype in DTYPES:
        found, wanted = expanded(parts, dtype, ALL, None), by_reference(lambda d=dtype: expanded(parts, d, ALL, None))
        assert np.allclose(*(np.array(x.astype(mx.float32)) for x in (found, wanted)), rtol=0.01, equal_nan=True)


def queries(count=40):
    return normal(1, HEADS * GROUP, count, 64, seed=3)


def test_unevaluated_graphs_use_mlx_operations(monkeypatch):
    history, q = filled(90)._history(), queries()
    wanted = by_reference(lambda: history.attend(q, 0.125, None))
    assert relative(history.attend(q, 0.125, None), wanted) < ROUNDING
    assert checked.states()
    monkeypatch.setattr(expand, "_written", None)
    compiled = mx.compile(lambda q: history.attend(q, 0.125, None))(q)
    assert relative(compiled, wanted) < ROUNDING


def test_inside_a_vectorized_map_mlx_operations_do_the_work(monkeypatch):
    own = METHODS["turboquant"].codec(64, 4, "keys")
    code = own.encode(normal(1, 2, 9, 64, seed=0))
    wanted = own.decode(code)
    monkeypatch.setattr(expand, "_written", None)

    def decoded(root_scale):
        return expanded([(own, Code(code.arrays | {"root_scale": root_scale}))], mx.float32, ALL, None)

    assert relative(mx.vmap(decoded)(code.arrays["root_scale"][None])[0], wanted) < ROUNDING


@pytest.mark.parametrize("name", ["values", "root_scale"])
def test_derivatives_reach_exact_tokens_and_scales(name):
    parts = [(s.value_codec, s.values) for s in filled(90)._history().segments]
    place, (own, code) = next((i, part) for i, part in enumerate(parts) if name in part[1].arrays)

    def total(array):
        changed = Code(code.arrays | {name: array.astype(code.arrays[name].dtype)}, code.start)
        some = [*parts[:place], (own, changed), *parts[place + 1 :]]
        return mx.square(expanded(some, mx.float32, ALL, None)).sum()

    given = code.arrays[name].astype(mx.float32)
    gradient = mx.grad(total)(given)
    assert relative(gradient, by_reference(lambda: mx.grad(total)(given))) < 1e-3  # roots are stored in float16
    assert mx.abs(gradient).max() > 0


def test_no_loop_runs_if_kernels_are_switched_off(monkeypatch):
    monkeypatch.setenv(devices.SWITCH, "0")
    monkeypatch.setattr(expand, "_written", None)
    assert filled(90)._history().attend(queries(), 0.125, None).shape == (1, HEADS * GROUP, 40, 64)


def test_the_peak_is_below_that_of_mlx_operations():
    own = METHODS["turboquant"].codec(64, 4, "keys")
    parts = [(own, own.encode(normal(1, 2, 5000, 64, seed=0)))]

    def peak():
        mx.eval([array for _, code in parts for array in code.arrays.values()])
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(expanded(parts, mx.float32, ALL, None))
        return mx.get_peak_memory() - before

    peak()
    assert peak() < 1.1 * 5000 * 2 * 64 * 4 < by_reference(lambda: mx.array(peak())).item()
