"""Encoding, decoding and training by CPU loops, against their reference implementations."""

import subprocess
import sys
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veloxlab import runtime
from veloxlab.codecs import METHODS, commvq_training
from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts import codebooks, vector
from veloxlab.codecs.parts.rope import Rope
from veloxlab.codecs.parts.transforms import SignedHadamard
from veloxlab.codecs.rabitq import RaBitQ
from veloxlab.kernels import checked, devices
from veloxlab.kernels.cpu import run, train

pytestmark = pytest.mark.skipif(devices.current_backend() is not devices.CPU, reason="MLX computes on a GPU here")

# a coordinate at a boundary, within the rounding of both sums, may have either code: a vector in fifty, and one more
SAME_VECTOR, SHARE_APART = 1e-3, 0.02
SAME_ERROR = 2e-3  # relative error of the vectors
DIMS = (64, 80, 96, 128, 256)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
READ = (
    *(("turboquant", bits, "keys", {}) for bits in (1, 4, 5, 8)),
    ("turboquant", 3, "values", {"scale": "norm"}),
    *(("rabitq", bits, tensor, {}) for bits, tensor in ((1, "keys"), (4, "values"), (8, "keys"))),
    ("rabitq", 3, "keys", {"bounds": True}),
    ("rabitq", 4, "keys", {"encoder": "fast"}),
    *(("rabitq", bits, "keys", {"encoder": "exact", "bounds": True}) for bits in (1, 4)),
    ("rabitq", 8, "values", {"encoder": "exact", "rotation": "haar"}),
    ("turboquant", 4, "values", {"rotation": "haar"}),
    ("rvq", 4, "keys", {}),
    ("rvq", 6, "values", {"variant": "refined"}),
    ("qjl", 2, "keys", {}),
    ("qjl", 3, "values", {}),
    ("qjl", 2, "values", {"group": 24, "levels": "ends"}),
    ("polarquant", 4, "keys", {}),
    ("polarquant", 3, "values", {"recursion": "full"}),
    ("polarquant", 8, "keys", {"recursion": "full", "scale": "norm"}),
    ("polarquant", 4, "values", {"rotation": "haar"}),
    ("spectralquant", 3, "keys", {}),
    ("spectralquant", 4, "values", {"scale": "unbiased"}),
    *(("vecinfer", bits, tensor, {}) for bits, tensor in ((2, "keys"), (3, "values"), (4, "keys"))),
    ("vecinfer", 1, "values", {"point": "d8b6"}),
    ("commvq", 2, "keys", {}),
    ("commvq", 1, "values", {"scale": "unbiased"}),
)
KINDS = (
    *READ,
    *(("turboquant", bits, "keys", {"variant": "prod"}) for bits in (1, 3)),
    ("turboquant", 2, "keys", {"outliers": 8}),
    ("qjl", 2, "keys", {"outliers": 4}),
)


@pytest.fixture(autouse=True)
def _loops_are_tried_and_agree(monkeypatch):
    """Check that each loop ran and agreed; otherwise the reference would be compared with itself."""
    monkeypatch.setattr(checked, "_states", {})
    yield
    assert set(checked.states()) <= {"agrees"}


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


@cache
def codec(kind, dim):
    method, bits, tensor, options = KINDS[kind]
    made = METHODS[method].codec(dim, bits, tensor, **options)
    return made.fit(Sample(normal(1, 2, 320, dim, seed=1), rope=Rope(dim)))


def by_reference(work):
    with pytest.MonkeyPatch.context() as switched_off:
        switched_off.setenv(devices.SWITCH, "0")
        made = work()
        mx.eval(made)
        return made


def relative(x, wanted):
    return (mx.linalg.norm(x - wanted) / mx.maximum(mx.linalg.norm(wanted), 1e-30)).item()


def apart(x, wanted):
    """Return how many vectors of (..., D) differ from the expected ones by more than float error."""
    off = mx.linalg.norm(x - wanted, axis=-1) > SAME_VECTOR * mx.maximum(mx.linalg.norm(wanted, axis=-1), 1e-30)
    return off.sum().item()


def forms(arrays):
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def view(x, way):
    """Return the same numbers in another memory layout: unchanged, by tokens and heads, every other token, reversed."""
    if way == 0:
        return x
    if way == 1:
        return mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)
    if way == 2:
        return mx.repeat(x, 2, axis=2)[:, :, ::2]
    return mx.contiguous(x[..., ::-1])[..., ::-1]


