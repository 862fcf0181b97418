"""Codes of one width, each of which stands for a row of a table: scalar quantizers, grids, signs, vector codebooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from veloxlab.kernels.readers.reader import Fragment, Reader, Room, bits_at, made, scale_arrays, scales, with_stride

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
        members = with_stride(f"{prefix}_rows"), scales(prefix, self), table.made
        type_name = f"TableReader<{self.bits}, {self.width}, {self.rows.shape[3]}, {table.type_name}>"
        return Fragment(table.declaration, table.filled + made(prefix, type_name, *members))

    def levels(self) -> mx.array:
        """See `Reader.levels`."""
        first = mx.arange(self.dim // self.width, dtype=mx.uint32) * self.bits
        codes = bits_at(self.rows, first, self.bits)
        return mx.take(self.table, codes, axis=0).reshape(*self.rows.shape[:3], self.dim)


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
    value = f"{{{home}_entries, opaque(lane % {copies} * {words} * uint(sizeof({element})))}}"
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
