"""The cache holds the right tokens in the right number of bytes, after any order of appending and trimming."""

import copy
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import RotatingKVCache

from veloxlab.cache import coming
from veloxlab.cache.attention import History
from veloxlab.cache.coming import LARGEST
from veloxlab.cache.counts import BLOCK
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs import find_method
from veloxlab.codecs.base import Sample
from veloxlab.errors import InputError
from veloxlab.kernels.devices import CUDA

HEADS, DIM = 3, 64


def make(
    method: str = "turboquant",
    bits: int = 4,
    dims: tuple[int, int] = (DIM, DIM),
    options: dict | None = None,
    **settings,
) -> CompressedKVCache:
    method = find_method(method)  # type: ignore[assignment]
    sides = zip(dims, ("keys", "values"), strict=True)
    return CompressedKVCache(*(method.codec(dim, bits, role, **(options or {})) for dim, role in sides), **settings)  # type: ignore[attr-defined]


def tokens(count: int, seed: int = 0, dim: int = DIM, batch: int = 1) -> mx.array:
    return mx.random.normal((batch, HEADS, count, dim), key=mx.random.key(seed))


def feed(cache: CompressedKVCache, keys: mx.array, values: mx.array, chunks: list[int]) -> None:
    start = 0
    for count in chunks:
        cache.update_and_fetch(keys[:, :, start : start + count], values[:, :, start : start + count])
        start += count
    mx.eval(cache.state)


def expected(cache: CompressedKVCache, x: mx.array, side: str) -> np.ndarray:
    """Return the expected content of the cache for the tokens ``x``: exact, decoded, exact."""
    codec = cache.key_codec if side == "keys" else cache.value_codec
    sinks, packed = cache.sinks.tokens, cache.packed.tokens
    middle = codec.decode(codec.encode(x[:, :, sinks : sinks + packed]))
    return np.concatenate([x[:, :, :sinks], middle, x[:, :, sinks + packed :]], axis=2)


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.integers(0, 70), min_size=1, max_size=8),
    sinks=st.integers(0, 6),
    window=st.integers(0, 70),
    method=st.sampled_from([("turboquant", 3), ("none", 32)]),
)
def test_any_chunking_holds_the_same_tokens_in_order(chunks, sinks, window, method):
    cache = make(*method, sinks=sinks, window=window)
    total = sum(chunks)
    keys, values = tokens(total, 1), tokens(total, 2)
    feed(cache, keys, values, chunks)
    assert cache.offset == cache.size() == total
    assert cache.sinks.tokens == min(sinks, total)
    block = min(BLOCK, max(1, window))
    assert cache.recent.tokens < window + block
    assert cache.recent.tokens >= min(window, total - cache.sinks.tokens)
    if total:
        held_keys, held_values = cache.decoded()
        assert np.allclose(held_keys, expected(cache, keys, "keys"), atol=1e-4)
        assert np.allclose(held_values, expected(cache, values, "values"), atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["add", "trim"]), st.integers(0, 60)), min_size=1, max_size=10),
    sinks=st.integers(0, 5),
    window=st.sampled_from([0, 1, 16, 64]),
)
def test_trimming_drops_exactly_the_newest_tokens(steps, sinks, window):
    """With the exact codec, the cache equals a plain list after any appends and trims."""
    cache = make("none", 32, sinks=sinks, window=window)
    held = np.zeros((1, HEADS, 0, DIM), np.float32)
    for seed, (step, count) in enumerate(steps):
        if step == "add":
            new = tokens(count, seed)
            cache.update_and_fetch(new, new * 2)
            held = np.concatenate([held, new], axis=2)
        else:
            assert cache.trim(count) == min(count, held.shape[2])
            held = held[:, :, : max(0, held.shape[2] - count)]
    assert cache.offset == held.shape[2]
    assert cache.empty() == (held.shape[2] == 0)
    if held.shape[2]:
        keys, values = cache.decoded()
        assert np.array_equal(keys, held)
        assert np.array_equal(values, held * 2)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dims", [(64, 64), (128, 64), (80, 96)])
