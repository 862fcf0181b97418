"""Codes of one width, each of which stands for a row of a table: scalar quantizers, grids, signs, vector codebooks.

A vector codebook could be read the other way round: a table of each query's products with all centroids, made once, of
which a token's score sums D/d entries. At ``d4b8``, D = 128, that is 32 · 256 numbers a query row, 16 KB in half
precision, and 64 KB for the 4 rows that share a KV head, where there are 48 KB (32 on Metal); the codebook takes 2 KB,
so that 16 copies of it fit and lanes meet in no bank. A token's score takes as many reads of threadgroup memory either
way, 32 of 8 bytes (of 16 with 8 rows), for what a matrix unit then adds up in 8 instructions for 16 tokens and 8 rows;
sums of table entries are 32 additions a token and row. To make the table takes 32,768 multiplications a row, which a
split of 256 tokens would itself take without it. So there is none; ``d8b12`` would have 128 KB a row, ``d2b8`` 32 KB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import mlx.core as mx

from veloxlab.kernels.readers.reader import (
    Fragment,
    Reader,
    Room,
    bits_at,
    made,
    scale_arrays,
    scales,
    scales_type,
    with_stride,
)

_MOST_ENTRIES = 4096  # numbers of a table that goes to threadgroup memory


@dataclass(frozen=True, eq=False)
class TableReader(Reader):
    """Codes of ``bits`` bits, LSB first and without gaps, each of which stands for a row of ``table``.

    ``table`` is ``[2**bits, n]`` float32, with n 1 or even: the levels of n neighbouring coordinates. Narrow scalar
    codes are read two at a time; the codes of a vector quantizer are of the same kind.
    """

    headers: ClassVar[tuple[str, ...]] = ("read_table.h",)

    bits: int
    table: mx.array

    @property
    def width(self) -> int:
        """Coordinates that a code stands for."""
        return self.table.shape[1]

    @property
    def table_identity(self) -> object | None:
        """The table itself."""
        return self.table

    @property
    def key(self) -> tuple[int | str, ...]:
        """See `Reader.key`."""
        return "table", self.bits, self.width, self.rows.shape[3]

    def shares(self, count: int) -> bool:
        """See `Reader.shares`: no code may be cut."""
        return self.dim % count == 0 and self.dim // count % max(2, self.width) == 0

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """See `Reader.arrays`."""
        return {f"{prefix}_rows": self.rows, **scale_arrays(prefix, self), f"{prefix}_table": self.table}

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """See `Reader.fragment`."""
        table = shared_table(self.table, prefix, home, room)
        return Fragment(table.declaration, table.filled + made(prefix, *self._typed(prefix, table)))

    def _typed(self, prefix: str, table: TableText) -> tuple[str, ...]:
        """Type and members of the reader."""
        kinds = f"{scales_type(self)}, {table.type_name}"
        type_name = f"TableReader<{self.bits}, {self.width}, {self.rows.shape[3]}, {kinds}>"
        return type_name, with_stride(f"{prefix}_rows"), scales(prefix, self), table.made

    def made_up(self, tokens: int, seed: int) -> Self:
        """See `Reader.made_up`; scales are such that vectors have numbers of a size around 1, whatever the table's."""
        made_up = super().made_up(tokens, seed)
        if made_up.root_scale is None:
            return made_up
        size = mx.sqrt(mx.square(self.table).mean())
        return replace(made_up, root_scale=(made_up.root_scale / mx.sqrt(size)).astype(mx.float16))

    def levels(self) -> mx.array:
        """See `Reader.levels`."""
        first = mx.arange(self.dim // self.width, dtype=mx.uint32) * self.bits
        codes = bits_at(self.rows, first, self.bits)
        return mx.take(self.table, codes, axis=0).reshape(*self.rows.shape[:3], self.dim)


@dataclass(frozen=True, eq=False)
class ShiftedTableReader(TableReader):
    """The same, with something added to a KV head's vectors once they are scaled: ``shifts`` ``[H, dim]``, float32."""

    headers: ClassVar[tuple[str, ...]] = (*TableReader.headers, "read_shifted.h")

    shifts: mx.array

    @property
    def key(self) -> tuple[int | str, ...]:
        """See `Reader.key`."""
        return "shifted", *super().key

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """See `Reader.arrays`."""
        return super().arrays(prefix) | {f"{prefix}_shifts": self.shifts}

    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """See `Reader.fragment`."""
        table = shared_table(self.table, prefix, home, room)
        type_name, *members = self._typed(prefix, table)
        shifts = f"{prefix}_shifts + head * {self.dim}"
        shifted = made(prefix, f"ShiftedReader<{type_name}>", f"{{{', '.join(members)}}}", shifts)
        return Fragment(table.declaration, table.filled + shifted)

    def expand(self) -> mx.array:
        """See `Reader.expand`."""
        return super().expand() + self.shifts[None, :, None]


@dataclass(frozen=True)
class TableText:
    """Text of a table: its type, the value of that type, and, at its home, its memory and what fills it."""

    type_name: str
    made: str
    declaration: str
    filled: str


def shared_table(table: mx.array, prefix: str, home: str, room: Room) -> TableText:
    """The text of ``table`` ``[entries, n]``, the input ``{prefix}_table``, as ``source/read_table.h`` has it.

    It goes to threadgroup memory as often as there is room, unless it is a large one of vectors.
    """
    entries, width = table.shape
    if width > 1 and table.size > _MOST_ENTRIES:
        return TableText(f"GlobalTable<{width}>", f"{{{home}_table}}", "", "")
    words = max(1, width // 2)  # of an entry: a number, or pairs
    copies = room.copies(entries, width // 2)
    kind, element = (f"SingleTable<{copies}>", "float") if width == 1 else (f"SharedTable<{width}, {copies}>", "pair_t")
    size = f"opaque({copies * words} * uint(sizeof({element})))"
    value = f"{{place_of({home}_entries + lane % {copies} * {words}), {size}}}"
    if home != prefix:
        return TableText(kind, value, "", "")
    entry = (
        f"{prefix}_table[e]"
        if width == 1
        else f"make_pair({prefix}_table[e * {width} + 2 * w], {prefix}_table[e * {width} + 2 * w + 1])"
    )
    # lanes write their entries' copies in an order of their own, or they would all meet in one bank
    fill = (
        f"for (uint i = thread_id; i < {entries * words}; i += THREADS) {{\n"
        f"  const uint e = i / {words}, w = i % {words};\n"
        f"  const {element} entry = {entry};\n"
        f"  for (uint c = 0; c < {copies}; c++) "
        f"{prefix}_entries[(e * {copies} + (c + e) % {copies}) * {words} + w] = entry;\n"
        "}\n"
    )
    return TableText(kind, value, f"threadgroup {element} {prefix}_entries[{entries * copies * words}];", fill)
