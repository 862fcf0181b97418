"""The kernel of attention that also writes the newest token into the window: its Metal text, run on the CPU."""

import copy
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest

from tests import reading
from tests.metal_on_host import check, run
from tests.metal_on_host.launch import HOST
from tests.test_attention_kernels import TOLERANCE, normal, relative
from tests.test_cuda_text import compiled, without_launches
from tests.test_kernels_on_host import CASES, HALF, assert_close, calls
from veloxlab.cache import attention, coming, counts, layer, past
from veloxlab.cache.counts import Room
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.runs import compressed_room
from veloxlab.codecs import METHODS, TENSORS
from veloxlab.kernels import checked
from veloxlab.kernels.attend import attend_kernel
from veloxlab.kernels.call import Exact

MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to check and run Metal text")

JOINS = replace(HOST, joins=True, knows_last=True)
GPU = replace(JOINS, lazy=True)
DIM = 32
PLAIN = [case for case in CASES if not case.masked and case.shared * case.length <= 8]


@pytest.fixture(autouse=True)
def _no_states(monkeypatch):
    monkeypatch.setattr(checked, "_states", {})
    monkeypatch.setattr(check, "MOST_ARGUMENTS", 40)  # such a kernel has more than Metal takes, and runs on CUDA only


def parted(call):
    """Return the call with its newest token outside of the buffers, which have room for three more."""
    whole = call.tokens.recent
    keys, values = (mx.pad(x, [(0, 0), (0, 0), (0, 3), (0, 0)]) for x in whole.complete())
    recent = Exact(keys, values, whole.tokens, whole.tokens + 3).parted()
    # views whose coordinates are not neighbours, as a model may give them
    key, value = (mx.contiguous(mx.repeat(x, 2, axis=3))[..., ::2] for x in recent.coming)
    recent.coming = key, value
    return call._replace(tokens=replace(call.tokens, recent=recent))


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_attention_is_the_same_and_the_window_has_the_token(case):
    for call in calls(case, [(33, 4, 17), (200, 0, 1), (40, 3, 129)]):
        given = parted(call)
        assert not mx.array_equal(given.tokens.recent.buffers[0][:, :, :-3], call.tokens.recent.keys)
        found, found_coded = given.attend(case, JOINS)
        plain, coded = reading.attend(call.queries, call.tokens)
        tolerance = HALF + mx.finfo(case.dtype).eps
        if case.rotated:
            assert_close(found, plain + call.value_rotation.inverse(coded), tolerance)
        else:
            assert_close(found, plain, tolerance)
            assert_close(found_coded, coded, tolerance)
        recent = given.tokens.recent
        assert recent.coming is None
        for held, whole in zip(recent.buffers, call.tokens.recent.complete(), strict=True):
            assert mx.array_equal(held[:, :, :-3], whole)
            assert not held[:, :, -3:].any()


@pytest.mark.parametrize("case", [case for case in CASES if case not in PLAIN], ids=str)
def test_other_calls_get_the_window_with_the_token(case):
    (call,) = calls(case, [(33, 4, 17)])
    given = parted(call)
    if case.masked:
        mask = mx.concatenate([call.queries.mask], axis=-1)
        given = given._replace(queries=replace(given.queries, mask=mask))
    found = given.attend(case, JOINS)[0]
    assert mx.array_equal(found, call.attend(case, HOST)[0])


def as_a_gpu(monkeypatch, backend=GPU):
    for module in (layer, attention):
        monkeypatch.setattr(module, "current_backend", lambda: backend)
    for module in (coming, counts, past, checked):
        monkeypatch.setattr(module, "device_backend", lambda: GPU)


def made(tokens=300, method="turboquant"):
    cache = CompressedKVCache(*(METHODS[method].codec(DIM, 4, tensor) for tensor in TENSORS))
    cache.update_and_fetch(*[normal(1, 2, tokens, DIM, seed=i) for i in range(2)])
    return cache


def token(i):
    return [normal(1, 2, 1, DIM, seed=10 + 2 * i + j) for j in range(2)]


@pytest.mark.parametrize("method", ["turboquant", "qjl"])  # the other codec transforms queries and outputs itself
def test_each_token_of_a_text_joins_by_attention(method, monkeypatch):
    as_a_gpu(monkeypatch)
    cache, other = made(method=method), made(method=method)
    for i in range(100):
        found, _ = cache.update_and_fetch(*token(i))
        assert found.newest.coming is not None  # the first token after a prompt and after a block too
        answer = found.attend(normal(1, 4, 1, DIM, seed=i), 0.1, None)
        assert found.past.last is not None  # the next token calls the kernel directly
        assert found.newest.coming is None
        other.update_and_fetch(*token(i))[0].newest.complete()
        assert cache.recent.tokens == other.recent.tokens
        assert cache.recent.room == other.recent.room
        if i % 16 == 0:
            assert relative(answer, found._attend_codes(normal(1, 4, 1, DIM, seed=i), 0.1, None)) < TOLERANCE
        for one, reference in zip(cache.buffers, other.buffers, strict=True):
            assert mx.array_equal(one, reference)