def test_bytes_are_the_true_bits_within_two_percent_past_a_thousand_tokens(bits, dims):
    for chunks in ([1200], [100] * 12, [1000] + [1] * 200):
        cache = make(bits=bits, dims=dims, sinks=0, window=0)
        feed(cache, tokens(1200, dim=dims[0]), tokens(1200, dim=dims[1]), chunks)
        true = (
            1200 * HEADS * (dims[0] * cache.key_codec.bits_per_value + dims[1] * cache.value_codec.bits_per_value) / 8
        )
        assert true <= cache.nbytes <= 1.02 * true
        assert cache.nbytes == sum(a.nbytes for a in cache.buffers)


def test_sinks_and_window_are_counted_at_their_own_width():
    cache = make(sinks=4, window=64)
    feed(cache, tokens(1000).astype(mx.float16), tokens(1000).astype(mx.float16), [1000])
    exact = cache.sinks.tokens + cache.recent.tokens
    assert 68 <= exact < 68 + BLOCK
    packed_bytes = (1000 - exact) * HEADS * 2 * DIM * cache.key_codec.bits_per_value / 8
    assert cache.nbytes == exact * HEADS * 2 * DIM * 2 + packed_bytes
    assert cache.fp16_bytes == 1000 * HEADS * 2 * DIM * 2


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize(("sinks", "window"), [(4, 64), (4, 0), (0, 64)])
def test_the_arrays_of_a_prompt_are_freed(heads, sinks, window):
    """A view of the prompt's keys, for instance as sinks, would keep all of them in memory."""
    cache, one = make(sinks=sinks, window=window), mx.ones((1, heads, 1, DIM))
    cache.update_and_fetch(one, one)  # builds what all caches share
    mx.eval(cache.state)
    mx.clear_cache()
    before, cache = mx.get_active_memory(), make(sinks=sinks, window=window)
    cache.update_and_fetch(*(mx.random.normal((1, heads, 5000, DIM), key=mx.random.key(i)) for i in (0, 1)))
    mx.eval(cache.state)
    live = mx.get_active_memory() - before
    assert live < cache.nbytes + 0.05 * cache.fp16_bytes  # 16 kB an array can be shared; tables do not count


def test_trimmed_memory_is_released():
    mx.clear_cache()
    before = mx.get_active_memory()
    cache = make(bits=8, sinks=0, window=0)
    feed(cache, tokens(20_000), tokens(20_000), [20_000])
    full = mx.get_active_memory() - before
    cache.trim(19_000)
    mx.eval(cache.state)
    left = mx.get_active_memory() - before
    assert full >= cache.key_codec.bits_per_value * 2 * DIM * HEADS * 20_000 / 8
    assert left < 0.06 * full  # a twentieth of the tokens


def test_a_trim_that_frees_little_copies_no_packed_token():
    """Later tokens are held as without the trim."""
    cache, other = make("turboquant", 4, sinks=0, window=0), make("turboquant", 4, sinks=0, window=0)
    x = tokens(3000)
    cache.update_and_fetch(x, x)
    other.update_and_fetch(x, x)
    before = {name: id(buffer) for name, buffer in cache.packed.buffers.items()}
    cache.trim(40)
    assert {name: id(buffer) for name, buffer in cache.packed.buffers.items()} == before
    assert cache.decoded()[0].shape[2] == cache.packed.tokens == 2960
    cache.update_and_fetch(x[:, :, 2960:], x[:, :, 2960:])
    for found, wanted in zip(cache.decoded(), other.decoded(), strict=True):
        assert np.array_equal(found, wanted)
    assert cache.nbytes == other.nbytes


def test_decoding_appends_in_place():
    """Growth is amortised: for 300 tokens fed one at a time, few make new buffers."""
    cache = make(sinks=0, window=0)
    feed(cache, tokens(2000), tokens(2000), [2000])
    capacities = set()
    for i in range(300):
        feed(cache, tokens(1, i), tokens(1, i), [1])
        capacities.add(cache.buffers[0].shape[2])
    assert len(capacities) <= 300 / (2000 / 64) + 1


@pytest.mark.parametrize("chunk", ["exact", "codes"])
def test_the_chunk_option_selects_what_a_prefill_attends_to(chunk):
    cache = make(sinks=0, window=0, chunk=chunk)
    keys, values = tokens(40, 1), tokens(40, 2)
    history, _ = cache.update_and_fetch(keys, values)
    assert isinstance(history, History)
    seen, _ = history.expand(mx.float32)
    same = np.allclose(seen, keys, atol=1e-6)
    assert same == (chunk == "exact")
    assert cache.packed.tokens == 40


