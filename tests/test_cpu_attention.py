"""Attention over codes by CPU loops agrees with its definition, for every layout, dtype, mask and number of threads."""

import dataclasses
import itertools
import os
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reading
from tests.test_attention_kernels import history, normal, relative
from tests.test_kernels_on_host import CASES as TABLES
from tests.test_kernels_on_host import PAIRS, RUNS, Case, Codes, assert_close, calls
from tests.test_readers_on_host import CASES as LAYOUTS
from veloxlab.cache.attention import History
from veloxlab.cache.histories import attend_together
from veloxlab.codecs import METHODS
from veloxlab.codecs.base import Code, Sample
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.kernels import checked
from veloxlab.kernels.cpu import attend as loops
from veloxlab.kernels.cpu import call as cpu

ROUNDING = 5e-6  # for sums of some hundred float32 products in another order: 3e-6 measured


@pytest.fixture(params=[1, 2], ids=["alone", "shared"])
def count_of_threads(request, monkeypatch):
    monkeypatch.setattr(cpu, "threads", lambda: request.param)
    monkeypatch.setattr(cpu, "_SHARED_NUMBERS", 1000)


def assert_as_by_definition(case, runs=RUNS):
    for call in calls(case, runs):
        queries = dataclasses.replace(call.queries, coded=None) if case.rotated else call.queries
        found, found_coded = cpu.attend_kernel(queries, call.tokens).prepared(queries, call.tokens)(
            queries, call.tokens.recent
        )
        plain, coded = reading.attend(call.queries, call.tokens)
        if case.rotated:
            assert found_coded is None
            plain = plain + call.value_rotation.inverse(coded)
        else:
            assert_close(found_coded, coded, ROUNDING)
        assert found.dtype == mx.float32
        assert_close(found, plain, ROUNDING)


@pytest.mark.usefixtures("count_of_threads")
@pytest.mark.parametrize("case", [*TABLES, *LAYOUTS], ids=str)
def test_every_layout_agrees_with_its_definition(case):
    assert_as_by_definition(case)


@settings(deadline=None, max_examples=40)
@given(
    codes=st.tuples(*[st.builds(Codes, st.integers(1, 8), joined=st.booleans())] * 2),
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    shared=st.integers(1, 5),
    length=st.integers(1, 4),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    flags=st.tuples(*[st.booleans()] * 4),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    run=st.tuples(st.integers(1, 70), st.integers(0, 5), st.integers(0, 70)),
)
def test_every_shape_agrees_with_its_definition(codes, dim, shared, length, heads, flags, dtype, run):
    # codes are read two at a time up to 4 bits
    codes = [c if c.bits <= 4 else dataclasses.replace(c, joined=False) for c in codes]
    masked, logits, rotated, scaled = flags
    batch, kv_heads = heads
    case = Case(
        *codes, dim, shared, length, None, masked, logits, rotated, scaled, dtype, batch=batch, kv_heads=kv_heads
    )  # type: ignore[call-arg]
    assert_as_by_definition(case, [run])


def tokens_of(tokens=150):
    codec = TurboQuant(64, 4)
    return history(codec, codec, packed=tokens)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_spreads_as_in_the_reference(where, bad):
    found = tokens_of()
    q = normal(1, 4, 1, 64)
    if where == "query":
        q[0, 1, 0, 3] = bad
    else:
        recent = found.segments[-1]
        code = recent.keys if where == "key" else recent.values
        array = mx.array(code.arrays["values"])
        array[0, 0, 5, 7] = bad
        changed = {"keys" if where == "key" else "values": Code({"values": array}, code.start)}
        found = History((*found.segments[:-1], dataclasses.replace(recent, **changed)))
    wanted = found._attend_codes(q, 0.125, None)
    by_loop = found.attend(q, 0.125, None)
    assert (mx.isnan(by_loop) == mx.isnan(wanted)).all()
    assert mx.allclose(mx.nan_to_num(by_loop), mx.nan_to_num(wanted), atol=1e-4)