def test_a_token_that_nobody_attends_to_is_held(monkeypatch):
    as_a_gpu(monkeypatch)
    cache, other = made(), made()
    for i in range(3):  # without attention
        cache.update_and_fetch(*token(i))
        other.update_and_fetch(*token(i))[0].newest.complete()
    copied = copy.deepcopy(cache)
    for i in range(3, 6):
        copied.update_and_fetch(*token(i))
    for one, reference in zip(cache.arrays(), other.arrays(), strict=True):
        assert mx.array_equal(one, reference)
    assert cache.nbytes == other.nbytes
    cache.trim(2)
    assert mx.array_equal(cache.arrays()[0], other.arrays()[0][:, :, :-2])
    assert copied.offset == 306


def used(cache):
    """The used parts of all buffers."""
    return [mx.array(x[:, :, : part.tokens]) for part in cache.runs for x in part.buffers.values()]


def decoded(monkeypatch, steps, *, early, tokens=300):
    """Yield a cache after each of ``steps``: so many tokens, or a trim if negative; with or without codes ahead."""
    with monkeypatch.context() as own:
        as_a_gpu(own)
        if not early:
            own.setattr(counts.Windows, "early", 0)
        cache = made(tokens)
        for i, count in enumerate(steps):
            if count < 0:
                cache.trim(-count)
            else:
                found, _ = cache.update_and_fetch(*(normal(1, 2, count, DIM, seed=10 + 2 * i + j) for j in range(2)))
                found.attend(normal(1, 4, count, DIM, seed=i), 0.1, "causal" if count > 1 else None)
            yield used(cache), cache.packed.ahead


CHANGES = {"none": {}, "few trimmed": {20: -3}, "trimmed": {30: -60}, "others": {20: -75, 21: 70}, "more": {12: 6}}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_codes_ahead_are_those_that_a_block_gets_when_it_leaves(monkeypatch, change):
    steps = [change.get(i, 1) for i in range(110)]
    found = [*decoded(monkeypatch, steps, early=True)]
    assert sum(count > 0 for _, count in found) > 16
    for own, (wanted, none) in zip(found, decoded(monkeypatch, steps, early=False), strict=True):
        assert none == 0
        for one, reference in zip(own[0], wanted, strict=True):
            assert mx.array_equal(one, reference)


def test_the_room_of_a_cache_with_codes_ahead_is_predicted(monkeypatch):
    as_a_gpu(monkeypatch)
    cache = made(301)
    for i in range(110):
        found, _ = cache.update_and_fetch(*token(i))
        found.attend(normal(1, 4, 1, DIM, seed=i), 0.1, None)
        room = compressed_room(cache.windows, 302 + i, decoded=i, chunk=2048)
        assert room == Room(*(part.room for part in cache.runs))


def test_tokens_of_another_dtype_do_not_join(monkeypatch):
    as_a_gpu(monkeypatch)
    cache = made()
    for i in range(3):
        found, _ = cache.update_and_fetch(*(x.astype(mx.float16) for x in token(i)))
        assert found.newest.coming is None
        assert found.dtype == mx.float32
    assert cache.update_and_fetch(*token(3))[0].newest.coming is not None


def test_a_kernel_that_writes_another_token_is_switched_off(monkeypatch):
    def wrong(source):
        kernel = GPU.build(source)

        def run(**given):
            made = zip(source.outputs, kernel(**given), strict=True)
            return [2 * x if name.startswith("next_") else x for name, x in made]

        return run

    as_a_gpu(monkeypatch, replace(GPU, build=wrong))
    found, _ = made().update_and_fetch(*token(0))
    with pytest.warns(UserWarning, match="attend .* is switched off on this metal device: it differs"):
        assert found.attend(normal(1, 4, 1, DIM), 0.1, None) is not None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile CUDA text")
@pytest.mark.parametrize("case", [replace(PLAIN[2], dtype=dtype) for dtype in (mx.float16, mx.float32)], ids=str)
def test_its_text_is_cuda(case):
    texts = []
    parted(next(calls(case, [(33, 4, 5)]))).attend(case, without_launches(texts))
    assert "next_keys" in texts[0]
    assert compiled(texts[0]) == ""


def test_a_metal_device_does_not_join():
    (call,) = calls(PLAIN[0], [(33, 4, 17)])
    given = parted(call)
    assert not attend_kernel(given.queries, given.tokens, HOST).joins
