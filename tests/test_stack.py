"""A batch in shared buffers, as on a GPU, holds and returns what each of its sequences does alone."""

import gc
import random
import shutil
import weakref
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import veloxlab as vl
from tests.metal_on_host.launch import HOST
from tests.test_batch import DIM, HEADS, LENGTHS, SOME_EXACT, WANTED, Reference, alone, make, step, together, tokens
from tests.tiny_models import tiny
from veloxlab.cache import coming, counts, histories, layer, past, places, reach, stack
from veloxlab.cache.histories import StackHistory
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.stack import Stack
from veloxlab.codecs import METHODS, TENSORS
from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.rope import Rope
from veloxlab.errors import InputError
from veloxlab.kernels import checked
from veloxlab.kernels.devices import CUDA
from veloxlab.kernels.splits import Threadgroups
from veloxlab.measure.bench.host import zeros_of

needs_compilers = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("clang-16")), reason="kernels run here through g++ and clang-16"
)

# the kernel keeps weights in half precision, an error of 2⁻¹¹ each, which is less on average over many tokens
TOLERANCE = 5e-4


BACKEND = replace(HOST, lazy=True)


@pytest.fixture(autouse=True)
def a_device_that_reads_batches(monkeypatch):
    for module in (stack, histories):
        monkeypatch.setattr(module, "current_backend", lambda: BACKEND)


def is_stacked(batch) -> bool:
    return isinstance(batch._stack, Stack)


def decode(batch, references, seed) -> None:
    x = tokens(1, seed, batch=len(references))
    batch.update_and_fetch(x, 2 * x)
    for i, reference in enumerate(references):
        reference.add(x[i : i + 1])


def assert_same(batch, references) -> None:
    assert batch.offset.tolist() == [reference.cache.offset for reference in references]
    assert batch.size() == max(reference.cache.offset for reference in references)
    for row, reference in zip(batch.rows, references, strict=True):
        runs, others = row.runs, reference.cache.runs
        assert [run.tokens for run in runs] == [run.tokens for run in others]
        for found, wanted in zip(row.decoded(), reference.cache.decoded(), strict=True) if not row.empty() else ():
            assert np.array_equal(found, wanted)


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_random_schedules_end_in_the_state_of_each_sequence_alone(tmp_path, first):
    vl.make_cache(tiny("llama"))  # registers our classes with mlx-lm
    stacked = 0
    for seed in range(first, first + 10):
        rng = random.Random(seed)
        settings = {"sinks": rng.choice([0, 3]), "window": rng.choice([0, 1, 16, 64]), "layer": rng.choice([0, 3])}

        def new(settings=settings) -> CompressedKVCache:
            return make("turboquant", 3, **settings)

        references = [Reference(new()) for _ in range(rng.randint(1, 3))]
        batch = CompressedKVCache.merge([reference.cache for reference in references])
        seeds = iter(range(1000 * seed, 10**6))
        for _ in range(12):
            batch = step(rng, batch, references, new, seeds, tmp_path / "batch.safetensors")
            for _ in range(rng.choice([0, 1, 40])):
                decode(batch, references, next(seeds))
            if is_stacked(batch):
                stacked += 1
                assert batch.nbytes >= sum(row.nbytes for row in batch.rows)
            assert_same(batch, references)
    assert stacked > 40


def caches(method="turboquant", bits=4, **settings) -> list[CompressedKVCache]:
    """Return rows with nothing packed, with sinks only, without recent tokens, and with all parts."""
    codecs = [METHODS[method].codec(DIM, bits, role) for role in ("keys", "values")]
    if METHODS[method].calibrated:
        codecs = [codec.fit(Sample(tokens(512, 7), rope=Rope(DIM))) for codec in codecs]
    rows = []
    for count in (30, 3, 103, 700):
        row = CompressedKVCache(*codecs, sinks=3, window=16, **settings)
        row.update_and_fetch(tokens(count, count), tokens(count, count + 1))
        rows.append(row)
    rows[2].trim(rows[2].recent.tokens)
    assert [[run.tokens > 0 for run in row.runs] for row in rows] == [
        *([True, False, True], [True, False, False], [True, True, False], [True, True, True])
    ]
    return rows


