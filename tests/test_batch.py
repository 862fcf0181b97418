"""Sequences of different lengths in one batch get the same results as alone."""

import copy
import random
import weakref
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

import veloxlab as vl
from tests.tiny_models import FAMILIES, tiny
from veloxlab.cache.batch import BatchCompressedKVCache
from veloxlab.cache.counts import BLOCK
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs import find_method
from veloxlab.errors import InputError

HEADS, DIM = 2, 32
SOME_EXACT: dict[str, Any] = {"sinks": 2, "window": 8}
LENGTHS, WANTED = (7, 40, 23, 66, 1), (6, 15, 3, 10, 12)


def make(method: str = "turboquant", bits: int = 4, **settings) -> CompressedKVCache:
    codecs = (find_method(method).codec(DIM, bits, role) for role in ("keys", "values"))
    return CompressedKVCache(*codecs, **settings)


def tokens(count: int, seed: int, batch: int = 1) -> mx.array:
    return mx.random.normal((batch, HEADS, count, DIM), key=mx.random.key(seed))


# mlx-lm's batch generator ---------------------------------------------------------------------------------------------


def alone(model, prompt, count, cache) -> list[int]:
    return [t for t, _ in generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache)]


def together(model, prompts, counts, caches) -> list[list[int]]:
    """Two sequences decode at a time, and two are read at a time: some wait, and others join and leave."""
    generator = BatchGenerator(model, completion_batch_size=3, prefill_batch_size=2)
    uids = generator.insert(prompts, counts, caches=caches)
    made = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            made[response.uid].append(response.token)
    generator.close()
    return [made[uid] for uid in uids]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["none", "turboquant"])
def test_each_sequence_of_a_batch_gets_the_tokens_it_gets_alone(family, method):
    model = tiny(family)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 90, size=n).tolist() for n in LENGTHS]
    caches = [vl.make_cache(model, method, **SOME_EXACT) for _ in range(2 * len(prompts))]
    expected = [alone(model, p, n, c) for p, n, c in zip(prompts, WANTED, caches[: len(prompts)], strict=True)]
    assert together(model, prompts, WANTED, caches[len(prompts) :]) == expected


def test_gemma2_fails_in_a_batch_with_its_own_cache():
    generator = BatchGenerator(tiny("gemma2"))
    generator.insert([[1, 2, 3, 4], [5, 6], [7, 8, 9]], [3] * 3)
    with pytest.raises(ValueError, match="cannot be broadcast"):  # our cache does not raise
        generator.next_generated()
    generator.close()


def test_a_prompt_that_was_read_before_continues_in_a_batch():
    model = tiny("llama")
    start, rest = list(range(1, 60)), [[61, 62, 63], [64, 65]]
    read = vl.make_cache(model, **SOME_EXACT)
    model(mx.array([start]), cache=read)
    expected = [alone(model, r, 10, copy.deepcopy(read)) for r in rest]
    assert together(model, rest, [10, 10], [copy.deepcopy(read) for _ in rest]) == expected
    assert read[0].offset == len(start)


# contents of a batch, and its input of attention ----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["codes", "arrays"])
@pytest.mark.parametrize("max_size", [None, 20])
@pytest.mark.parametrize("query_heads", [HEADS, 3 * HEADS])
def test_attention_of_padded_rows_is_that_of_each_row_alone(path, max_size, query_heads):
    """With the mask of the batch itself and grouped queries: mlx-lm's [B, 1, L, S]."""
    settings = {"sinks": 0 if max_size else 2, "window": 4, "path": path, "max_size": max_size, "chunk": "codes"}
    rows = [make(**settings) for _ in range(3)]
    for i, row in enumerate(rows[:2]):
        row.update_and_fetch(tokens((3, 30)[i], i), tokens((3, 30)[i], i + 9))
    batch = CompressedKVCache.merge(rows)
    lengths = [5, 2, 4]
    batch.prepare(lengths=lengths, right_padding=[0, 3, 1])
    keys, values = tokens(5, 20, batch=3), tokens(5, 21, batch=3)
    q = mx.random.normal((3, query_heads, 5, DIM), key=mx.random.key(22))
    mask = batch.make_mask(5)
    got = attend(batch, q, keys, values, mask)
    batch.finalize()
    assert batch.offset.tolist() == [8, 32, 4]
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        own = (x[i : i + 1, :, :length] for x in (q, keys, values))
        expected = attend(row, *own, row.make_mask(length))  # type: ignore[call-arg]
        assert np.allclose(got[i : i + 1, :, :length], expected, atol=1e-5)