def test_a_decoded_token_inside_the_window_is_seen_exactly():
    cache = make(sinks=0, window=8)
    feed(cache, tokens(100, 1), tokens(100, 1), [100])
    new = tokens(1, 9)
    history, _ = cache.update_and_fetch(new, new)
    assert np.array_equal(history.expand(mx.float32)[0][:, :, -1:], new)


@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["decode", "trim", "copy", "chunk"]), st.integers(1, 45)), min_size=1, max_size=7
    ),
    dtype=st.sampled_from([mx.float32, mx.float16]),
    method=st.sampled_from(["turboquant", "spectralquant"]),
)
def test_state_kept_between_tokens_changes_no_result(steps, dtype, method):
    cache, x = make(method, window=20), tokens(500).astype(dtype)
    if method == "spectralquant":
        cache.key_codec, cache.value_codec = (c.fit(Sample(tokens(200))) for c in (cache.key_codec, cache.value_codec))
    cache.update_and_fetch(x[:, :, :60], x[:, :, 60:120])
    for what, count in steps:
        if what == "trim":
            cache.trim(count)
        elif what == "copy":
            cache = copy.deepcopy(cache)
        for _ in range(count if what == "decode" else 2):
            at = cache.offset
            length = count if what == "chunk" else 1
            history, _ = cache.update_and_fetch(x[:, :, at : at + length], x[:, :, 499 - at - length : 499 - at])
            q = tokens(1, seed=at).astype(dtype)
            if length == 1:  # chunks are read as they came
                assert mx.array_equal(history.attend(q, 0.125, None), cache._history().attend(q, 0.125, None))


def prompt(count: int, seed: int = 0) -> mx.array:
    """Return tokens near one vector of each head, whose angles differ from those of random directions."""
    return 0.3 * tokens(count, seed) + tokens(1, 99)


@pytest.mark.parametrize("chunks", [[300], [100] * 3, [1] * 120])
def test_an_online_codec_is_fitted_to_the_first_tokens_that_are_packed(chunks):
    cache = make("polarquant", options={"codebook": "online"}, sinks=4, window=16)
    unfitted = cache.key_codec, cache.value_codec
    keys, values = prompt(sum(chunks), 1), prompt(sum(chunks), 2) * 3
    feed(cache, keys[:, :, :20], values[:, :, :20], [20])
    assert (cache.key_codec, cache.value_codec) == unfitted  # nothing is packed yet
    cache.trim(20)
    feed(cache, keys, values, chunks)
    first = next(n for n in np.cumsum(chunks) if n - 4 - 16 >= 16)  # tokens when the first block left the window
    block = (first - 4 - 16) // 16 * 16
    for codec, x, before in zip((cache.key_codec, cache.value_codec), (keys, values), unfitted, strict=True):
        assert codec == before.fit(Sample(x[:, :, 4 : 4 + block]))
        assert not codec.online
    held = cache.decoded()
    # float32, of numbers up to 15
    assert np.allclose(held[0], expected(cache, keys, "keys"), atol=1e-4)
    assert np.allclose(held[1], expected(cache, values, "values"), atol=1e-4)


def test_an_online_codec_loses_less_of_its_prompt_and_stays_through_trimming_and_refilling():
    x = prompt(300, 1)
    online, offline = (make("polarquant", options={"codebook": c}, sinks=0, window=0) for c in ("online", "offline"))
    feed(online, x, x, [300])
    feed(offline, x, x, [300])
    errors = [mx.square(cache.decoded()[0] - x).mean().item() for cache in (online, offline)]
    assert errors[0] < 0.98 * errors[1]
    assert online.nbytes == offline.nbytes
    fitted = online.key_codec
    online.trim(120)
    feed(online, x[:, :, 180:], x[:, :, 180:], [20] * 6)
    assert np.allclose(online.decoded()[0], expected(online, x, "keys"), atol=1e-4)
    assert online.trim(10_000) == 300
    assert online.empty()
    y = tokens(200, 5)
    feed(online, y, y, [150, 50])
    assert online.key_codec is fitted
    assert np.allclose(online.decoded()[0], expected(online, y, "keys"), atol=1e-4)


