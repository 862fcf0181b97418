"""The host that checks and runs Metal text finds the bugs that it must find: each wrong body here is a real bug."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_on_host import check, run
from tests.metal_on_host.launch import to_mlx, to_numpy
from tests.metal_on_host.text import KernelError
from veloxlab.kernels.text import Source

needs_clang = pytest.mark.skipif(
    shutil.which(check.COMPILER) is None, reason=f"needs {check.COMPILER} to check Metal's address spaces"
)
needs_gcc = pytest.mark.skipif(
    shutil.which(run.COMPILER) is None, reason=f"needs {run.COMPILER} to run Metal on the CPU"
)

THREADS = 64
NUMBERS = np.arange(1, THREADS + 1, dtype=np.float32)


def a_kernel(body):
    return Source("probe", ("given",), ("out",), (), (), "const uint i = thread_position_in_threadgroup.x;\n" + body)


def run_on(body, given=NUMBERS, dtype=np.float32, groups=(1, 1, 1)):
    return run.run(a_kernel(body), {"given": given}, groups, THREADS, [(THREADS * groups[0],)], [np.dtype(dtype)])[0]


def syntax(body, constant=()):
    check.check_syntax(a_kernel(body), {"given": "float", "out": "float"}, constant)


@needs_gcc
def test_threads_share_memory_and_exchange():
    reverse = "threadgroup float shared[64];\nshared[i] = given[i];\ngroup_barrier();\nout[i] = shared[63 - i];"
    assert np.array_equal(run_on(reverse), NUMBERS[::-1])
    assert np.array_equal(run_on("out[i] = simd_shuffle_xor(given[i], 3u);"), NUMBERS[np.arange(THREADS) ^ 3])
    assert np.array_equal(run_on("out[i] = simd_shuffle(given[i], 5u);"), np.repeat(NUMBERS[[5, 37]], 32))
    grid = run_on(
        "out[threadgroup_position_in_grid.x * 64 + i] = float(threadgroup_position_in_grid.x);", groups=(3, 1, 1)
    )
    assert np.array_equal(grid, np.repeat(np.arange(3, dtype=np.float32), THREADS))


@needs_gcc
def test_the_matrix_unit_multiplies():
    body = """
    if (i >= 32) return;
    const uint at = matrix_row(i % 32) * 8 + matrix_column(i % 32);
    float2 sum = float2(1.0f);
    multiply(sum, float2(given[at], given[at + 1]), float2(given[64 + at], given[64 + at + 1]));
    out[at] = sum.x, out[at + 1] = sum.y;"""
    left, right = np.random.default_rng(0).integers(-9, 9, (2, 8, 8)).astype(np.float32)
    assert np.array_equal(run_on(body, np.stack([left, right])).reshape(8, 8), left @ right + 1)


@needs_gcc
def test_views_keep_their_strides_and_gaps_are_nan():
    every_other = np.repeat(NUMBERS, 2)[::2]
    assert every_other.strides == (8,)
    assert np.array_equal(
        run_on("out[i] = given[i * given_strides[0]] * given_shape[0];", every_other), NUMBERS * THREADS
    )
    assert np.all(np.isnan(run_on("out[i] = given[i % 63 * 2 + 1];", every_other)))


@needs_gcc
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_short_floats_are_read_and_rounded_as_mlx_does(dtype):
    name = {mx.float16: "half", mx.bfloat16: "bfloat"}[dtype]
    numbers = np.random.default_rng(0).standard_normal(THREADS).astype(np.float32)
    numbers[:2] = 1 + 3 * 2.0**-9, 1 + 2.0**-8  # ties of bfloat
    short = to_numpy(mx.array(numbers).astype(dtype))
    assert np.array_equal(run_on("out[i] = as_float(given[i]);", short), np.array(to_mlx(short).astype(mx.float32)))
    rounded = to_mlx(run_on(f"out[i] = {name}(given[i]);", numbers, short.dtype))
    assert mx.array_equal(rounded, mx.array(numbers).astype(dtype))


@needs_gcc
def test_unwritten_outputs_are_nan():
    assert np.array_equal(np.isnan(run_on("if (i != 5) out[i] = 0;")), np.arange(THREADS) == 5)
    assert np.all(np.isnan(run_on("threadgroup float shared[64];\nout[i] = shared[i];")))


@needs_gcc
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (i < 5) group_barrier();\nout[i] = 0;", "threadgroup_barrier at probe.metal:2, thread 5 has ended"),
        ("if (i < 5) {\nsimd_barrier();\n} else {\nsimd_barrier();\n}", "at probe.metal:3, thread 5 in"),
        ("if (i < 5) simd_barrier(); else simd_barrier();", "divergence"),
        ("if (i < 32) group_barrier();\nelse simd_barrier();", "divergence"),
        ("if (i < 32) simd_barrier();\ngroup_barrier();\nif (i < 9) simd_barrier();", "thread 9 has ended"),
        ("float x = 1;\nif (i < 5) x = simd_shuffle_xor(x, 1u);\nout[i] = x;", "thread 0 waits in simd_shuffle_xor"),
        ("for (uint k = 0; k < i; k++) simd_barrier();", "divergence"),
        ("out[i] = simd_shuffle(given[i], i + 1);", "thread 31 asks for lane 32"),
        ("threadgroup float s[64];\ns[i] = given[i];\nout[i] = s[63 - i];", "race: thread 32 writes at probe.metal:3"),
        ("threadgroup float s[64];\ns[i] = given[i];\nsimd_barrier();\nout[i] = s[63 - i];", "race"),
        ("threadgroup float s[64];\ns[i] = 1;\nif (simd_any(true)) out[i] = s[i ^ 1];", "race"),
        ("threadgroup half s[64];\ns[i] = 1;\nsimd_barrier();\ns[i ^ 1] += s[i];", "race"),
        ("out[i / 2] = 1;", "race: thread 1 writes at probe.metal:2 what thread 0 wrote at probe.metal:2"),
        ("out[i] = 1;\nout[i] = out[63 - i];", "race"),
        ("out[i] = given[i + 1];", "thread 63 is 0 bytes past the end of given"),
        ("out[i] = given[i - 1];", "past the end of given"),  # 4 billion
        ("out[i + 3] = 0;", "past the end of out"),
        ("((thread float*)given)[i] = 0;", "thread 0 writes to the input given"),
        ("out[i] = float(1u << i);", "thread 32 shifts by more than a number's width at probe.metal:2"),
        ("float own[5];\nown[i % 5] = given[i];\nout[i] = own[i];", "thread 5 steps outside its own array"),
        ("out[i] = ((const global_memory uint4*)(given + 2))[0].x;", "not a multiple of the type's alignment"),
        ("out[i] = float(1u / i);", "thread 0 divides by 0"),
        ("threadgroup float s[8193];\ns[i] = out[i] = 0;", "32772 bytes of threadgroup memory, where Metal has 32768"),
        ("out[i] = no_such(given);", "no_such"),
    ],
)  # fmt: skip
def test_a_run_finds_the_bug(body, message):
    with pytest.raises(KernelError) as error:
        run_on(body)
    assert message in str(error.value)


@needs_gcc
def test_threadgroups_do_not_share_their_outputs():
    assert run_on("out[threadgroup_position_in_grid.x * 64 + i] = 1;", groups=(2, 1, 1)).all()
    with pytest.raises(KernelError, match="what thread 5 of another threadgroup wrote"):
        run_on("if (i == 5) out[i] = 1;", groups=(2, 1, 1))


@needs_gcc
def test_barriers_order_what_threads_share():
    turns = """threadgroup float s[64];
    s[i] = given[i];
    for (uint step = 1; step < 64; step *= 2) {
      group_barrier();
      const float other = s[i ^ step];
      group_barrier();
      s[i] += other;
    }
    out[i] = s[i];"""
    assert np.all(run_on(turns) == NUMBERS.sum())
    in_simdgroups = turns.replace("group_barrier", "simd_barrier").replace("step < 64", "step < 32")
    assert np.array_equal(run_on(in_simdgroups), np.repeat(NUMBERS.reshape(2, 32).sum(axis=1), 32))


@needs_gcc
def test_a_failure_does_not_affect_the_next_run():
    with pytest.raises(KernelError):
        run_on("out[i] = given[i + 1];")
    assert np.array_equal(run_on("out[i] = given[i];"), NUMBERS)


@needs_clang
@pytest.mark.parametrize(
    "body",
    [
        "threadgroup float s[64];\ns[i] = given[i];\ngroup_barrier();\nout[i] = simd_shuffle_xor(s[63 - i], 1u);",
        "const global_memory float* at = given + given_strides[0] * given_shape[0];\nout[i] = square_root(at[0]);",
        "float x = given[i];\nthread float& same = x;\nout[i] = as_float(half(same));",
        "float2 sum = float2(1.0f);\nmultiply(sum, sum, float2(given[0], given[1]));\nout[i] = sum.x;",
    ],
)
def test_valid_syntax_passes(body):
    assert complaint(body) is None


def complaint(body):
    """Return the fault of a body, or None."""
    try:
        syntax(body)
    except KernelError as error:
        return str(error)
    return None


@needs_clang
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("threadgroup float s[64];\nglobal_memory float* at = s;", "with an lvalue of type '__local"),
        ("threadgroup float s[64];\nthread float* at = s;", "with an lvalue of type '__local"),
        ("thread const float& x = given[i];", "changes address space"),
        ("float x[3];\nfloat* at = x;", "at names no address space: float *"),
        ("float x;\nfloat& same = x;", "same names no address space: float &"),
        ("if (i < 3) {\nthreadgroup float s[64];\n}", "outermost scope of a kernel"),
        ("static constexpr int size = 3;\nout[i] = size;", "constant address space"),
        ("given[i] = 0;", "read-only"),
        ("double x = 1;", "double"),
        ("if constexpr (true) out[i] = 0;", "incompatible with C++ standards before C++17"),
        ("out[i] = no_such(given);", "no_such"),
    ],
)  # fmt: skip
def test_the_syntax_check_finds_the_bug(body, message):
    with pytest.raises(KernelError) as error:
        syntax(body)
    assert message in str(error.value)
    assert "probe" in str(error.value)


@needs_clang
def test_metal_takes_31_arguments():
    names = tuple(f"given{i}" for i in range(28))
    use = "out[thread_position_in_threadgroup.x] = given0[given0_strides[0] * given0_shape[0]];"
    for inputs, refused in ((names, False), ((*names, "one_more"), True)):
        source = Source("probe", inputs, ("out",), (), (), use)
        types = dict.fromkeys((*inputs, "out"), "float")
        if not refused:
            check.check_syntax(source, types)
            continue
        with pytest.raises(KernelError, match="32 arguments, where Metal has 31"):
            check.check_syntax(source, types)


@needs_clang
def test_small_arrays_are_in_another_address_space():
    body = "const global_memory float* at = given;\nout[i] = at[0];"
    syntax(body)
    with pytest.raises(KernelError, match="__constant"):
        syntax(body, constant=("given",))