def attend(cache, q, keys, values, mask):
    read_keys, read_values = cache.update_and_fetch(keys, values)
    if cache.rows[0].path == "codes" if isinstance(cache, BatchCompressedKVCache) else cache.path == "codes":
        return read_keys.attend(q, 0.3, mask)
    return mx.fast.scaled_dot_product_attention(q, read_keys, read_values, scale=0.3, mask=mask)


def test_padding_on_the_left_is_not_stored():
    batch = BatchCompressedKVCache([make("none", 32, path="arrays") for _ in range(3)])
    batch.prepare(left_padding=[2, 0, 5])
    assert batch.offset.tolist() == [-2, 0, -5]
    assert batch.left_padding.tolist() == [2, 0, 5]
    x = tokens(4, 0, batch=3)
    assert np.array_equal(batch.make_mask(4), create_causal_mask(4, left_padding=mx.array([2, 0, 5])))
    batch.update_and_fetch(x, x)
    y = tokens(2, 1, batch=3)
    keys, _ = batch.update_and_fetch(y, y)
    assert [row.offset for row in batch.rows] == [4, 6, 1]
    both = mx.concatenate([x, y], axis=2)
    for row, (pad, held) in enumerate(zip([2, 0, 5], batch.rows, strict=True)):
        assert np.array_equal(keys[row : row + 1, :, pad:], both[row : row + 1, :, pad:])
        assert np.array_equal(held.decoded()[0], both[row : row + 1, :, pad:])
    with pytest.raises(InputError, match="can only come before the first token"):
        batch.prepare(left_padding=[1, 0, 0])


def test_a_batch_holds_the_bytes_of_its_rows_and_no_padding():
    rows = [make(sinks=0, window=0) for _ in range(2)]
    for row, count in zip(rows, (1000, 10), strict=True):
        row.update_and_fetch(tokens(count, 1), tokens(count, 2))
    batch = CompressedKVCache.merge(rows)
    assert batch.nbytes == sum(row.nbytes for row in rows)
    assert batch.size() == 1000
    one = batch.extract(1)
    assert one.nbytes == rows[1].nbytes
    one.update_and_fetch(tokens(5, 3), tokens(5, 4))
    assert (one.offset, batch.rows[1].offset) == (15, 10)


def test_layers_of_a_step_share_a_mask_that_is_freed_after_the_step():
    """The mask has a byte for each column of each sequence, which no cache counts."""
    mask, other = (CompressedKVCache.merge([make(), make()]).make_mask(1) for _ in range(2))
    assert mask is other
    held = weakref.ref(mask)
    del mask, other
    assert held() is None


def test_lent_keys_and_values_are_freed_after_the_step():
    """Otherwise a chunk's exact keys would stay in memory beside their codes until the next chunk."""
    rows = [make("none", 32, lends=True, window=4) for _ in range(2)]
    batch = CompressedKVCache.merge(rows)
    x = tokens(50, 0, batch=2)
    history, _ = batch.update_and_fetch(x, x)
    assert batch.keys_and_values()[0] is history
    mx.eval(batch.state)
    assert batch._lent is None
    assert all(row._lent is None for row in batch.rows)