def test_a_first_block_with_too_few_different_vectors_keeps_the_offline_tables():
    cache = make("polarquant", 5, options={"codebook": "online"}, sinks=0, window=0)
    same = mx.broadcast_to(tokens(1), (1, HEADS, 40, DIM))  # 48 different angles of level 2, where 64 are needed
    feed(cache, same, same, [40])
    x = tokens(50, 3)
    feed(cache, x, x, [50])
    plain = make("polarquant", 5, sinks=0, window=0)
    both = mx.concatenate([same, x], axis=2)
    feed(plain, both, both, [90])
    assert mx.array_equal(cache.decoded()[0], plain.decoded()[0])
    assert not cache.key_codec.online


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20, 1.001 * LARGEST])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("window", [0, 64])
def test_nan_and_infinity_are_refused_with_the_layer_and_nothing_is_stored(bad, side, window):
    cache = make(sinks=2, window=window, **{})
    cache.layer = 7
    feed(cache, tokens(200), tokens(200), [200])
    before = (cache.offset, cache.nbytes)
    arrays = {"keys": np.array(tokens(100, 3)), "values": np.array(tokens(100, 4))}
    arrays[side][0, 1, 5, 3] = bad
    with pytest.raises(InputError, match=rf"Layer 7: the {side} of a token are NaN, infinite or beyond"):
        cache.update_and_fetch(mx.array(arrays["keys"]), mx.array(arrays["values"]))
    assert (cache.offset, cache.nbytes) == before


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sinks", [0, 100])
def test_values_that_are_not_finite_are_refused_in_every_dtype(dtype, bad, sinks):
    cache = make(sinks=sinks, window=0)
    keys = np.array(tokens(40))
    keys[0, 1, 5, 3] = bad
    with pytest.raises(InputError, match="the keys of a token are NaN, infinite or beyond"):
        cache.update_and_fetch(mx.array(keys).astype(dtype), tokens(40).astype(dtype))
    assert cache.empty()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("path", ["codes", "arrays"])
@pytest.mark.parametrize("queries", [1, 30])
def test_the_largest_numbers_of_float16_stay_finite(dtype, path, queries):
    """Codes can decode to slightly more than 65,504, the largest float16."""
    cache = make(bits=2, sinks=0, window=0, path=path, chunk="codes")
    largest = np.sign(tokens(1)) * 65504
    x = mx.array(largest).astype(dtype)
    keys, values = cache.update_and_fetch(x, x)
    q = tokens(queries).astype(dtype)
    if path == "codes":
        assert (np.abs(cache.decoded()[1]) > 65504).any()
        out = keys.attend(q, 1e-6, None)
    else:
        assert mx.isfinite(keys).all()
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=1e-6)
    assert mx.isfinite(out.astype(mx.float32)).all()


@pytest.mark.parametrize(("method", "bits"), [("rabitq", 1), ("polarquant", 2), ("turboquant", 1)])
def test_the_largest_accepted_numbers_can_be_stored(method, bits):
    """With unbiased scales that are largest in relation to the RMS: one bit of a random direction."""
    cache = make(method, bits, sinks=0, window=0)
    signs = np.random.default_rng(5).choice([-LARGEST, LARGEST], (1, HEADS, 500, DIM))
    x = mx.array(signs.astype(np.float32))
    feed(cache, x, x, [500])
    keys, _ = cache.decoded()
    inner = (keys / LARGEST * x / LARGEST).mean(axis=-1)
    assert np.allclose(inner, 1, atol=2e-3)  # unbiased: to the rounding of the scale, 2^-10


def test_a_bad_token_in_the_window_is_refused_before_it_is_packed():
    cache = make(sinks=0, window=32)
    bad = np.array(tokens(1))
    bad[..., 0] = np.nan
    feed(cache, mx.array(bad), tokens(1), [1])  # exact, as the model's own cache would keep it
    with pytest.raises(InputError, match="keys of a token are NaN"):
        feed(cache, tokens(64), tokens(64), [64])
    assert cache.packed.tokens == 0


