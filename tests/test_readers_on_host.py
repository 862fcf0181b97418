"""Readers of every layout, run on the CPU as Metal text: attention through them agrees with their definition."""

import dataclasses
import shutil

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_on_host import check, run
from tests.metal_on_host.launch import HOST
from tests.test_kernels_on_host import RUNS, Case, Codes, assert_attention_is_as_by_its_definition, calls, roots
from veloxlab.codecs.parts.trellis import TrellisRows, levels_of
from veloxlab.kernels.attend import attend_kernel
from veloxlab.kernels.readers import (
    GroupsReader,
    PlanReader,
    PolarReader,
    SumsReader,
    TableReader,
    WidthsReader,
    head_widths,
    planned,
)

PAIRS = Codes(4, joined=True)
MISSING = [compiler for compiler in (run.COMPILER, check.COMPILER) if shutil.which(compiler) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to check and run Metal text")


def words(rng, shape, count):
    """Return random words ``[B, H, S, count]`` in a slice of heads of a larger array: its rows are not contiguous."""
    batch, heads, tokens = shape
    return mx.array(rng.integers(0, 2**32, (batch, heads + 2, tokens, count), np.uint32))[:, 1:-1]


@dataclasses.dataclass(frozen=True)
class Shifted(Codes):
    """Codes of one width, with a vector that each head adds."""

    def __str__(self):
        return f"shifted{super().__str__()}"

    def table(self, rng, dim, heads):
        return super().table(rng, dim, heads), mx.array(rng.standard_normal((heads, dim), np.float32))

    def reader(self, rng, table, shape, dim, scaled, signs):
        plain = super().reader(rng, table[0], shape, dim, scaled, signs)
        return dataclasses.replace(plain, shifts=table[1])


@dataclasses.dataclass(frozen=True)
class Widths:
    """Scalar codes with a width for each head."""

    bits: tuple[int, ...]

    def __str__(self):
        return f"widths{''.join(map(str, self.bits))}"

    def table(self, rng, dim, heads):
        together = {bits: 2 if bits <= 4 else 1 for bits in dict.fromkeys(self.bits)}
        levels = {b: mx.array(rng.standard_normal((2 ** (b * n), n), np.float32)) for b, n in together.items()}
        return head_widths(self.bits, dim, levels)

    def reader(self, rng, table, shape, dim, scaled, signs):
        batch, _, tokens = shape
        rows = words(rng, (batch, 1, tokens), sum(-(-dim * bits // 32) for bits in self.bits))
        return WidthsReader(dim, rows, roots(rng, shape) if scaled else None, signs, *table)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Scalar codes with a width for each coordinate, of ``bits`` bits on average."""

    bits: int
    descending: bool = True

    def __str__(self):
        return f"plan{self.bits}{'' if self.descending else 'shuffled'}"

    def table(self, rng, dim, heads):
        widths = rng.permutation(np.repeat(np.arange(9), -(-dim // 9))[:dim])
        while widths.sum() != self.bits * dim:
            step = np.sign(self.bits * dim - widths.sum())
            widths[rng.choice(np.flatnonzero(widths < 8 if step > 0 else widths > 0))] += step
        widths = np.sort(widths)[::-1] if self.descending else widths
        first = {width: 2 ** int(width) - 1 for width in range(9)}
        levels = rng.standard_normal(511).astype(np.float32)
        plan = planned(tuple(widths.tolist()), np.array([first[w] for w in widths.tolist()]), levels)
        return plan, mx.array(rng.standard_normal((heads, dim, 2), np.float32))

    def reader(self, rng, table, shape, dim, scaled, signs):
        rows = words(rng, shape, -(-self.bits * dim // 32))
        return PlanReader(dim, rows, roots(rng, shape) if scaled else None, signs, *table)


@dataclasses.dataclass(frozen=True)
class Stages:
    """Codes of two stages of ``bits`` bits each, for ``width`` coordinates together."""

    bits: int
    width: int = 1

    def __str__(self):
        return f"stages{self.bits}bit{self.width}"

    def table(self, rng, dim, heads):
        return mx.array(rng.standard_normal((4 ** (self.bits * self.width), self.width), np.float32))

    def reader(self, rng, table, shape, dim, scaled, signs):
        coarse, fine = (words(rng, shape, -(-self.bits * dim // 32)) for _ in range(2))
        scales = roots(rng, shape) if scaled else None
        return TableReader(dim, coarse, scales, signs, self.bits * self.width, table, fine)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Codes of ``bits`` bits in steps of each ``group`` of coordinates."""

    bits: int
    group: int = 32
    centred: bool = True

    def __str__(self):
        return f"groups{self.bits}of{self.group}"

    def table(self, rng, dim, heads):
        return None

    def reader(self, rng, table, shape, dim, scaled, signs):
        half_step, least = (roots(rng, shape, -(-dim // self.group)) for _ in range(2))
        rows = words(rng, shape, -(-self.bits * dim // 32))
        # as in real groups: steps are a fraction of the range, which begins below 0
        return GroupsReader(
            dim, rows, None, signs, half_step * 0.5**self.bits, -least, self.bits, self.group, self.centred
        )


@dataclasses.dataclass(frozen=True)
class Polar:
    """Angles of trees of coordinates, with these bits by level."""

    widths: tuple[int, ...]

    def __str__(self):
        return f"polar{''.join(map(str, self.widths))}"

    def table(self, rng, dim, heads):
        angles = rng.uniform(0, 2 * np.pi, sum(1 << bits for bits in self.widths)).astype(np.float32)
        return mx.array(np.stack([np.cos(angles), np.sin(angles)], axis=-1))

    def reader(self, rng, table, shape, dim, scaled, signs):
        batch, heads, tokens = shape
        bits = {b: sum(dim >> level for level, own in enumerate(self.widths, 1) if own == b) * b for b in self.widths}
        rows = [
            mx.array(rng.integers(0, 256, (batch, heads + 2, tokens, -(-n // 8)), np.uint8))[:, 1:-1]
            for n in bits.values()
        ]
        radii = roots(rng, shape, dim >> len(self.widths))
        return PolarReader(dim, rows[0], None, signs, rows[1] if len(rows) > 1 else None, radii, self.widths, table)


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of two entries of each stage, with or without RoPE; on ``rotated`` coordinates, or all."""

    stages: int
    rotated: int = 0
    traditional: bool = False
    turned: bool = True

    def __str__(self):
        return f"sums{self.stages}{'turned' * self.turned}{self.rotated or ''}"

    def table(self, rng, dim, heads):
        angles = np.zeros(1 + dim // 2, np.float32)
        angles[0], angles[1 : 1 + (self.rotated or dim) // 2] = 1234, rng.uniform(0, 1, (self.rotated or dim) // 2)
        tables = rng.standard_normal((heads, self.stages, 64, dim)) / self.stages**0.5
        return mx.array(tables.astype(np.float16)), mx.array(angles) if self.turned else None

    def reader(self, rng, table, shape, dim, scaled, signs):
        batch, heads, tokens = shape
        rows = mx.array(rng.integers(0, 256, (batch, heads + 2, tokens, -(-12 * self.stages // 8)), np.uint8))[:, 1:-1]
        order = self.rotated or dim, self.traditional
        return SumsReader(dim, rows, roots(rng, shape) if scaled else None, signs, table[0], *order, table[1])


@dataclasses.dataclass(frozen=True)
class Trellis:
    """Strings of bits of each head, with widths of ``bits`` on average, and ``beside`` for keys or values."""

    bits: float
    entries: int = 256
    code: str = "trellis"
    beside: str = ""
    descending: bool = True
    first: int = 3456  # position

    def __str__(self):
        return f"{self.code}{self.entries}-{self.bits}{self.beside}"

    def table(self, rng, dim, heads):
        widths = np.minimum(8, rng.poisson(self.bits, (heads, dim)))
        widths[0, -1] = 8
        widths = np.sort(widths, axis=1)[:, ::-1] if self.descending else widths
        rows = TrellisRows(tuple(tuple(own) for own in widths.tolist()), levels_of(self.code, self.entries))
        angles = np.array([self.first, *rng.uniform(0, 1, dim // 2 - 3), 0, 0, 0], np.float32)
        return rows, mx.array(rng.standard_normal((heads, dim), np.float32)), mx.array(angles)

    def reader(self, rng, table, shape, dim, scaled, signs):
        rows, shifts, angles = table
        batch, heads, tokens = shape
        held = mx.array(rng.integers(0, 2**32, (batch, 3, tokens + 4, rows.words), np.uint32))[:, 1:-1, 3:-1]
        # scales of 1 to 2: beside a token that is 13 times as large, others would hardly count
        held[..., : -(-heads // 8)] &= 0x33333333
        given = shifts if self.beside == "shifted" else None, angles if self.beside == "turned" else None
        return rows.reader(dim * (2 if self.beside == "turned" else 1), held, *given)


BLOCKS = Polar((4, 2, 2, 2))
TWO_STAGES = Stages(2, 2)
CASES = [
    Case(Widths((3, 1, 2, 3)), Widths((2, 4, 4, 1)), 64, 1, kv_heads=4, batch=1),
    Case(Widths((3,)), Polar((1,)), 64, 2, kv_heads=1),  # arrays so small that Metal puts them in another address space
    Case(Widths((4, 2)), Widths((2, 3)), 80, 3, masked=True, rotated=True),
    Case(Widths((8, 3)), Widths((1, 5)), 96, 2, rotated=True, dtype=mx.float16),
    Case(Widths((5, 6)), Widths((7, 8)), 112, 7, length=2, masked=True, scaled=False),
    Case(Widths((4, 3)), Codes(3), 128, 4, rotated=True, value_dim=64),
    Case(Widths((7, 4)), Widths((4, 7)), 256, 8),
    Case(Stages(1, 2), Stages(3), 64, 1, kv_heads=3),
    Case(TWO_STAGES, TWO_STAGES, 128, 4, rotated=True, dtype=mx.float16),  # one table for both
    Case(Stages(4), Stages(1, 2), 80, 7, length=2, masked=True, rotated=True),
    Case(Stages(3), Stages(4), 96, 8, masked=True, scaled=False, value_dim=112),
    Case(Codes(4), Groups(4), 64, 1, kv_heads=3),
    Case(PAIRS, Groups(3), 80, 4, masked=True, rotated=True, dtype=mx.float16),  # the last group is shorter
    Case(Groups(5, group=6, centred=False), Groups(8, group=64), 128, 7, length=2, masked=True),
    Case(Groups(1, group=200), Groups(2, group=5), 112, 3, scaled=False),
    Case(BLOCKS, BLOCKS, 128, 4, rotated=True, dtype=mx.float16),
    Case(Polar((5, 3, 3, 3, 3, 3, 3)), Polar((2, 1, 1, 1, 1, 1, 1)), 128, 1, kv_heads=3),  # one radius for all
    Case(Polar((3, 1, 1, 1)), Polar((8, 6, 6, 6)), 80, 7, length=2, masked=True, rotated=True),
    Case(Polar((8, 8, 8)), Polar((1, 7)), 96, 3, masked=True, value_dim=112),
    Case(Polar((8, 7, 7, 7, 7, 7, 7, 7)), PAIRS, 256, 8),  # too many angles for threadgroup memory
    Case(Sums(5), Sums(4, turned=False), 64, 1, kv_heads=3),
    Case(Sums(7, rotated=40), Sums(10, turned=False), 80, 4, masked=True, dtype=mx.float16),
    Case(Sums(3, rotated=48, traditional=True), Sums(2, traditional=True), 96, 7, length=2, masked=True, scaled=False),
    Case(Sums(2, rotated=22), PAIRS, 112, 3, value_dim=64),  # pairs that begin at odd places
    Case(Shifted(4, joined=True), Shifted(2, joined=True), 128, 4, rotated=True, dtype=mx.float16),
    Case(Shifted(8), Shifted(12, width=8), 64, 7, length=2, masked=True),
    Case(Shifted(3), Shifted(1), 80, 3, scaled=False),
    Case(Plan(2), Plan(3), 64, 1, kv_heads=3),
    Case(Plan(3), Plan(1, descending=False), 80, 4, masked=True, dtype=mx.float16),
    Case(Plan(8), Plan(4), 112, 7, length=2, masked=True, value_dim=128),
    Case(Plan(4, descending=False), PAIRS, 256, 8, scaled=False),
    Case(Codes(3), Plan(5), 128, 2, rotated=True),
]
TRELLISES = [
    Case(Trellis(2.25), Trellis(2.25, beside="shifted"), 64, 1, kv_heads=1, batch=1),
    Case(Trellis(2.25, beside="turned", first=1_000_000), Trellis(2.25, beside="shifted"), 64, 3, kv_heads=3),
    Case(Trellis(3.25, beside="turned"), Trellis(1.5, beside="shifted"), 128, 4, kv_heads=9, batch=1, dtype=mx.float16),
    Case(Trellis(1.25, 1024, beside="turned"), Trellis(2.25, 1024, beside="shifted"), 80, 7, length=2, masked=True),
    Case(Trellis(6.0, beside="shifted"), Trellis(7.0), 96, 2, masked=True, logits=True),
    Case(Trellis(2.25, code="scalar", beside="turned"), Trellis(4.0, code="scalar", beside="shifted"), 112, 3),
    Case(Trellis(4.25, beside="turned"), Trellis(2.25, 1024), 256, 8, dtype=mx.bfloat16),  # tables in device memory
    Case(Trellis(0.3, descending=False, beside="turned"), Trellis(3.0, descending=False), 128, 2, value_dim=64),
    Case(Codes(3), Trellis(2.25, beside="shifted"), 128, 4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_through_a_reader_agrees_with_its_definition(case):
    assert_attention_is_as_by_its_definition(case)


@pytest.mark.parametrize("case", TRELLISES, ids=str)
def test_attention_over_trellis_codes_agrees_with_its_definition(case):
    """Levels are in half precision, with an error of 2⁻¹² each, for keys (scores have size 1) and for values."""
    assert_attention_is_as_by_its_definition(case, more=2 * 2.0**-12)


@pytest.mark.parametrize(
    ("case", "apart"),
    [(TRELLISES[1], 0), (Case(Trellis(2.25, beside="turned"), Trellis(3.25, beside="shifted"), 64, 2), 1)],
    ids=["one after the other", "at once"],
)
def test_a_table_with_a_copy_for_every_lane_gives_the_same_result(case, apart):
    """With few rows, simdgroups join their sums at once, where the table was."""
    large = dataclasses.replace(HOST, large_bytes=lambda: 12 << 10)  # two copies: Metal has 32 KB
    (kernel,) = {attend_kernel(call.queries, call.tokens, large) for call in calls(case, RUNS[:1])}
    assert kernel.attend.large_bytes
    assert dict(kernel.attend.defines)["JOINED_APART"] == apart
    assert_attention_is_as_by_its_definition(case, more=2 * 2.0**-12, backend=large, runs=[(300, 4, 17)])


def test_long_vectors_leave_no_room_for_a_large_table():
    """For 256 coordinates an H200 has too few registers for so many threads, and too little memory beside the table."""
    large = dataclasses.replace(HOST, large_bytes=lambda: 200 << 10)
    case = Case(Trellis(4.25, beside="turned"), Trellis(4.25, beside="shifted"), 256, 4)
    call = next(calls(case, RUNS[:1]))
    assert not attend_kernel(call.queries, call.tokens, large).attend.large_bytes