vectors = st.tuples(
    st.sampled_from(DIMS),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 2), st.just(2), st.integers(1, 70)),
    st.integers(0, 3),
    st.integers(0, 1000),
)


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=lambda kind: "-".join(map(str, KINDS[kind][:3])))
@settings(max_examples=12, deadline=None)
@given(some=vectors)
def test_codes_are_those_of_the_reference(kind, some):
    dim, dtype, shape, way, seed = some
    own = codec(kind, dim)
    x = view((normal(*shape, dim, seed=seed) * 3).astype(dtype), way)
    found, wanted = own.encode(x, 7), by_reference(lambda: own.encode(x, 7).arrays)
    assert "agrees" in checked.states()
    assert forms(found.arrays) == forms(wanted)
    by_found, by_wanted = (by_reference(lambda c=c: own.decode(type(found)(c, 7))) for c in (found.arrays, wanted))
    x = x.astype(mx.float32)
    assert abs(relative(by_found, x) - relative(by_wanted, x)) < SAME_ERROR
    if KINDS[kind][0] != "rabitq":  # of two equally good scales, either can be found
        assert apart(by_found, by_wanted) <= 1 + SHARE_APART * np.prod(shape)


@pytest.mark.parametrize("dim", [80, 96, 112])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotated_are_those_of_the_reference(dim, dtype):
    rotation, x = SignedHadamard(dim, 3), normal(2, 3, 40, dim).astype(dtype)[:, :, 3:]
    for turn in (rotation.forward, rotation.inverse):
        assert relative(turn(x), by_reference(lambda turn=turn: turn(x)).astype(mx.float32)) < mx.finfo(dtype).eps
    assert checked.states() == {"agrees": 2}


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=lambda kind: "-".join(map(str, KINDS[kind][:3])))
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_numbers_that_are_not_finite_and_zeros_give_the_reference_s_codes(kind, number):
    own = codec(kind, 64)
    numbers = np.array(normal(1, 2, 9, 64, seed=4))
    numbers[0, :, 2, 5] = number
    numbers[0, 1, 4] = number
    numbers[0, 0, 6, 1::3] = number
    x = mx.array(numbers)
    code = own.encode(x)
    found = by_reference(lambda: own.decode(code))
    wanted = by_reference(lambda: own.decode(own.encode(x)))
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    finite = np.isfinite(wanted)
    step = 0.05 if KINDS[kind][3].get("encoder") == "exact" else 1e-3  # of equally good grids, either can be found
    assert np.allclose(np.where(finite, found, 0), np.where(finite, wanted, 0), atol=step)
    assert np.array_equal(np.array(found)[~finite], np.array(wanted)[~finite], equal_nan=True)


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=lambda kind: "-".join(map(str, KINDS[kind][:3])))
def test_no_token_and_one_token_are_encoded(kind):
    own = codec(kind, 64)
    for tokens in (0, 1):
        x = normal(2, 2, tokens, 64)
        wanted = by_reference(lambda x=x: own.encode(x).arrays)
        assert forms(own.encode(x).arrays) == forms(wanted)


TURBOQUANT = METHODS["turboquant"].codec(64, 4, "keys")


def test_inside_a_compiled_function_mlx_operations_do_the_work():
    x = normal(1, 2, 9, 64)
    wanted = by_reference(lambda: TURBOQUANT.encode(x).arrays)
    for name, array in mx.compile(lambda x: TURBOQUANT.encode(x).arrays)(x).items():
        assert mx.array_equal(array, wanted[name])
    assert checked.states() == {}


def test_inside_a_vectorized_map_mlx_operations_do_the_work():
    x = normal(3, 1, 2, 9, 64)
    found = mx.vmap(lambda x: TURBOQUANT.encode(x).arrays["root_scale"])(x)
    assert mx.array_equal(
        found, by_reference(lambda: TURBOQUANT.encode(x.reshape(3, 2, 9, 64)).arrays["root_scale"])[:, None]
    )


QJL = METHODS["qjl"].codec(64, 2, "keys")


def sizes(x):
    return QJL.encode(x * 2).arrays["root_rms"].astype(mx.float32).sum()


def test_gradients_are_those_of_the_reference():
    x = normal(1, 2, 9, 64)
    assert relative(mx.grad(sizes)(x), by_reference(lambda: mx.grad(sizes)(x))) < 1e-3
    assert checked.states() == {"agrees": 1}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("changes", [[], [(0, 100.0)], [(slice(31), 0.0)], [(slice(None), 1.0)], [(3, 1e-25)]])