def test_all_tokens_can_be_masked():
    found, q = tokens_of(), normal(1, 4, 1, 64)
    mask = mx.zeros((1, 1, 1, found.tokens), mx.bool_)
    wanted = found._attend_codes(q, 0.125, mask)
    assert relative(found.attend(q, 0.125, mask), wanted) < 1e-4


def test_unevaluated_graphs_use_mlx_operations():
    found, q = tokens_of(), normal(1, 4, 1, 64)
    wanted = found.attend(q, 0.125, None)
    compiled = mx.compile(lambda q: found.attend(q, 0.125, None))(q)
    each = mx.vmap(lambda q: found.attend(q, 0.125, None))(q[None])[0]
    assert relative(compiled, wanted) < 1e-4
    assert relative(each, wanted) < 1e-4


def test_derivatives_are_those_of_mlx_operations():
    found, q = tokens_of(), normal(1, 4, 1, 64)
    gradient = mx.grad(lambda q: mx.square(found.attend(q, 0.125, None)).sum())(q)
    wanted = mx.grad(lambda q: mx.square(found._attend_codes(q, 0.125, None)).sum())(q)
    assert relative(gradient, wanted) < 1e-4


def test_derivatives_reach_exact_tokens():
    found, q = tokens_of(), normal(1, 4, 1, 64)
    recent = found.segments[-1]

    def total(attend, values):
        changed = dataclasses.replace(recent, values=Code({"values": values}))
        return mx.square(attend(History((*found.segments[:-1], changed)), q, 0.125, None)).sum()

    values = recent.values.arrays["values"]
    gradient = mx.grad(lambda v: total(History.attend, v))(values)
    assert relative(gradient, mx.grad(lambda v: total(History._attend_codes, v))(values)) < 1e-4
    assert mx.abs(gradient).max() > 0