def answers(batch, rows, seed, *, mask=None, sinks=None, query_heads=HEADS):
    """Return the results of the batch by the kernel, and of each row by graph operations."""
    new, q = tokens(1, seed, len(rows)), mx.random.normal((len(rows), query_heads, 1, DIM), key=mx.random.key(seed))
    given = batch.make_mask(1) if mask is None else mask(batch.size() + 1)
    history, _ = batch.update_and_fetch(new, 2 * new)
    found, apart = history.attend(q, 0.2, given, sinks), []
    for i, row in enumerate(rows):
        history, _ = row.update_and_fetch(new[i : i + 1], 2 * new[i : i + 1])
        own = None if mask is None else given[i : i + 1, ..., batch.size() - row.offset :]
        apart.append(history._attend_codes(q[i : i + 1], 0.2, own, sinks))
    return found, mx.concatenate(apart)


def assert_close(found, wanted) -> None:
    assert float((mx.linalg.norm(found - wanted) / mx.linalg.norm(wanted)).item()) < TOLERANCE


def hidden(width):
    """Hide some tokens of each row, but not its newest one."""
    some = mx.random.bernoulli(0.3, (4, 1, 1, width), key=mx.random.key(3))
    some[..., -1] = False
    return mx.where(some, -1e9, mx.random.normal((1, 4, 1, width), key=mx.random.key(4)))


@needs_compilers
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("turboquant", {}),
        ("turboquant", {"mask": hidden, "query_heads": 4, "sinks": mx.array([-1.0, 0.0, 1.0, 2.0])}),
        ("qjl", {"query_heads": 4}),  # its codec transforms queries and outputs
        ("commvq", {}),  # RoPE rotates its codes
    ],
)
def test_one_launch_answers_as_each_row_alone(method, more):
    rows = caches(method, 2)
    batch = CompressedKVCache.merge(rows)
    assert_close(*answers(batch, rows, 1, **more))
    for seed in range(2, 20):  # blocks leave some windows
        batch.update_and_fetch(*[tokens(1, seed, 4)] * 2)
        for i, row in enumerate(rows):
            row.update_and_fetch(*[tokens(1, seed, 4)[i : i + 1]] * 2)
    assert_close(*answers(batch, rows, 40, **more))
    assert is_stacked(batch)
    assert checked.states().keys() <= {"agrees"}


@needs_compilers
def test_each_sequence_of_mlx_lms_batch_generator_gets_the_tokens_it_gets_alone():
    model, rng = tiny("llama"), np.random.default_rng(0)
    prompts = [rng.integers(1, 90, size=n).tolist() for n in LENGTHS]
    made = [vl.make_cache(model, "turboquant", **SOME_EXACT) for _ in range(2 * len(prompts))]
    expected = [alone(model, *each) for each in zip(prompts, WANTED, made[: len(prompts)], strict=True)]
    assert together(model, prompts, WANTED, made[len(prompts) :]) == expected
    assert checked.states().keys() <= {"agrees"}


@needs_compilers
def test_rows_that_join_and_leave_are_read_in_place():
    rows = caches()
    batch = CompressedKVCache.merge(rows)
    answers(batch, rows, 1)
    batch.filter([3, 1])
    rows = [rows[3], rows[1]]
    assert_close(*answers(batch, rows, 2))
    more = caches()[:2]
    batch.extend(CompressedKVCache.merge(more))
    rows += more
    assert_close(*answers(batch, rows, 3))
    assert is_stacked(batch)
    batch.trim(2)
    for row in rows:
        row.trim(2)
    assert_close(*answers(batch, rows, 4))


def test_joining_leaving_and_trimming_move_no_other_rows_tokens():
    rows = caches()
    batch = CompressedKVCache.merge(rows)
    batch.update_and_fetch(*[tokens(1, 1, 4)] * 2)
    buffers = [id(x) for x in batch.buffers]
    one = batch.extract(2)
    batch.filter([0, 1, 3])
    batch.trim(1)
    batch.extend(CompressedKVCache.merge([one]))
    batch.update_and_fetch(*[tokens(1, 2, 4)] * 2)
    assert [id(x) for x in batch.buffers] == buffers


def test_a_batch_reports_all_bytes_that_it_holds():
    rows = caches()
    mx.eval([row.state for row in rows])
    alone = sum(row.nbytes for row in rows)
    batch = CompressedKVCache.merge(rows)
    batch.update_and_fetch(*[tokens(1, 1, 4)] * 2)
    assert batch.nbytes == sum(x.nbytes for x in batch.buffers) > alone
    assert all(row.nbytes == 0 for row in batch._rows)


