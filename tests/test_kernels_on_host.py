"""The kernels' Metal text, checked by clang and run on the CPU by ``tests/metal_on_host``, against its definition."""

import dataclasses
import shutil
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from tests import reading
from tests.metal_on_host import check, run
from tests.metal_on_host.launch import HOST
from veloxlab.codecs.parts.transforms import SignedHadamard
from veloxlab.kernels import splits as sharing
from veloxlab.kernels.attend import attend_kernel
from veloxlab.kernels.call import Exact, Queries, Tokens
from veloxlab.kernels.devices import METAL
from veloxlab.kernels.readers import TableReader
from veloxlab.kernels.text import Source

MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to check and run Metal text")

# Weights are kept in half precision, with an error of up to 2⁻¹¹ each, in both directions. In a sum of independent
# values such errors add up as the values do: to at most 2⁻¹¹ of the sum, in RMS. All else is float32.
HALF = 2.0**-11
COMBINES = dataclasses.replace(HOST, knows_last=True)
# packed tokens: around the 16 and 32 of a simdgroup, and over several splits; and sinks, recent ones
RUNS = ((1, 0, 0), (31, 4, 17), (32, 0, 40), (33, 3, 0), (200, 0, 0), (600, 130, 129))


@dataclasses.dataclass(frozen=True)
class Codes:
    """Codes of ``bits`` bits for ``width`` coordinates each; ``joined``: read two at a time, as one code for both."""

    bits: int
    width: int = 1
    joined: bool = False

    def __str__(self):
        return f"{self.bits}bit{self.width}{'joined' * self.joined}"

    def table(self, rng, dim, heads):
        table = rng.standard_normal((2**self.bits, self.width), np.float32)
        pairs = np.arange(4**self.bits)
        low, high = pairs % 2**self.bits, pairs >> self.bits
        return mx.array(np.concatenate([table[low], table[high]], axis=1) if self.joined else table)

    def reader(self, rng, table, shape, dim, scaled, signs):
        """Return a reader of random codes, in a slice of heads of a larger array: its rows are not contiguous."""
        batch, heads, tokens = shape
        codes = rng.integers(0, 2**self.bits, (batch, heads + 2, tokens, dim // self.width), np.uint32)
        return TableReader(
            dim=dim,
            rows=mx.array(packed(codes, self.bits))[:, 1:-1],
            scales=roots(rng, shape) if scaled else None,
            signs=signs,
            bits=2 * self.bits if self.joined else self.bits,
            table=table,
        )


def roots(rng, shape, count=1):
    """Return roots of scales ``[B, H, S, count]``, some of them 0, in a slice of heads of a larger array."""
    batch, heads, tokens = shape
    root = rng.uniform(0.5, 1.5, (batch, heads + 2, tokens, count))
    return mx.array((root * (rng.random(root.shape) < 0.95)).astype(np.float16))[:, 1:-1]


def packed(codes, bits):
    """Return codes ``[..., n]``, LSB first and without gaps, in rows of uint32 words."""
    string = (codes[..., None] >> np.arange(bits, dtype=np.uint32) & 1).astype(np.uint8).reshape(*codes.shape[:-1], -1)
    string = np.pad(string, [(0, 0)] * (string.ndim - 1) + [(0, -string.shape[-1] % 32)])
    return np.packbits(string, axis=-1, bitorder="little").view(np.uint32)


def exact(rng, shape, dims, dtype):
    """Return exact tokens from the middle of longer buffers, or None for no token."""
    batch, heads, tokens = shape
    if tokens == 0:
        return None
    buffers = (mx.array(rng.standard_normal((batch, heads, tokens + 5, dim), np.float32)) for dim in dims)
    return Exact(*(buffer.astype(dtype)[:, :, 2:-3] for buffer in buffers))


def biases(rng, shape):
    """Return a mask of biases and hidden tokens, also whole splits of them. One token of each row is visible."""
    hidden = rng.random(shape) < 0.2
    hidden[..., : shape[-1] // 2] = True
    hidden[..., -1] = False
    return mx.array(np.where(hidden, -np.inf, rng.standard_normal(shape)).astype(np.float32))


def assert_close(found, expected, tolerance):
    found, expected = (np.array(x.astype(mx.float32), np.float64) for x in (found, expected))
    error = np.sqrt(np.mean((found.reshape(expected.shape) - expected) ** 2))
    assert error <= tolerance * np.sqrt(np.mean(expected**2))


@dataclasses.dataclass(frozen=True)
class Case:
    keys: Codes
    values: Codes  # the same object as ``keys`` means the same table too
    dim: int
    shared: int  # query heads of a KV head
    length: int = 1
    value_dim: int | None = None
    masked: bool = False
    logits: bool = False
    rotated: bool = False
    scaled: bool = True
    dtype: mx.Dtype = mx.float32
    batch: int = 2
    kv_heads: int = 2
    cap: float | None = None

    def __str__(self):
        return f"{self.keys}-{self.values}-dim{self.dim}-rows{self.shared * self.length}"


PAIRS, VECTORS = Codes(4, joined=True), Codes(8, width=4)
CASES = [
    Case(Codes(1), Codes(1, joined=True), 64, 1, batch=1, kv_heads=1),
    Case(Codes(2, joined=True), Codes(3), 80, 2, masked=True, logits=True, cap=0.7),
    Case(Codes(3, joined=True), Codes(2), 96, 3, rotated=True),
    Case(PAIRS, PAIRS, 128, 4, logits=True, rotated=True, dtype=mx.float16),
    Case(Codes(5), Codes(6), 112, 7, masked=True, rotated=True, cap=1.5),
    Case(Codes(8), Codes(7), 192, 8, scaled=False),
    Case(Codes(6), Codes(5), 256, 2, masked=True, dtype=mx.bfloat16),
    # more rows than one threadgroup handles
    Case(Codes(7), Codes(8), 64, 7, length=2, masked=True, logits=True, value_dim=128),
    Case(PAIRS, Codes(4, joined=True), 256, 8, rotated=True),  # little threadgroup memory is left for two tables
    Case(VECTORS, VECTORS, 128, 4),
    Case(Codes(12, width=8), Codes(4), 64, 3, masked=True),  # a table too large for threadgroup memory
    Case(Codes(3), Codes(12, width=8), 128, 8, scaled=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_codes_agrees_with_its_definition(case):
    assert_attention_is_as_by_its_definition(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_last_threadgroup_of_a_head_combines_all_splits(case, monkeypatch):
    monkeypatch.setattr(check, "MOST_ARGUMENTS", 40)  # such a kernel has more than Metal takes, and runs on CUDA only
    for call in calls(case, RUNS[2:]):
        found, reference = call.attend(case, COMBINES), call.attend(case, HOST)
        tolerance = 2 * mx.finfo(case.dtype).eps  # the sums have another order
        assert_close(found[0], reference[0], tolerance)
        if found[1] is not None:
            assert_close(found[1], reference[1], tolerance)


def test_a_head_of_many_splits_has_a_second_kernel():
    combined = {
        case.kv_heads: attend_kernel(call.queries, call.tokens, COMBINES).combine is None
        for case in (dataclasses.replace(CASES[0], kv_heads=heads) for heads in (1, 2))
        for call in calls(case, RUNS[:1])
    }
    assert combined == {1: False, 2: True}


def test_kernels_with_one_name_have_one_text(monkeypatch):
    """MLX caches compiled kernels by name, and would run one for the other."""
    names = []
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda *, name, **_: names.append(name))
    sources = [
        Source("attend", ("x",), ("y",), (("A", a),), (), f"// a comment\ny = A + {b}") for a in (1, 2) for b in (1, 2)
    ]
    for source in sources:
        METAL.build(source)
    METAL.build(dataclasses.replace(sources[0], body="y = A + 1"))
    assert len(set(names[:4])) == 4
    assert names[4] == names[0]


class Call(NamedTuple):
    """Arguments of attention."""

    queries: Queries
    tokens: Tokens
    value_rotation: SignedHadamard

    def attend(self, case, backend):
        given = dataclasses.replace(self.queries, coded=None) if case.rotated else self.queries
        return attend_kernel(given, self.tokens, backend).prepared(given, self.tokens)(given, self.tokens.recent)


def calls(case, runs):
    """Yield a call for each of ``runs`` (numbers of packed tokens, sinks and recent tokens), with the same tables."""
    rng = np.random.default_rng(0)
    dims = case.dim, case.value_dim or case.dim
    key_table = case.keys.table(rng, dims[0], case.kv_heads)
    tables = key_table, key_table if case.values is case.keys else case.values.table(rng, dims[1], case.kv_heads)
    rotations = [SignedHadamard(dim, seed) for seed, dim in enumerate(dims)]
    signs = [
        # the Hadamard matrix has ones in its first row, so the rotation's first row has the signs
        rotation.forward(mx.eye(dim))[:, 0] * dim**0.5 if case.rotated else None
        for rotation, dim in zip(rotations, dims, strict=True)
    ]
    query_heads = case.kv_heads * case.shared
    for packed_tokens, sinks, recent in runs:
        lead = case.batch, case.kv_heads
        readers = [
            codes.reader(rng, table, (*lead, packed_tokens), dim, case.scaled, own)
            for codes, table, dim, own in zip((case.keys, case.values), tables, dims, signs, strict=True)
        ]
        tokens = Tokens(*readers, *(exact(rng, (*lead, count), dims, case.dtype) for count in (sinks, recent)), *dims)  # type: ignore[call-arg]
        q = mx.array(rng.standard_normal((case.batch, query_heads, case.length, case.dim), np.float32))
        q = q.astype(case.dtype)
        grouped = q.astype(mx.float32).reshape(*lead, -1, case.dim)
        q_coded = rotations[0].forward(grouped) if case.rotated else mx.roll(grouped, 1, axis=-1)  # type: ignore[call-arg]
        if beside := readers[0].dim - case.dim:  # a key's part for its position
            more = rng.standard_normal((*q_coded.shape[:3], beside), np.float32)
            q_coded = mx.concatenate([q_coded, mx.array(more)], axis=-1)
        mask = None
        if case.masked:
            mask = biases(rng, (case.batch, 1, case.length, sinks + packed_tokens + recent))
            mask = mx.broadcast_to(mask, (case.batch, query_heads, *mask.shape[2:]))
        logits = mx.array(rng.standard_normal(query_heads, np.float32)) if case.logits else None
        yield Call(Queries(q, case.dim**-0.5, q_coded, mask, logits, case.cap), tokens, rotations[1])


def assert_attention_is_as_by_its_definition(case, more=0.0, backend=HOST, runs=RUNS):
    for call in calls(case, runs):
        found, found_coded = call.attend(case, backend)
        plain, coded = reading.attend(call.queries, call.tokens)
        assert found.shape == (*call.queries.q.shape[:3], call.tokens.value_dim)
        assert found.dtype == case.dtype
        tolerance = HALF + more + mx.finfo(case.dtype).eps
        if case.rotated:
            assert found_coded is None
            assert_close(found, plain + call.value_rotation.inverse(coded), tolerance)
        else:
            assert_close(found, plain, tolerance)
            assert_close(found_coded, coded, tolerance)


# sinks and packed tokens of each sequence: nothing packed, nothing recent, sinks alone, and no sinks
PLACES = [
    sharing.Places(0, 150, 5, packed_entry=0, first_packed=0, exact_entry=3, column=20),
    sharing.Places(650, 180, 5, packed_entry=1, first_packed=40, exact_entry=2, column=250),
    sharing.Places(0, 180, 2, packed_entry=0, first_packed=9, exact_entry=1, column=0),
    sharing.Places(300, 49, 0, packed_entry=1, first_packed=17, exact_entry=0, column=474),
]
# the same when an earlier token came. Since then no token left (one more must come), a block left a window of 0, there
# was nothing to leave, and four blocks left, the first one smaller: the window began 61 columns before the first one
EARLIER = [
    PLACES[0]._replace(window=11, block=20),
    PLACES[1]._replace(packed=630, first_recent=160, window=0, block=20),
    PLACES[2]._replace(window=1, block=1),
    PLACES[3]._replace(packed=190, first_recent=2**32 - 61, window=126, block=30, less=10),
]
RECENT_END = 180  # of 200


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 3, 7, 9)], ids=str)
@pytest.mark.parametrize("known", [PLACES, EARLIER], ids=["now", "earlier"])
@pytest.mark.parametrize("backend", [HOST, COMBINES], ids=["combined later", "combined at once"])
def test_sequences_of_a_batch_have_separate_tokens_in_shared_arrays(case, known, backend, monkeypatch):
    monkeypatch.setattr(check, "MOST_ARGUMENTS", 40)
    (call,) = calls(dataclasses.replace(case, batch=len(PLACES)), [(700, 5, 200)])
    given = dataclasses.replace(call.queries, coded=None) if case.rotated else call.queries
    kernel = attend_kernel(given, call.tokens, backend)
    splits = sharing.sizes_of(PLACES, call.tokens.recent.room, kernel).splits
    sizes = sharing.Sizes(sharing.numbers_of(known), splits)
    found, found_coded = kernel.prepared_anywhere(given, call.tokens)(given, call.tokens.recent, sizes, RECENT_END)
    for i, at in enumerate(PLACES):
        wanted, wanted_coded = reading.attend(*of_sequence(call, i, at))
        tolerance = HALF + mx.finfo(case.dtype).eps
        if case.rotated:
            assert_close(found[i : i + 1], wanted + call.value_rotation.inverse(wanted_coded), tolerance)
        else:
            assert_close(found[i : i + 1], wanted, tolerance)
            assert_close(found_coded[i : i + 1], wanted_coded, tolerance)


def of_sequence(call, i, at):
    """Return queries and tokens of one sequence alone."""

    def packed(reader):
        rows, scales = (
            None if x is None else x[at.packed_entry : at.packed_entry + 1, :, at.first_packed :][:, :, : at.packed]
            for x in (reader.rows, reader.scales)
        )
        return dataclasses.replace(reader, rows=rows, scales=scales)

    def exact_of(run, first, count):
        return Exact(
            *(x[at.exact_entry : at.exact_entry + 1, :, first : first + count] for x in (run.keys, run.values))
        )

    tokens, queries, own = call.tokens, call.queries, slice(i, i + 1)
    count = RECENT_END - at.first_recent
    sinks, recent = exact_of(tokens.sinks, 0, at.sinks), exact_of(tokens.recent, at.first_recent, count)
    alone = Tokens(packed(tokens.keys), packed(tokens.values), sinks, recent, tokens.key_dim, tokens.value_dim)
    columns = slice(at.column, at.column + at.sinks + count + at.packed)
    mask = None if queries.mask is None else queries.mask[own, ..., columns]
    return dataclasses.replace(queries, q=queries.q[own], coded=queries.coded[own], mask=mask), alone


@pytest.mark.parametrize("exact", [(0, 0), (4, 64), (1, 10**6), (10**6, 10**6)], ids=str)
@pytest.mark.parametrize("packed", [8, 131_072, 10**7])
@pytest.mark.parametrize("blocks", [1, 8, 10_000])
def test_no_history_has_more_splits_than_groups_and_those_of_exact_tokens(exact, packed, blocks):
    call = next(calls(CASES[0], [(8, 1, 1)]))
    kernel = dataclasses.replace(attend_kernel(call.queries, call.tokens, METAL), kv_heads=blocks, row_tiles=1)
    splits = sharing.splits_of(exact[0], [packed], exact[1], kernel)
    assert splits.most <= kernel.groups + 1 + 2 * sharing._MOST_EXACT_SPLITS


def test_a_long_exact_run_is_cut_into_longer_splits(monkeypatch):
    rng = np.random.default_rng(3)
    monkeypatch.setattr(sharing, "_MOST_EXACT_SPLITS", 2)
    reader = Codes(4, joined=True).reader(rng, Codes(4, joined=True).table(rng, 64, 1), (1, 1, 40), 64, True, None)
    sinks, recent = (exact(rng, (1, 1, count), (64, 64), mx.float32) for count in (5, 700))
    tokens = Tokens(reader, reader, sinks, recent, 64, 64)
    q = mx.array(rng.standard_normal((1, 2, 1, 64), np.float32))
    queries = Queries(q, 0.125, q.reshape(1, 1, 2, 64))
    found, found_coded = attend_kernel(queries, tokens, HOST).prepared(queries, tokens)(queries, recent)
    plain, coded = reading.attend(queries, tokens)
    assert_close(found, plain, HALF)
    assert_close(found_coded, coded, HALF)


def test_each_call_gets_counters_of_its_own():
    given = [sharing.unused_counters(3, 0) for _ in range(2 * sharing._COUNTERS + 1)]
    assert len({id(x) for x in given}) == len(given)
    for counters in given:
        assert counters.size == 3
        assert not counters.any()
    assert sharing._unused_counters(3, 0) is not sharing._unused_counters(3, 1)  # another thread has others


@pytest.mark.parametrize("end", [0, 5, 255, 256, 100_000])
def test_numbers_of_a_step_are_a_row_of_those_of_the_next_steps(end):
    splits = sharing.Splits(of_packed=256, of_exact=128, most=7)
    assert sharing.common_numbers(end, 96, splits, 0).tolist() == [[end, 7, 256, 128, 96]]