@pytest.mark.parametrize("method", ["turboquant", "spectralquant"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_a_batch_is_read_like_each_of_its_sequences(method, dtype, masked, length):
    codec = METHODS[method].codec(64, 3, "keys")
    if METHODS[method].calibrated:
        codec = codec.fit(Sample(normal(1, 2, 300, 64)))
    counts = 40, 333, 150
    own = [history(codec, codec, packed=count, recent=count % 60 + 1, dtype=dtype) for count in counts]
    q, width = normal(3, 4, length, 64).astype(dtype), max(h.tokens for h in own)
    columns = [width - h.tokens for h in own]
    mask = (mx.random.uniform(shape=(3, 1, length, width), key=mx.random.key(1)) < 0.7) if masked else None
    masks = [mask[i : i + 1, ..., at:] if masked else None for i, at in enumerate(columns)]
    wanted = [h.attend(q[i : i + 1], 0.125, masks[i]) for i, h in enumerate(own)]
    found = attend_together(own, columns, q, 0.125, mask, None)
    assert relative(found, mx.concatenate(wanted)) < (1e-6 if dtype == mx.float32 else mx.finfo(dtype).eps)

    def reference(q):
        return mx.concatenate([h._attend_codes(q[i : i + 1], 0.125, masks[i]) for i, h in enumerate(own)])

    if dtype == mx.float32:
        gradient = mx.grad(lambda q: mx.square(attend_together(own, columns, q, 0.125, mask, None)).sum())(q)
        assert relative(gradient, mx.grad(lambda q: mx.square(reference(q)).sum())(q)) < 1e-4


def test_a_batch_of_codecs_with_different_query_transforms_is_read_one_by_one():
    codecs = [METHODS["spectralquant"].codec(64, 3, "keys").fit(Sample(normal(1, 2, 300, 64, seed=i))) for i in (1, 2)]
    codecs.append(METHODS["qjl"].codec(64, 3, "keys"))
    q = normal(2, 4, 1, 64)
    for pair in itertools.combinations(codecs, 2):
        assert attend_together([history(c, c) for c in pair], [0, 0], q, 0.125, None, None) is None


def test_a_batch_can_have_rotated_codes_of_several_kinds():
    codecs = TurboQuant(64, 4), METHODS["rabitq"].codec(64, 2, "keys"), METHODS["rvq"].codec(64, 4, "keys")
    own, q = [history(codec, codec, recent=5 + i) for i, codec in enumerate(codecs)], normal(3, 4, 1, 64)
    found = attend_together(own, [2, 1, 0], q, 0.125, None, None)
    wanted = [h.attend(q[i : i + 1], 0.125, None) for i, h in enumerate(own)]
    assert relative(found, mx.concatenate(wanted)) < 1e-6


def test_no_loop_runs_if_kernels_are_switched_off(monkeypatch):
    monkeypatch.setenv("VELOXLAB_KERNELS", "0")
    monkeypatch.setattr(loops, "attend", None)
    assert tokens_of().attend(normal(1, 4, 1, 64), 0.125, None).shape == (1, 4, 1, 64)


def test_a_loop_that_disagrees_is_switched_off_with_one_warning(monkeypatch):
    monkeypatch.setattr(checked, "_states", {})
    monkeypatch.setattr(loops, "attend", lambda *_: None)
    found, q = tokens_of(), normal(1, 4, 1, 64)
    with pytest.warns(UserWarning, match="attend .* is switched off on this cpu device"):
        first = found.attend(q, 0.125, None)
    assert relative(first, found._attend_codes(q, 0.125, None)) < 1e-6
    assert mx.array_equal(first, found.attend(q, 0.125, None))


@pytest.mark.usefixtures("count_of_threads")
def test_threads_that_attend_at_once_get_their_own_results():
    case = Case(PAIRS, PAIRS, 64, 3, rotated=True)
    (call,) = calls(case, [(900, 4, 70)])
    queries = [dataclasses.replace(call.queries, coded=None, q=normal(*call.queries.q.shape, seed=i)) for i in range(6)]
    mx.eval([q.q for q in queries])
    kernel = cpu.attend_kernel(queries[0], call.tokens)

    def answer(q):
        return np.array(kernel.prepared(q, call.tokens)(q, call.tokens.recent)[0])

    wanted = [answer(q) for q in queries]
    wrong = []

    def attend(i):
        found = [answer(queries[i]) for _ in range(50)]
        wrong.extend(i for own in found if not np.array_equal(own, wanted[i]))

    running = [threading.Thread(target=attend, args=(i,)) for i in range(len(queries))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert wrong == []


IN_A_PROCESS = """
import os, sys, threading
os.environ["VELOXLAB_THREADS"] = "2"
import veloxlab, mlx.core as mx
from tests.test_cpu_attention import tokens_of, normal
found, q = tokens_of(20_000), normal(1, 4, 1, 64)
mx.eval(found.attend(q, 0.125, None))
"""


def run_in_a_process(code):
    """Return how a process ended, and its error output."""
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS + code], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_the_interpreter_ends_while_loops_run():
    # not daemon threads: MLX aborts a process if a daemon thread computes with it at the end
    attending = "lambda: [found.attend(q, 0.125, None) for _ in range(20)]"
    ended = run_in_a_process(f"for _ in range(3): threading.Thread(target={attending}).start()")
    assert ended == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_loops_run_in_a_forked_process():
    # computed numbers: MLX's own thread does not exist in the child process
    ended = run_in_a_process(
        "from veloxlab.kernels.cpu.threads import shared\n"
        "if os.fork() == 0:\n"
        "    seen = []\n"
        "    shared(lambda first, last: seen.append((first, last)), 4, 2)\n"
        "    os._exit(sorted(seen) != [(0, 2), (2, 4)])\n"
        "assert os.wait()[1] == 0\n"
    )
    assert ended == (0, "")