def test_buffers_are_freed_with_the_batch():
    gc.disable()
    try:
        rows = caches()
        batch = CompressedKVCache.merge(rows)
        batch.update_and_fetch(*[tokens(1, 1, 4)] * 2)[0].attend(tokens(1, 1, 4), 0.2, None)
        held = weakref.ref(batch._stack)
        del batch
        assert held() is None
    finally:
        gc.enable()


def test_a_batch_without_a_kernel_continues_by_rows(monkeypatch):
    rows = caches()
    batch = CompressedKVCache.merge(rows)
    monkeypatch.setattr(histories, "agrees", lambda *_: False)
    for seed in (1, 2):
        found, wanted = answers(batch, rows, seed)
        assert np.allclose(found, wanted, atol=1e-5)  # rounding of float32
    assert not is_stacked(batch)


@pytest.mark.parametrize("settings", [{"max_size": 50}, {"path": "arrays"}, {"lends": True}])
def test_rows_that_a_kernel_does_not_read_together_keep_their_buffers(settings):
    rows = [make(**settings) for _ in range(2)]
    batch = CompressedKVCache.merge(rows)
    batch.update_and_fetch(*[tokens(5, 1, 2)] * 2)
    batch.update_and_fetch(*[tokens(1, 1, 2)] * 2)
    assert not is_stacked(batch)


@pytest.mark.parametrize("leave", [True, False])
def test_a_bad_row_is_reported_and_the_others_continue_without_it(monkeypatch, leave):
    monkeypatch.setattr(coming, "device_backend", lambda: BACKEND)  # a device whose checks are asynchronous
    settings = {"sinks": 3, "window": 0}
    rows = [make(**settings) for _ in range(3)]
    for row in rows:
        row.update_and_fetch(tokens(40, 1), tokens(40, 2))
    batch = CompressedKVCache.merge(rows)
    good, bad = tokens(1, 3, 3), np.array(tokens(1, 3, 3))
    bad[1, 0, 0, 5] = np.nan
    batch.update_and_fetch(good, mx.array(bad))
    with pytest.raises(InputError, match="the values of a token are NaN"):
        batch.settle()
    if leave:
        batch.filter([0, 2])
    else:
        with pytest.raises(InputError, match="the values of a token are NaN"):
            batch.extract(1).settle()
        taken = [batch.extract(i) for i in (0, 2)]
        batch = CompressedKVCache.merge(taken)
    for _ in range(3):
        batch.update_and_fetch(good[:2], good[:2])
    batch.settle()


def test_a_bad_token_in_a_window_is_reported_no_later_than_alone(monkeypatch):
    monkeypatch.setattr(coming, "device_backend", lambda: BACKEND)
    rows = [make(sinks=3, window=16) for _ in range(3)]
    for i, row in enumerate(rows):
        row.update_and_fetch(*[tokens(40 + 5 * i, i)] * 2)
    caches, reported = {"batch": CompressedKVCache.merge(rows), "alone": rows[1]}, {}
    for token in range(40):
        x = np.array(tokens(1, token, 3))
        x[1, 0, 0, 5] = np.nan if token == 2 else 1
        for name in caches.keys() - reported:
            caches[name].update_and_fetch(*[mx.array(x if name == "batch" else x[1:2])] * 2)
            try:
                caches[name].settle()
            except InputError as error:
                assert "Layer 0: the keys of a token are NaN" in str(error)  # noqa: PT017
                reported[name] = token
    assert 2 < reported["batch"] <= reported["alone"]
    caches["batch"].filter([0, 2])
    for token in range(40):
        caches["batch"].update_and_fetch(*[tokens(1, token, 2)] * 2)
    caches["batch"].settle()