def test_no_scale_of_a_grid_is_better_than_the_one_found(bits, changes):
    """All are tried with 64-bit numbers, because 32 bits hardly distinguish the cosines of 8 bits from 1."""
    y, top = np.abs(np.random.default_rng(bits).standard_normal(32)).astype(np.float32), 1 << (bits - 1)
    for place, number in changes:
        y[place] = number
    own = RaBitQ(32, bits, encoder="exact")
    x = own._rotation.inverse(mx.array(y)[None, None, None])
    y = np.abs(np.array(own._rotation.forward(x), np.float64)).ravel()
    found = np.abs(np.array(own.expand(own.encode(x)), np.float64)).ravel()
    assert "agrees" in checked.states()
    steps = np.arange(1, top) / np.maximum(y[:, None], 1e-30) * (1 + 1e-9)
    grid = np.minimum(np.floor(np.append(0, steps)[:, None] * y), top - 1) + 0.5
    best = ((grid @ y) ** 2 / np.square(grid).sum(axis=1)).max()
    assert (found @ y) ** 2 / np.square(found).sum() > best * (1 - 1e-6)


def test_without_a_gradient_in_the_reference_there_is_none():
    def scales(x):
        return TURBOQUANT.encode(x).arrays["root_scale"].sum()

    for gradient in (mx.grad(scales), lambda x: by_reference(lambda: mx.grad(scales)(x))):
        with pytest.raises(ValueError, match="Cannot calculate VJP with respect to indices"):
            gradient(normal(1, 2, 9, 64))


def test_derivatives_along_a_direction_are_those_of_the_reference():
    x, moved = normal(1, 2, 9, 64), normal(1, 2, 9, 64, seed=1)
    (found,), (wanted,) = mx.jvp(sizes, [x], [moved])[1], by_reference(lambda: mx.jvp(sizes, [x], [moved])[1])
    assert relative(found, wanted) < 1e-3