@pytest.mark.parametrize("side", ["keys", "values"])
def test_on_a_gpu_bad_values_are_reported_one_call_later(side, monkeypatch):
    monkeypatch.setattr(coming, "device_backend", lambda: CUDA)
    cache = make(sinks=0, window=0)
    cache.layer = 3
    feed(cache, tokens(40), tokens(40), [40])
    arrays = {"keys": np.array(tokens(1, 3)), "values": np.array(tokens(1, 4))}
    arrays[side][0, 1, 0, 3] = np.nan
    cache.update_and_fetch(mx.array(arrays["keys"]), mx.array(arrays["values"]))
    said = f"Layer 3: the {side} of a token are NaN, infinite or beyond"
    with pytest.raises(InputError, match=said):  # bad values are not saved
        "".join(cache.state[-1])
    cache.update_and_fetch(tokens(1), tokens(1))  # the token after it is not read before the next call
    for _ in range(2):
        with pytest.raises(InputError, match=said):
            cache.update_and_fetch(tokens(1), tokens(1))
    with pytest.raises(InputError, match=said):
        copy.deepcopy(cache).update_and_fetch(tokens(1), tokens(1))


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("chunks", [[12], [3, 8, 1], [10, 30]])
def test_a_codec_that_cannot_encode_changes_nothing(side, chunks):
    sides = {role: find_method("polarquant").codec(DIM, 4, role) for role in ("keys", "values")}
    sides[side] = find_method("polarquant").codec(DIM, 4, side, codebook="fitted")
    cache = CompressedKVCache(*sides.values(), sinks=2, window=5)
    *early, last = chunks
    feed(cache, tokens(sum(early)), tokens(sum(early)), early)
    before = cache.offset, cache.nbytes, [run.tokens for run in cache.runs], cache.key_codec, cache.value_codec
    with pytest.raises(InputError, match="PolarQuant must be fitted to activations"):
        cache.update_and_fetch(tokens(last), tokens(last))
    assert before == (
        cache.offset,
        cache.nbytes,
        [run.tokens for run in cache.runs],
        cache.key_codec,
        cache.value_codec,
    )


def positions(cache: CompressedKVCache, chunks: list[int]) -> list[tuple[int, int]]:
    """Return first position and number of the tokens that the cache encodes, by call."""
    seen = []

    class Recording(type(cache.key_codec)):
        def encode(self, x, start=0):
            seen.append((start, x.shape[2]))
            return super().encode(x, start)

    cache.key_codec = Recording(
        **{field.name: getattr(cache.key_codec, field.name) for field in fields(cache.key_codec)}
    )
    for count in chunks:
        cache.update_and_fetch(tokens(count), tokens(count))
    return seen


@pytest.mark.parametrize("max_size", [None, 40])
@pytest.mark.parametrize("chunks", [[100], [1] * 120, [3, 50, 2, 90, 1, 200], [30, 30, 30, 7, 7, 300, 5, 5, 5]])
def test_each_block_is_encoded_at_its_own_positions(chunks, max_size):
    cache = make(sinks=4, window=8, max_size=max_size)
    blocks = positions(cache, chunks)
    end = 4
    for start, count in blocks:
        assert start == end or (max_size is not None and start > end)  # a sliding layer never encodes skipped tokens
        end = start + count
    assert end == cache.offset - cache.recent.tokens
    assert len(blocks) > 0


# sliding layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("size", [6, 16, 50, 96, 128, 513])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
@pytest.mark.parametrize("bits", [2, 8])
def test_a_sliding_cache_is_never_larger_than_mlx_lms_own(keep, size, dtype, bits):
    ours = make(bits=bits, sinks=keep, max_size=size)
    own = RotatingKVCache(size, keep)
    for count in [1, 1, 5, 40, *[1] * 150, 3, 200, 600, 2, *[1] * 100, 64, 10]:
        x = tokens(count, count).astype(dtype)
        for cache in (ours, own):
            cache.update_and_fetch(x, x)
        assert ours.nbytes <= own.nbytes
        assert (ours.offset, ours.size()) == (own.offset, own.size())
    if size > 64:
        assert ours.nbytes < 0.75 * own.nbytes


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.one_of(st.just(1), st.integers(1, 70)), min_size=1, max_size=14),
    size=st.integers(6, 80),
    keep=st.integers(0, 5),
    window=st.sampled_from([0, 1, 16, 64]),
    chunk=st.sampled_from(["exact", "codes"]),
)
def test_a_sliding_cache_shows_what_mlx_lms_own_shows(chunks, size, keep, window, chunk):
    """With the exact codec: the same tokens, and the same mask, except for the order in mlx-lm's ring buffer."""
    ours = make("none", 32, sinks=keep, window=window, max_size=size, chunk=chunk, path="arrays")
    own = RotatingKVCache(size, keep)
    for seed, count in enumerate(chunks):
        masks = [cache.make_mask(count) for cache in (ours, own)]
        assert type(masks[0]) is type(masks[1])
        assert np.array_equal(*masks)
        x = tokens(count, seed)
        shown, expected = (np.array(cache.update_and_fetch(x, 2 * x)[0]) for cache in (ours, own))
        if count == 1:  # as a set, because no token is masked
            shown, expected = (np.sort(a[0, 0, :, 0]) for a in (shown, expected))
        assert np.array_equal(shown, expected)
        assert ours.is_trimmable() == own.is_trimmable()