@pytest.mark.parametrize("path", ["codes", "arrays"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_stores_nothing_in_any_row_and_the_others_continue(path, bad):
    """The other rows then hold and read the same, alone and in the batch."""
    settings = {**SOME_EXACT, "path": path, "lends": True, "chunk": "codes"}
    rows = [make(**settings) for _ in range(3)]
    for i, row in enumerate(rows):
        row.update_and_fetch(tokens(20 + i, i), tokens(20 + i, i))
    batch = CompressedKVCache.merge(rows)
    lengths, x = [40, 37, 39], tokens(40, 5, batch=3)
    batch.prepare(lengths=lengths, right_padding=[0, 3, 1])
    spoilt = np.array(x)
    spoilt[1, 0, 3, 3] = bad
    before = batch.describe()
    with pytest.raises(InputError, match="Layer 0: the values of a token are NaN, infinite or beyond"):
        batch.update_and_fetch(x, mx.array(spoilt))
    after = batch.describe()
    assert after[0] == before[0]
    assert all(mx.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))

    batch.filter([0, 2])
    some = x[mx.array([0, 2])]
    q, mask = tokens(40, 6, batch=2), batch.make_mask(40)
    got = attend(batch, q, some, some, mask)
    batch.finalize()
    for at, i in enumerate([0, 2]):
        own = (part[at : at + 1, :, : lengths[i]] for part in (q, some, some))
        expected = attend(rows[i], *own, rows[i].make_mask(lengths[i]))  # type: ignore[call-arg]
        assert np.allclose(got[at : at + 1, :, : lengths[i]], expected, atol=1e-5)  # rounding of float32
        assert np.array_equal(batch.rows[at].decoded()[0], rows[i].decoded()[0])


def test_rows_are_trimmed_all_or_none():
    rows = [make("none", 32, sinks=0, max_size=20) for _ in range(2)]
    for row, count in zip(rows, (10, 30), strict=True):
        row.update_and_fetch(tokens(count, 1), tokens(count, 2))
    batch = CompressedKVCache.merge(rows)
    with pytest.raises(InputError, match="has forgotten those before"):
        batch.trim(3)
    assert batch.offset.tolist() == [10, 30]


def test_rows_that_join_during_padding_keep_their_padding():
    """Each side states how many tokens come before its padding ends; a side without a statement has no padding."""
    sides = [BatchCompressedKVCache([make("none", 32) for _ in range(2)]) for _ in range(3)]
    sides[0].prepare(lengths=[6, 2], right_padding=[0, 4])
    sides[2].prepare(lengths=[3, 5], right_padding=[2, 0])
    batch = sides[0]
    for other in sides[1:]:
        batch.extend(other)
    x = tokens(4, 1, batch=6)
    for part in (x, x):
        batch.update_and_fetch(part, part)
    assert [row.offset for row in batch.rows] == [6, 2, 8, 8, 3, 5]
    batch.finalize()
    batch.update_and_fetch(x, x)
    assert [row.offset for row in batch.rows] == [10, 6, 12, 12, 7, 9]


@pytest.mark.parametrize("path", ["codes", "arrays"])
@pytest.mark.parametrize("max_size", [None, 20])
def test_a_layer_that_shares_keys_reads_those_of_its_owner(path, max_size):
    """Also the widths and columns, if all rows begin with padding: the mask is made once, for both layers."""
    batch = BatchCompressedKVCache(
        [make("none", 32, path=path, lends=True, max_size=max_size, sinks=0) for _ in range(2)]
    )
    batch.prepare(left_padding=[2, 3])
    for count in (30, 1):
        x = tokens(count, count, batch=2)
        fetched, lent = batch.update_and_fetch(x, 2 * x), batch.keys_and_values()
        if path == "codes":
            assert lent[0] is lent[1] is fetched[0]
        else:
            assert [side.shape for side in lent] == [side.shape for side in fetched]
            assert all(mx.array_equal(a, b) for a, b in zip(lent, fetched, strict=True))


def test_all_tokens_of_a_batch_are_at_the_places_of_its_mask():
    batch = BatchCompressedKVCache([make("none", 32, path="arrays") for _ in range(2)])
    batch.prepare(left_padding=[2, 3])
    x = tokens(5, 0, batch=2)
    fetched = batch.update_and_fetch(x, x)
    assert batch.left_padding.tolist() == [2, 3]
    assert mx.array_equal(batch.keys_and_values()[0], fetched[0])


def test_a_cache_of_several_sequences_cannot_join():
    cache = make()
    cache.update_and_fetch(tokens(3, 0, batch=2), tokens(3, 1, batch=2))
    with pytest.raises(InputError, match="A cache of 2 sequences cannot join a batch"):
        CompressedKVCache.merge([cache])


# schedules ------------------------------------------------------------------------------------------------------------


class Reference:
    """One sequence alone: a cache with only its tokens, and a plain list of them."""

    def __init__(self, cache: CompressedKVCache) -> None:
        self.cache, self.held = cache, np.zeros((1, HEADS, 0, DIM), np.float32)

    def add(self, x: mx.array) -> None:
        if x.shape[2]:
            self.cache.update_and_fetch(x, 2 * x)
            self.held = np.concatenate([self.held, x], axis=2)

    def trim(self, count: int) -> None:
        self.cache.trim(count)
        self.held = self.held[:, :, : max(0, self.held.shape[2] - count)]


def step(rng: random.Random, batch, references: list[Reference], new, seeds, path) -> BatchCompressedKVCache:
    """Do one random action of a generator or a server to a batch, and to the references."""
    kind = rng.choice(["prefill", "prefill", "decode", "decode", "trim", "filter", "extend", "extract", "save", "copy"])
    count = len(references)
    if kind in ("prefill", "decode"):
        lengths = [1] * count if kind == "decode" else [rng.randint(1, 3 * BLOCK + 5) for _ in range(count)]
        batch.prepare(lengths=lengths, right_padding=[max(lengths) - n for n in lengths])
        x, start = tokens(max(lengths), next(seeds), batch=count), 0
        while start < max(lengths):
            stop = min(max(lengths), start + rng.choice([1, 7, 33, 100]))
            batch.update_and_fetch(x[:, :, start:stop], 2 * x[:, :, start:stop])
            for i, (reference, length) in enumerate(zip(references, lengths, strict=True)):
                reference.add(x[i : i + 1, :, start : max(start, min(stop, length))])
            start = stop
        batch.finalize()
    elif kind == "trim" and batch.is_trimmable():
        count = rng.randint(1, 40)
        batch.trim(count)
        for reference in references:
            reference.trim(count)
    elif kind == "filter" and count > 1:
        keep = sorted(rng.sample(range(count), rng.randint(1, count)))
        batch.filter(rng.choice([keep, mx.array(keep)]))
        references[:] = [references[i] for i in keep]
    elif kind == "extend" and count < 5:
        joined = [Reference(new()) for _ in range(rng.randint(1, 2))]
        for reference in joined:
            reference.add(tokens(rng.randint(0, 50), next(seeds)))
        batch.extend(CompressedKVCache.merge([reference.cache for reference in joined]))
        references += joined
    elif kind == "extract":
        taken = batch.extract(rng.randrange(count))
        taken.update_and_fetch(tokens(40, next(seeds)), tokens(40, next(seeds)))
    elif kind == "save":
        save_prompt_cache(str(path), [batch])
        (batch,) = load_prompt_cache(str(path))
    elif kind == "copy":
        old, batch = batch, copy.deepcopy(batch)
        old.update_and_fetch(*[tokens(40, next(seeds), batch=count)] * 2)
    return batch


@pytest.mark.parametrize("method", [("none", 32), ("turboquant", 3)], ids=lambda m: m[0])
@pytest.mark.parametrize("max_size", [None, 50])
@pytest.mark.parametrize("first", range(0, 50, 10))
def test_random_schedules_end_in_the_state_of_a_plain_reference(tmp_path, method, max_size, first):
    """Two hundred schedules in all."""
    vl.make_cache(tiny("llama"))  # registers our classes with mlx-lm
    for seed in range(first, first + 10):
        rng = random.Random(seed)
        settings = {"sinks": rng.choice([0, 3]), "window": rng.choice([0, 1, 16, 64]), "max_size": max_size}

        def new(settings=settings) -> CompressedKVCache:
            return make(*method, **settings)

        references = [Reference(new()) for _ in range(rng.randint(1, 3))]
        batch = CompressedKVCache.merge([reference.cache for reference in references])
        seeds = iter(range(1000 * seed, 10**6))
        for _ in range(12):
            batch = step(rng, batch, references, new, seeds, tmp_path / "batch.safetensors")
        assert batch.offset.tolist() == [reference.held.shape[2] for reference in references]
        for row, reference in zip(batch.rows, references, strict=True):
            assert (row.offset, row.nbytes) == (reference.cache.offset, reference.cache.nbytes)
            if row.empty():
                continue
            keys, values = row.decoded()
            expected = reference.cache.decoded()
            assert np.array_equal(keys, expected[0])
            assert np.array_equal(values, expected[1])
            if method[0] == "none":
                seen = row.size() if max_size is None else min(row.size(), max_size)
                newest = seen - (settings["sinks"] if max_size else 0)
                assert np.array_equal(keys[:, :, -newest:], reference.held[:, :, -newest:])
                assert np.array_equal(keys[:, :, : settings["sinks"]], reference.held[:, :, : settings["sinks"]])


def test_mlx_lms_own_batches_still_work():
    assert type(KVCache.merge([KVCache()])).__name__ == "BatchKVCache"