def points(count, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


@pytest.mark.parametrize(("count", "dim"), [(4096, 4), (1024, 2), (600, 3), (256, 4), (64, 8), (4096, 8)])
def test_nearest_centroids(count, dim):
    given, centroids = points(5000, dim), points(count, dim, seed=1)
    centroids[7], centroids[0] = centroids[5], 0
    given[3], given[4] = centroids[7], np.nan
    codes, distances = train.nearest_centroids(given, centroids)
    wanted, least = vector._assign(given, centroids)
    assert (codes == wanted).mean() > 0.999
    assert codes[3] == 5
    assert codes[4] == 0
    assert np.allclose(distances[5:], least[5:], atol=1e-4)


@pytest.mark.parametrize(("count", "dim", "drawn"), [(2000, 4, 500), (130, 2, 64), (64, 3, 10), (1, 2, 3)])
def test_drawn_seeds(count, dim, drawn):
    """Whole numbers, whose sums have no rounding: each draw decides all later ones."""
    rng = np.random.default_rng(5)
    given, uniform = rng.integers(-50, 51, (count, dim)).astype(np.float32), rng.random(drawn)
    (found,), (wanted,) = (draw(given, uniform, 16) for draw in (train.drawn_seeds, vector._drawn))
    assert (found == wanted).all()


@pytest.mark.parametrize("power", [2, 1, 1 / 8])
@pytest.mark.parametrize("count", [2, 5, 256])
def test_levels_converge_to_those_of_the_reference(count, power):
    t = np.linspace(0, 1, 1025)
    f = np.where(t > 0.2, t**power, 0.0)
    levels = np.sort(np.random.default_rng(4).random(count))
    mass, first = codebooks._integral(f, t), codebooks._integral(f * t, t)
    for rounds, least in ((1, 0.0), (40, 1e-3), (2000, 1e-9)):
        given = levels, t, mass, first, np.array([least]), rounds
        (found,), (wanted,) = (settled(*given) for settled in (train.settled_levels, codebooks._settled))
        assert np.allclose(found, wanted, rtol=0, atol=1e-9)  # sums are fused: 1e-16 for each iteration


@pytest.mark.parametrize(("method", "bits"), [("vecinfer", 3), ("vecinfer", 2), ("commvq", 2)])
def test_trained_codebooks_are_as_good_as_those_of_the_reference(method, bits):
    sample, x = Sample(normal(1, 2, 400, 64, seed=9)), normal(1, 2, 200, 64, seed=10)
    own = METHODS[method].codec(64, bits, "values")
    errors = [relative(c.decode(c.encode(x)), x) for c in (own.fit(sample), by_reference(lambda: own.fit(sample)))]
    assert abs(errors[0] - errors[1]) < 0.02 * errors[1]
    assert set(checked.states()) == {"agrees"}


@pytest.mark.parametrize("dim", [64, 80])
def test_a_stage_is_searched_as_by_the_reference(dim):
    x, table, b = points(300, dim), points(64, dim, seed=1) / 3, np.arange(300) % 64
    for begin in (b, np.full(300, -1)):
        given = x, table, begin
        same(train.descend(*given), commvq_training._descend(*given))
    for starts, rounds in ((4, 2), (1, 3)):
        same(train.search_sums(x, table, starts, rounds), commvq_training._search(x, table, starts, rounds))
    of_all = x, b[::-1].copy(), b, 64
    for found, wanted in zip(train.add_up(*of_all), commvq_training._add_up(*of_all), strict=True):
        assert np.allclose(np.asarray(found), np.asarray(wanted), atol=1e-5)


def same(found, wanted):
    assert all((a == b).mean() > 0.99 for a, b in zip(found, wanted, strict=True))


def test_a_loop_that_errs_is_switched_off(monkeypatch):
    right = train.LOOPS["nearest_centroids"]
    monkeypatch.setattr(
        train, "LOOPS", train.LOOPS | {"nearest_centroids": lambda *a: (right(*a)[0] * 0, right(*a)[1])}
    )
    given = points(500, 4), points(64, 4, seed=1)
    with pytest.warns(UserWarning, match="The kernel nearest_centroids is switched off on this cpu device"):
        codes, _ = checked.by_loop("nearest_centroids", vector._assign, *given)
    assert np.array_equal(codes, vector._assign(*given)[0])
    checked._states.clear()


def test_a_search_that_finds_less_than_its_reference_is_switched_off(monkeypatch):
    right = run._CALLS["encode"]

    def spoil(work):
        loop, arguments, cost = right(work)
        return run.Call(lambda *given: (loop(*given), work.written[0].fill(0)), arguments, cost)

    monkeypatch.setattr(run, "_CALLS", run._CALLS | {"encode": spoil})
    own, x = METHODS["rabitq"].codec(64, 3, "keys", encoder="exact"), normal(1, 2, 9, 64)
    with pytest.warns(
        UserWarning, match="The kernel encode is switched off .* it loses .* times what its reference does"
    ):
        found = own.encode(x).arrays["codes"]
    assert mx.array_equal(found, by_reference(lambda: own.encode(x).arrays["codes"]))
    checked._states.clear()


def test_a_loop_that_does_not_compile_is_switched_off(monkeypatch):
    from numba.core.errors import TypingError

    from veloxlab.kernels.cpu import encode

    def refuse(*_):
        raise TypingError("no such thing")

    monkeypatch.setattr(encode, "encode", refuse)
    x = normal(1, 2, 9, 64)
    with pytest.warns(UserWarning, match="The kernel encode is switched off .* it does not run .no such thing"):
        found = TURBOQUANT.encode(x).arrays
    assert all(
        mx.array_equal(found[name], array) for name, array in by_reference(lambda: TURBOQUANT.encode(x).arrays).items()
    )
    checked._states.clear()


def test_the_switch_forbids_loops_and_none_run_without_a_compiler(monkeypatch):
    monkeypatch.setattr(devices, "_has_compiler", lambda: False)
    assert devices.current_backend() is None
    TURBOQUANT.encode(normal(1, 2, 9, 64))
    monkeypatch.undo()
    monkeypatch.setenv(devices.SWITCH, "0")
    assert devices.current_backend() is None
    checked.by_loop("nearest_centroids", vector._assign, points(50, 4), points(8, 4))


def test_work_is_shared_among_threads(monkeypatch):
    x = normal(1, 2, 3000, 64)
    alone = TURBOQUANT.encode(x).arrays
    monkeypatch.setattr("veloxlab.kernels.cpu.run.threads", lambda: 3)
    for name, array in TURBOQUANT.encode(x).arrays.items():
        assert mx.array_equal(array, alone[name])


def test_no_compiler_is_imported_before_a_loop_runs():
    code = "import sys, veloxlab, veloxlab.codecs; assert 'numba' not in sys.modules"
    assert runtime.backend() == "cpu"
    subprocess.run([sys.executable, "-c", code], check=True)