def test_a_sliding_cache_that_has_dropped_tokens_is_not_trimmable():
    cache = make(sinks=0, max_size=20)
    feed(cache, tokens(19), tokens(19), [19])
    assert cache.trim(3) == 3
    feed(cache, tokens(10), tokens(10), [10])
    assert not cache.is_trimmable()
    with pytest.raises(InputError, match="Layer 0 sees 20 tokens and has forgotten those before"):
        cache.trim(1)
    assert cache.offset == 26


@pytest.mark.parametrize("count", [-5, 1.0, 2.5, np.nan, True, None, "3"])
@pytest.mark.parametrize("max_size", [None, 200])
def test_a_trim_by_something_other_than_a_number_of_tokens_is_refused(count, max_size):
    """A negative number extended the cache by tokens that nothing had written."""
    cache = make(sinks=2, window=8, max_size=max_size)
    feed(cache, tokens(100), tokens(100), [100])
    batch = CompressedKVCache.merge([cache, cache])
    held = np.array(cache.decoded()[0])
    for trimmed in (cache, batch):
        with pytest.raises(InputError, match="cannot be used: give a whole number, 0 or more"):
            trimmed.trim(count)
    for one in (cache, *batch.rows):
        assert one.offset == 100
        assert np.array_equal(one.decoded()[0], held)
    assert cache.trim(np.int64(7)) == batch.trim(np.int64(7)) == 7


def test_a_smaller_window_than_the_caches_own_is_masked():
    cache = make("none", 32, sinks=0, window=2, max_size=20)
    feed(cache, tokens(30), tokens(30), [30])
    assert cache.make_mask(1, window_size=5).tolist() == [False] * 15 + [True] * 5
    assert cache.make_mask(1, window_size=20) is None


def test_lent_keys_are_those_that_the_layer_read_until_the_end_of_the_step():
    """Layers that share keys and values read them after their owner: a whole chunk, even if a window keeps less."""
    cache = make("none", 32, sinks=0, window=4, max_size=20, lends=True)
    history, _ = cache.update_and_fetch(tokens(50), tokens(50))
    assert cache.keys_and_values()[0] is history
    mx.eval(cache.state)
    assert cache.keys_and_values()[0].tokens == 20


def test_a_wrong_head_dimension_is_refused():
    with pytest.raises(
        InputError, match=r"Layer 0: values have a head dimension of 80, but this cache was made for 64"
    ):
        make().update_and_fetch(tokens(3), tokens(3, dim=80))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sinks": -1}, "sinks=-1 cannot be used: give a whole number, 0 or more"),
        ({"window": 1.5}, "window=1.5 cannot be used"),
        ({"max_size": 4, "sinks": 4}, "max_size=4 leaves no room after sinks=4"),
        ({"chunk": "both"}, "chunk='both' cannot be used: give 'exact' or 'codes'"),
    ],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        make(**settings)


def test_a_copy_is_independent():
    cache = make(window=8)
    feed(cache, tokens(100), tokens(100), [100])
    twin = copy.deepcopy(cache)
    feed(twin, tokens(50, 1), tokens(50, 1), [50])
    assert (cache.offset, twin.offset) == (100, 150)
    assert twin.key_codec == cache.key_codec


def test_mlx_lm_cannot_replace_it():
    """``--kv-bits`` converts any cache with ``to_quantized``, and would silently empty ours."""
    assert not hasattr(make(), "to_quantized")
    assert make(path="codes").bits == 0
    assert not hasattr(make(path="arrays"), "bits")


def test_a_batch_is_held_row_by_row():
    cache = make(sinks=1, window=4)
    keys, values = tokens(90, 1, batch=3), tokens(90, 2, batch=3)
    feed(cache, keys, values, [90])
    assert np.allclose(cache.decoded()[0], expected(cache, keys, "keys"), atol=1e-4)
    assert cache.fp16_bytes == 3 * 90 * HEADS * 2 * DIM * 2