def test_the_mask_that_shows_each_row_all_its_tokens_is_not_read(monkeypatch):
    """Not at the first step either, because that would build a kernel with masks."""
    for module in (histories, layer):
        monkeypatch.setattr(module, "current_backend", lambda: replace(CUDA, build=zeros_of, tried=False))
    batch = CompressedKVCache.merge(caches())
    for seed in range(3):
        mask, new = batch.make_mask(1), tokens(1, seed, len(batch.rows))
        batch.update_and_fetch(new, new)[0].attend(new, 0.2, mask)
        assert all(unmasked for *_, unmasked, _ in batch._stack.calls)
        batch.filter([0, 2, 3])
        batch.extend(CompressedKVCache.merge(caches()[:1]))
    batch.update_and_fetch(new, new)[0].attend(new, 0.2, mx.ones((4, 1, 1, batch.size()), mx.bool_))
    assert not all(unmasked for *_, unmasked, _ in batch._stack.calls)


def test_a_step_has_as_many_operations_for_many_rows_as_for_few(tmp_path, monkeypatch):
    for module in (histories, layer):
        monkeypatch.setattr(module, "current_backend", lambda: replace(CUDA, build=zeros_of, tried=False))
    counts = []
    for count in (2, 16):
        batch = CompressedKVCache.merge([caches()[3] for _ in range(count)])
        new = tokens(1, 1, count)
        for _ in range(2):
            mx.eval(batch.update_and_fetch(new, new)[0].attend(new, 0.2, None), batch.buffers)
        answer = batch.update_and_fetch(new, new)[0].attend(new, 0.2, batch.make_mask(1))
        graph = tmp_path / "step.dot"
        mx.export_to_dot(str(graph), answer, *batch.buffers)
        counts.append(graph.read_text().count("label"))
    assert counts[0] == counts[1] < 20


def described(stack):
    """Return packed and recent tokens of each row, as a kernel finds them in its numbers."""
    found = []
    for packed, first, *_, window, block, less in np.array(stack._numbers[1]).astype(np.int32).tolist():
        over = stack.column - first - window
        gone = (over + less) // block * block - less if over >= block else 0
        found.append((packed + gone, window + over - gone))
    return found


@pytest.mark.parametrize("window", [1, 16, 64])
@pytest.mark.parametrize("layer", [0, 3])
def test_each_block_leaves_in_the_step_in_which_it_leaves_alone(monkeypatch, window, layer):
    monkeypatch.setattr(histories, "current_backend", lambda: replace(CUDA, build=zeros_of, tried=False))
    references = [Reference(make(sinks=3, window=window, layer=layer)) for _ in range(5)]
    for reference, count in zip(references, (4, 20, 60, 147, 200), strict=True):
        reference.add(tokens(count, count))
    batch = CompressedKVCache.merge([reference.cache for reference in references])
    for seed in range(150):
        if seed == 100:  # tokens that have left the windows remain encoded
            for cache in (batch, *references):
                cache.trim(20)
        decode(batch, references, seed)
        StackHistory(batch._stack).attend(tokens(1, seed, 5), 0.2, None)
        alone = [(reference.cache.packed.tokens, reference.cache.recent.tokens) for reference in references]
        assert described(batch._stack) == alone
    assert_same(batch, references)


def test_the_splits_of_a_kernel_have_room_for_blocks_that_will_leave():
    kernel = Threadgroups(kv_heads=2, rows=8, row_tiles=1, groups=100, simdgroups=4)
    later, now = ((places.Part(0, 0, packed, 0, 400, ahead),) for packed, ahead in ((288, 0), (256, 32)))
    assert places.splits(places.form_of(3, now), 100, kernel) == places.splits(places.form_of(3, later), 100, kernel)


def test_blocks_of_many_sequences_are_encoded_together_and_in_each_layer_at_another_step(monkeypatch):
    """Each of 16 rows has a block that leaves at another step."""
    codecs = [METHODS["turboquant"].codec(DIM, 4, tensor) for tensor in TENSORS]
    calls, encode, steps = [], type(codecs[0]).encode, {0: set(), 3: set()}
    monkeypatch.setattr(type(codecs[0]), "encode", lambda *given: calls.append(given) or encode(*given))
    for number, encoding in steps.items():
        rows = [CompressedKVCache(*codecs, layer=number) for _ in range(16)]
        for i, row in enumerate(rows):
            row.update_and_fetch(*[tokens(200 + 3 * i, i)] * 2)
        batch = CompressedKVCache.merge(rows)
        for token in range(3 * counts.BLOCK):
            calls.clear()
            batch.update_and_fetch(*[tokens(1, token, 16)] * 2)
            if calls:
                assert len(calls) == len(TENSORS)
                encoding.add(token)
            if token == counts.BLOCK:
                batch._stack._regrow()  # which keeps the codes of tokens that are in the windows
    assert [len(encoding) for encoding in steps.values()] == [3, 4]  # as soon as a batch decodes, then once for a block
    assert steps[0] & steps[3] == {0}


@pytest.mark.parametrize("method", ["commvq", "fisherquant"])
def test_a_codec_that_undoes_rope_encodes_sequences_at_different_positions_together(method):
    x, starts = tokens(9, 1, batch=3), (5, 40, 1000)
    sample = Sample(tokens(512, 7), rope=Rope(DIM), gradients=tokens(512, 8))
    codec = METHODS[method].codec(DIM, 2, "keys").fit(sample)
    together = codec.encode(x, mx.array(starts)).arrays
    for i, start in enumerate(starts):
        for name, array in codec.encode(x[i : i + 1], start).arrays.items():
            assert mx.array_equal(together[name][i : i + 1], array)


def operations(path, *arrays) -> int:
    mx.export_to_dot(str(path), *arrays)
    return path.read_text().count("label")


@pytest.fixture
def a_gpu(monkeypatch):
    for module in (checked, coming, counts, past):
        monkeypatch.setattr(module, "device_backend", lambda: BACKEND)
    for module in (histories, layer):
        monkeypatch.setattr(module, "current_backend", lambda: replace(CUDA, build=zeros_of, tried=False))


@pytest.mark.usefixtures("a_gpu")
def test_a_batch_step_that_encodes_has_the_graph_of_the_others(tmp_path):
    """MLX on CUDA builds a graph for each form; a kernel's numbers follow the windows: 70 steps slide them twice."""
    batch = CompressedKVCache.merge([caches()[3] for _ in range(3)])
    batch._rows[1].trim(5)  # its blocks leave at another step
    forms, new = set(), tokens(1, 1, 3)
    for token in range(70):
        answer = batch.update_and_fetch(new, new)[0].attend(new, 0.2, None)
        stack = batch._stack
        if token:
            forms.add(operations(tmp_path / "step.dot", answer, *batch.buffers))
        parts = places.advanced(stack.form, stack._windows, stack.column).parts
        assert described(stack) == [(part.packed, stack.column - part.start) for part in parts]
        mx.eval(answer, batch.buffers)
    assert len(forms) == 1


@pytest.mark.usefixtures("a_gpu")
def test_a_step_that_encodes_has_the_graph_of_the_others(tmp_path):
    row, forms, new = caches()[3], set(), tokens(1, 1)
    packed = row.packed.tokens
    for token in range(70):
        row.update_and_fetch(new, new)
        if token > counts.BLOCK:  # the window has its full size
            forms.add(operations(tmp_path / "step.dot", *row.recent.buffers.values()))
        mx.eval(row.buffers)
    assert row.packed.tokens > packed + 2 * counts.BLOCK / 2
    assert len(forms) == 1


def test_python_reads_one_number_of_a_check(monkeypatch):
    """If Python reads a GPU's array of more than 8 bytes, MLX moves it and waits for all work."""
    monkeypatch.setattr(coming, "device_backend", lambda: BACKEND)
    checks = coming.Checks()
    x = tokens(3, 1, 4)
    _, largest = checks.of(0, [x, 2 * x])
    assert [each.of_all.size for each in largest] == [1, 1]
    assert mx.array_equal(largest[1].of_each, 2 * mx.abs(x).max(axis=(1, 2, 3)))
    checks.kept(largest)
    checks.settle(0)


def test_a_block_beyond_the_calibration_warns(monkeypatch):
    monkeypatch.setattr(reach, "_warned", set())
    rows = [make("turboquant", 3, sinks=0, window=0, reach=21, model="some") for _ in range(2)]
    for row in rows:
        row.update_and_fetch(tokens(20, 0), tokens(20, 1))
    batch = CompressedKVCache.merge(rows)
    batch.update_and_fetch(tokens(1, 2, batch=2), tokens(1, 3, batch=2))
    assert is_stacked(batch)
    with pytest.warns(UserWarning, match="first 21 positions .* up to position 22"):
        batch.update_and_fetch(tokens(1, 4, batch=2), tokens(1, 5, batch=2))
